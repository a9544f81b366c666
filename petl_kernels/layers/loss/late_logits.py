"""Logits that are computed when they are read.

``LateLogits`` is a tensor with a shape, a dtype, a device and a place in the autograd graph, and without values. An
output projection returns it in the place of its product. Code that reads it, in Python or in C++, gets the product,
computed at that time from the tensors of the forward pass. So it can be in a model's output, and be indexed, iterated,
gathered, copied and converted there. It takes no memory until it is read.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from petl_kernels.layers.loss.projection import Projection
from petl_kernels.layers.uncompiled import uncompiled


class LateLogits(Tensor):
    """Logits without values. Those of ``projection``, cast to the dtype and viewed in the shape, become the values."""

    projection: Projection
    petl_made: Tensor | None = None

    @staticmethod
    @uncompiled
    def of(projection: Projection) -> LateLogits:
        return _Project.apply(projection, projection.hidden, projection.weight, projection.bias)

    def made(self) -> Tensor:
        """Returns the logits as a plain tensor, each time the same, with gradients where they were recorded."""
        made = self.petl_made
        if made is None:
            with torch.inference_mode(self.projection.inference), torch.set_grad_enabled(self.requires_grad):
                self.petl_made = made = _Made.apply(self)
        return made

    def values(self) -> Tensor:
        """Returns a new tensor of the logits, outside of the graph."""
        with torch.no_grad():
            logits = self.projection.logits().to(self.dtype)
        return logits if logits.shape == self.shape else logits.view(self.shape)

    __hash__ = object.__hash__

    @classmethod
    @uncompiled
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
    @uncompiled
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """Serves callers of operators below Python's functions, and below autograd."""
        args, kwargs = tree_map_only(LateLogits, _unrecorded, (args, kwargs or {}))
        return function(*args, **kwargs)


def _unrecorded(late: LateLogits) -> Tensor:
    return late.made().detach()


def _without_values(projection: Projection, shape: torch.Size, dtype: torch.dtype) -> LateLogits:
    late = Tensor._make_wrapper_subclass(LateLogits, shape, dtype=dtype, device=projection.hidden.device)
    late.projection = projection
    return late


class _Project(torch.autograd.Function):
    """The projection's place in the graph. A backward pass through it is rare, and computes the logits again."""

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
    """The node that gives logits their values."""

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


# ---- functions that need no values ----------------------------------------------------------------------------------


def _float(late: LateLogits) -> LateLogits:
    """Returns fp32 logits: mixed precision wraps models in a conversion of all that they return."""
    if late.petl_made is not None:
        return NotImplemented
    return late if late.dtype == torch.float32 else _Recast.apply(late, late.shape, torch.float32)


def _clone(late: LateLogits, **options: Any) -> LateLogits:
    """Returns a clone: DistributedDataParallel clones outputs when it searches for unused parameters."""
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
    if not _grows(late) or projection.bias is not None or projection.steps or not fits:
        return NotImplemented
    return LateLogits.of(projection.with_bias(bias))


def _grows(late: LateLogits) -> bool:
    """Returns whether something can be done to the logits before they have values: as the projection gave them."""
    projection = late.projection
    as_given = late.shape == projection.shape and late.dtype == projection.dtype
    return projection.forward.running and late.petl_made is None and as_given


def _divide(late: Any, number: Any) -> LateLogits:
    return _with_step(late, "divide", number)


def _tanh(late: LateLogits) -> LateLogits:
    return _with_step(late, "tanh", 1.0)


def _multiply(late: Any, number: Any) -> LateLogits:
    return _with_step(late, "multiply", number)


def _with_step(late: Any, name: str, number: Any) -> LateLogits:
    if not isinstance(late, LateLogits) or not isinstance(number, (int, float)) or not _grows(late):
        return NotImplemented
    return LateLogits.of(late.projection.with_step(name, float(number)))


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
    usual = (size_average, ignore_index, reduce, label_smoothing) == (None, -100, None, 0.0)
    cross_entropy, softcap = projection.forward.cross_entropy, projection.softcap
    if cross_entropy is None or softcap is None or not isinstance(late, LateLogits) or weight is not None or not usual:
        return NotImplemented
    if reduction not in ("mean", "sum") or (softcap and projection.bias is not None):  # the op caps before a bias
        return NotImplemented
    hidden = projection.hidden.view(*labels.shape, -1)
    loss = cross_entropy(hidden, projection.weight, labels, projection.bias, softcap, reduction)
    return loss.float() if (late.dtype, loss.dtype) == (torch.float32, torch.float64) else loss  # as the model has it


_LATE = {
    Tensor.float: _float,
    Tensor.clone: _clone,
    torch.clone: _clone,
    Tensor.view: _view,
    Tensor.add: _add,
    Tensor.__add__: _add,
    Tensor.__truediv__: _divide,
    Tensor.div: _divide,
    torch.tanh: _tanh,
    Tensor.tanh: _tanh,
    Tensor.__mul__: _multiply,
    Tensor.mul: _multiply,
    F.cross_entropy: _cross_entropy,
}

# Properties of a tensor, and of its place in the graph, that do not depend on its values.
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
