"""Logits that are made when somebody looks at them.

``LateLogits`` is a tensor with shape, dtype, device and place in the autograd graph, and without values: an output
projection gives it instead of its product. Whatever reads it, in Python or in C++, gets the product, made
at that moment from the tensors of the forward pass. So it can stand in a model's own output, be indexed, iterated,
gathered, copied and converted there, and takes no memory where nobody reads it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only


class ForwardPass:
    """A model's forward pass as far as its logits go.

    While it is ``running``, a bias that is added to them and their cross-entropy need no values either. The latter is
    ``cross_entropy(hidden, weight, labels, bias)``, with rows of hidden as long as labels.
    """

    def __init__(self, cross_entropy: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]):
        self.running, self.cross_entropy = True, cross_entropy

    def end(self) -> None:
        self.running, self.cross_entropy = False, None


class Projection:
    """What logits are made of: ``hidden`` (..., d), ``weight`` (words, d), ``bias`` (1, words) or None.

    Autocast and inference mode are those of the moment when it is made.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, forward: ForwardPass):
        self.hidden, self.weight, self.bias = hidden, weight, None
        self.forward = forward
        self.autocast = autocast_now(hidden.device.type)
        self.inference = torch.is_inference_mode_enabled()
        self._seen = [("hidden states", hidden, _state(hidden)), ("weight", weight, _state(weight))]

    def with_bias(self, bias: Tensor) -> Projection:
        """Returns the same projection with ``bias`` added."""
        other = Projection.__new__(Projection)
        other.__dict__.update(self.__dict__, bias=bias, _seen=[*self._seen, ("bias", bias, _state(bias))])
        return other

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        on, dtype = self.autocast.keywords["enabled"], self.autocast.keywords["dtype"]
        product = dtype if on and self.hidden.dtype != torch.float64 else self.hidden.dtype
        return product if self.bias is None else torch.promote_types(product, self.bias.dtype)

    def logits(self, hidden: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """(..., words), of the given tensors or of the forward pass's. Raises RuntimeError where these have changed."""
        for name, tensor, state in self._seen:
            if _state(tensor) != state:
                raise RuntimeError(
                    f"logits after pk.lean: the {name} of the output projection changed since the forward pass;"
                    " expected logits to be read before that"
                )
        hidden, weight = self.hidden if hidden is None else hidden, self.weight if weight is None else weight
        bias = self.bias if bias is None else bias
        with self.autocast():
            product = F.linear(hidden, weight)
            return product if bias is None else product + bias


def autocast_now(device: str) -> functools.partial:
    """Returns what makes the autocast of this moment again at a later one."""
    options = {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}
    return functools.partial(torch.autocast, device, **options, cache_enabled=False)


def _state(tensor: Tensor) -> tuple:
    """Returns what changes when a tensor is written to, or gets other memory."""
    version = 0 if tensor.is_inference() else tensor._version
    address = tensor.data_ptr() if type(tensor) in (Tensor, torch.nn.Parameter) else 0
    return version, address, tensor.device


class LateLogits(Tensor):
    """See above. ``projection`` gives its values, which are then cast to its dtype and brought into its shape."""

    projection: Projection
    petl_made: Tensor | None = None

    @staticmethod
    @torch.compiler.disable
    def of(projection: Projection) -> LateLogits:
        return _Project.apply(projection, projection.hidden, projection.weight, projection.bias)

    def made(self) -> Tensor:
        """The logits as a plain tensor, always the same one, with gradients where the forward pass had them."""
        if self.petl_made is None:
            with torch.inference_mode(self.projection.inference), torch.set_grad_enabled(self.requires_grad):
                self.petl_made = _Made.apply(self)
        return self.petl_made

    def values(self) -> Tensor:
        """A new tensor of the logits, without gradients."""
        with torch.no_grad():
            logits = self.projection.logits().to(self.dtype)
        return logits if logits.shape == self.shape else logits.view(self.shape)

    __hash__ = object.__hash__

    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        late = _LATE[function](*args, **kwargs) if function in _LATE else NotImplemented
        if late is not NotImplemented:
            return late
        args, kwargs = tree_map_only(LateLogits, LateLogits.made, (args, kwargs))
        return function(*args, **kwargs)

    @classmethod
    @torch.compiler.disable
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """Serves what calls operators without Python's functions: autograd's rules for them are above this."""
        args, kwargs = tree_map_only(LateLogits, _unrecorded, (args, kwargs or {}))
        return function(*args, **kwargs)


def _unrecorded(late: LateLogits) -> Tensor:
    return late.made().detach()


def _without_values(projection: Projection, shape: torch.Size, dtype: torch.dtype) -> LateLogits:
    late = Tensor._make_wrapper_subclass(LateLogits, shape, dtype=dtype, device=projection.hidden.device)
    late.projection = projection
    return late


class _Project(torch.autograd.Function):
    """The projection's place in the graph. A backward pass through it is rare, and makes the logits again."""

    @staticmethod
    def forward(ctx, projection: Projection, *tensors: Tensor | None) -> LateLogits:
        ctx.projection = projection
        return _without_values(projection, projection.shape, projection.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogits: Tensor):
        projection, needs = ctx.projection, ctx.needs_input_grad[1:]
        tensors = [projection.hidden, projection.weight, projection.bias]
        with torch.enable_grad():
            tensors = [
                tensor.detach().requires_grad_() if needed else tensor
                for tensor, needed in zip(tensors, needs, strict=True)
            ]
            logits = projection.logits(*tensors)
        wanted = [tensor for tensor, needed in zip(tensors, needs, strict=True) if needed]
        grads = iter(torch.autograd.grad(logits, wanted, dlogits))
        return None, *(next(grads) if needed else None for needed in needs)


class _Made(torch.autograd.Function):
    """Gives logits without values their values."""

    @staticmethod
    def forward(ctx, late: LateLogits) -> Tensor:
        return late.values()

    @staticmethod
    def backward(ctx, dlogits: Tensor) -> Tensor:
        return dlogits


class _Recast(torch.autograd.Function):
    """The same logits in another dtype or shape, still without values."""

    @staticmethod
    def forward(ctx, late: LateLogits, shape: torch.Size, dtype: torch.dtype) -> LateLogits:
        ctx.of = late.shape, late.dtype
        return _without_values(late.projection, shape, dtype)

    @staticmethod
    def backward(ctx, dlogits: Tensor):
        shape, dtype = ctx.of
        return dlogits.to(dtype).view(shape), None, None


# ---- what needs no values -------------------------------------------------------------------------------------------


def _float(late: LateLogits) -> LateLogits:
    """Mixed precision wraps models in a conversion of all that they return."""
    if late.petl_made is not None:
        return NotImplemented
    return late if late.dtype == torch.float32 else _Recast.apply(late, late.shape, torch.float32)


def _clone(late: LateLogits, **options: Any) -> LateLogits:
    """DistributedDataParallel clones what a model returns when it looks for unused parameters."""
    if options or late.petl_made is not None:
        return NotImplemented
    return _Recast.apply(late, late.shape, late.dtype)


def _view(late: LateLogits, *shape: Any) -> LateLogits:
    if not late.projection.forward.running or len(shape) != 2 or shape != (-1, late.shape[-1]):
        return NotImplemented
    return _Recast.apply(late, torch.Size((late.shape[:-1].numel(), late.shape[-1])), late.dtype)


def _add(late: LateLogits, bias: Any) -> LateLogits:
    projection = late.projection
    fits = isinstance(bias, Tensor) and bias.shape == (1, late.shape[-1]) and bias.device == late.device
    if not projection.forward.running or projection.bias is not None or not fits:
        return NotImplemented
    return LateLogits.of(projection.with_bias(bias))


def _cross_entropy(
    late: LateLogits,
    labels: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    projection = late.projection
    usual = (size_average, ignore_index, reduce, reduction, label_smoothing) == (None, -100, None, "mean", 0.0)
    if not projection.forward.running or not isinstance(late, LateLogits) or weight is not None or not usual:
        return NotImplemented
    hidden = projection.hidden.view(*labels.shape, -1)
    return projection.forward.cross_entropy(hidden, projection.weight, labels, projection.bias)


_LATE = {
    Tensor.float: _float,
    Tensor.clone: _clone,
    torch.clone: _clone,
    Tensor.view: _view,
    Tensor.add: _add,
    Tensor.__add__: _add,
    F.cross_entropy: _cross_entropy,
}

# Questions about a tensor, and about its place in the graph, that the one without values answers itself.
_ABOUT = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_cpu", "is_meta", "is_sparse")
        + ("is_quantized", "is_nested", "is_mkldnn", "requires_grad", "is_leaf", "grad_fn", "retains_grad", "grad")
        + ("itemsize", "nbytes", "output_nr")
    ),
    Tensor.size,
    Tensor.dim,
    Tensor.ndimension,
    Tensor.numel,
    Tensor.nelement,
    Tensor.stride,
    Tensor.get_device,
    Tensor.element_size,
    Tensor.is_contiguous,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.is_inference,
    Tensor.__len__,
    Tensor.register_hook,
    Tensor.retain_grad,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}
