"""``model(labels=...)`` of a Hugging Face sequence-to-sequence model without logits.

The model's own forward runs, with its rules for decoder inputs and caches. Its output projection gives logits that have
no values yet (``late_logits.py``), and the cross-entropy of those goes to ``ops.linear_cross_entropy``. They are in the
output, where the model puts them, and get values when somebody reads them.

This is for classes whose forward is known to take nothing else of logits and labels than their cross-entropy
(``transformers_names.LOSSES``). Any other computes its own loss in its own way, and ``pk.report`` says so.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl_kernels import ops
from petl_kernels.errors import InputError
from petl_kernels.layers.device_masks import without_waiting
from petl_kernels.layers.hooks import hooked_all, hooks_on
from petl_kernels.layers.loss.late_cache import late_cache, leaves_out_cache, with_cache
from petl_kernels.layers.loss.late_logits import ForwardPass, LateLogits, Projection
from petl_kernels.layers.packed import (
    first_plain_layer,
    has_boundaries,
    obstacle,
    packed_positions,
    plain_positions,
    unpacked,
)
from petl_kernels.layers.rule.prefix import one_pass
from petl_kernels.models.transformers_names import (
    cache_of,
    decoder_inputs,
    forward_owner,
    has_cache_beside_loss,
    knows_loss,
)

_OPTIONS = ("label_smoothing", "reduction", "counted")
_NOT_WHOLE = "after pk.lean a model's loss is not part of compiled graphs: fullgraph=True is not supported"
# A model whose forward pass runs in this thread, and what stands for its output projection.
_heads: ContextVar[tuple[nn.Module | None, LateHead | None]] = ContextVar("petl_heads", default=(None, None))


class LeanLoss:
    """Before the class of a model. ``label_smoothing``, ``reduction`` and ``counted`` may be given beside ``labels``.

    With ``cu_seqlens`` and ``decoder_cu_seqlens`` the inputs are a packed row, as ``packed.pack`` makes it.

    Where the output projection is not a plain linear layer (LoRA on it, say), the loss comes from logits.
    """

    @property
    def lm_head(self) -> nn.Module:
        """The output projection, or what stands for it in a forward pass of this thread."""
        return _head(self)

    @torch.compiler.disable(recursive=False, reason=_NOT_WHOLE)  # what the model calls is compiled
    def forward(self, *args, **kwargs):
        if args:
            kwargs = {**_named(self, args, kwargs), **kwargs}
        with one_pass():
            if has_boundaries(kwargs):
                with unpacked(self, kwargs) as kwargs:
                    return self._forward(kwargs)
            return self._forward(kwargs)

    def _forward(self, kwargs: dict) -> Any:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        options = {name: value for name, value in options.items() if value is not None}
        if kwargs.get("labels") is None:
            if options:
                raise InputError(f"{', '.join(options)}: expected labels beside it")
            return super().forward(**kwargs)
        kwargs = without_waiting(self, kwargs)
        if not leaves_out_cache(self, kwargs):
            return self._loss(kwargs, options)
        output = self._loss({**kwargs, "use_cache": False}, options)
        if getattr(self, "_is_replica", False):  # DataParallel would read the cache
            return output
        again = {**kwargs, "use_cache": True, "return_dict": True}
        return with_cache(output, late_cache(self, lambda: cache_of(self._loss(again, options))))

    def _loss(self, kwargs: dict, options: dict) -> Any:
        if not head_obstacle(self):
            return self._without_logits(kwargs, options)
        return self._from_logits(kwargs, options) if options else super().forward(**kwargs)

    def _without_logits(self, kwargs: dict, options: dict) -> Any:
        forward = ForwardPass(partial(_cross_entropy, self, options, kwargs["labels"].shape))
        before = _heads.set((self, _late_head(self._modules["lm_head"], forward, bool(options))))
        try:
            return super().forward(**kwargs)
        finally:
            _heads.reset(before)
            forward.end()

    def _from_logits(self, kwargs: dict, options: dict) -> Any:
        """Computes the loss from logits, with ``options`` that the model's own loss lacks."""
        labels, as_tuple = kwargs["labels"], kwargs.get("return_dict", self.config.return_dict) is False
        kwargs = {**kwargs, "labels": None, "return_dict": True}
        if kwargs.get("decoder_input_ids") is None and kwargs.get("decoder_inputs_embeds") is None:
            kwargs["decoder_input_ids"] = decoder_inputs(self, labels)
        if not has_cache_beside_loss(self):
            kwargs["use_cache"] = False
        output = super().forward(**kwargs)
        options = {name: value for name, value in options.items() if name != "counted"}
        output = type(output)(**{**output, "loss": loss_of_logits(output.logits, labels, **options)})
        return output.to_tuple() if as_tuple else output

    def __reduce_ex__(self, protocol):
        return _bare, type(self).petl_bases, self.__dict__


class LateHead(nn.Linear):
    """Passes for ``head`` in all but its call, which gives late logits; what is set on it is set on ``head``.

    A head that got a hook or another forward inside of the forward pass is called itself. Raises RuntimeError there
    where the loss has ``options``, which logits of the head's own would lose.
    """

    __slots__ = ("petl_forward", "petl_head", "petl_options")  # its other attributes are the head's

    def __init__(self, head: nn.Linear, forward: ForwardPass, options: bool):
        object.__setattr__(self, "__dict__", head.__dict__)
        for name, value in (("petl_head", head), ("petl_forward", forward), ("petl_options", options)):
            object.__setattr__(self, name, value)

    @property
    def __class__(self) -> type:
        return type(self.petl_head)

    def __eq__(self, other: object) -> bool:
        return other is self.petl_head or (type(other) is LateHead and other.petl_head is self.petl_head)

    def __hash__(self) -> int:
        return hash(self.petl_head)

    def __reduce_ex__(self, protocol):
        return self.petl_head.__reduce_ex__(protocol)

    @torch.compiler.disable
    def __call__(self, *args, **kwargs) -> Tensor:
        obstacle = _head_obstacle(self.petl_head)
        if not obstacle:
            return LateLogits.of(Projection(*args, *kwargs.values(), self.petl_head.weight, self.petl_forward))
        if self.petl_options:
            raise RuntimeError(f"loss with {', '.join(_OPTIONS)}: {obstacle}, since the forward pass has begun")
        return self.petl_head(*args, **kwargs)


@torch.compiler.disable
def _late_head(head: nn.Linear, forward: ForwardPass, options: bool) -> LateHead:
    return LateHead(head, forward, options)


def _cross_entropy(
    model: nn.Module, options: dict, shape: torch.Size, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor
) -> Tensor:
    """The loss of a forward pass; ``labels`` (rows,), and of ``shape`` as the model got them."""
    if hasattr(model, "petl_chunk_bytes"):  # of a plan, or of tier "auto"
        options = {**options, "chunk_bytes": model.petl_chunk_bytes}
    loss = ops.linear_cross_entropy(hidden, weight, labels, bias, **options)
    return loss.view(shape) if options.get("reduction") == "none" else loss


def loss_of_logits(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
    """Cross-entropy of logits (..., words) in fp32 or wider; the formula of ``ops.linear_cross_entropy``."""
    with torch.autocast(logits.device.type, enabled=False):
        wide = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(
            wide.flatten(0, -2),
            labels.to(logits.device).flatten(),
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    return loss.view(labels.shape) if reduction == "none" else loss


@torch.compiler.disable
def _head(model: nn.Module) -> nn.Module:
    running, late = _heads.get()
    head = model._modules["lm_head"]
    return late if running is model and late.petl_head is head else head


def _named(model: nn.Module, args: tuple, kwargs: dict) -> dict:
    """Positional arguments of a forward by their names."""
    names = list(inspect.signature(type(model).forward).bind_partial(model, *args).arguments)[1:]
    for name in names:
        if name in kwargs:
            raise TypeError(f"{type(model).__name__}.forward got multiple values for argument {name!r}")
    return dict(zip(names, args, strict=True))


def lean_loss(model: nn.Module) -> nn.Module:
    """Give the loss without logits to ``model``, or to the models that it wraps, in place, where it is known how."""
    for module in list(model.modules()):
        if not isinstance(module, LeanLoss) and not _class_obstacle(module):
            module.__class__ = _lean_class(type(module))
    packed_positions(model)
    return model


def set_chunk_bytes(model: nn.Module, chunk_bytes: int) -> None:
    """Bound the logits of some rows that the loss holds at a time, in ``model`` and in the models that it wraps."""
    for module in (model, *(module for module in model.modules() if isinstance(module, LeanLoss))):
        module.petl_chunk_bytes = chunk_bytes


def plain_loss(model: nn.Module) -> nn.Module:
    """Undo ``lean_loss``."""
    for module in list(model.modules()):
        if isinstance(module, LeanLoss):
            (module.__class__,) = type(module).petl_bases
    plain_positions(model)
    return model


def packing_obstacle(model: nn.Module) -> str:
    """Why ``model(cu_seqlens=...)`` is refused, with the layer where it is one; empty when packed rows are read."""
    if not isinstance(model, LeanLoss):
        return _class_obstacle(model) or first_plain_layer(model) or "not lean"
    return replaced_forward(model) or obstacle(model) or first_plain_layer(model)


# ---- what has its loss from logits ----------------------------------------------------------------------------------


def loss_states(model: nn.Module) -> list[tuple[nn.Module, bool, str]]:
    """(module, whether its loss is made without logits now, why it is not) of each model with labels in ``model``.

    Empty reasons are those of models that have not been made lean.
    """
    states = []
    for module in model.modules():
        if isinstance(module, LeanLoss):
            reason = replaced_forward(module) or head_obstacle(module)
            states.append((module, not reason, reason))
        elif "lm_head" in module._modules:
            states.append((module, False, _class_obstacle(module)))
    return states


def _class_obstacle(module: nn.Module) -> str:
    if "lm_head" not in module._modules:  # a wrapper may pass on its model's
        return "no lm_head"
    return "" if knows_loss(type(module)) else f"{forward_owner(type(module)).__name__} has a forward of its own"


def replaced_forward(model: nn.Module) -> str:
    """A reason, where ``model`` has a forward of its own that does not lead to its class's."""
    own = vars(model).get("forward")
    if own is None or _leads_to(own, type(model).forward):
        return ""
    return f"forward of the {type(model).__name__} is replaced by {getattr(own, '__qualname__', type(own).__name__)}"


def _leads_to(function: Any, target: Callable) -> bool:
    """Whether ``function`` wraps ``target``, as decorators, bound methods, partial calls and closures do."""
    waiting, seen = [function], set()
    while waiting:
        function = waiting.pop()
        if function is target:
            return True
        if callable(function) and id(function) not in seen:
            seen.add(id(function))
            waiting += [getattr(function, name, None) for name in ("__wrapped__", "__func__", "func")]
            waiting += inspect.getclosurevars(function).nonlocals.values() if inspect.isfunction(function) else ()
    return False


def head_obstacle(model: nn.Module) -> str:
    """Why the loss needs logits; empty when it does not."""
    return _head_obstacle(model._modules["lm_head"])


def _head_obstacle(head: nn.Module) -> str:
    if type(head) is not nn.Linear or head.bias is not None:
        return f"lm_head is a {type(head).__name__}{' with a bias' if type(head) is nn.Linear else ''}"
    if "forward" in vars(head):
        return "the forward of lm_head is replaced"
    if hooks_on(head) or hooked_all():
        return "a hook on lm_head"
    return ""


# ---- classes --------------------------------------------------------------------------------------------------------


@functools.cache
def _lean_class(original: type) -> type:
    # the name stays: save_pretrained writes it into the config
    members = {"__module__": original.__module__, "__qualname__": original.__qualname__, "petl_bases": (original,)}
    cls = type(original.__name__, (LeanLoss, original), members)

    @functools.wraps(original.forward)  # with the signature of the original, which trainers look at
    def forward(self, *args, **kwargs):
        if torch.compiler.is_exporting():
            raise InputError("torch.export of a lean model is not supported: expected pk.lean(model, 0) first")
        return LeanLoss.forward(self, *args, **kwargs)

    cls.forward = forward
    return cls


def _bare(original: type) -> nn.Module:
    cls = _lean_class(original)
    return cls.__new__(cls)
