"""``model(labels=...)`` of a Hugging Face sequence-to-sequence model without logits.

The model's own forward runs, with its rules for decoder inputs and caches. Its output projection returns logits without
values (``late_logits.py``), and ``ops.linear_cross_entropy`` computes their cross-entropy. They are in the output,
where the model puts them, and get values when they are read.

So it is for classes whose forward computes nothing else from logits and labels than their cross-entropy
(``transformers_names.LOSSES``). A model of any other class keeps its own loss, and ``pk.report`` has the reason.
"""

from __future__ import annotations

import functools
import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl_kernels import ops
from petl_kernels.errors import InputError
from petl_kernels.layers.device_masks import without_waiting
from petl_kernels.layers.loss.late_cache import late_cache, leaves_out_cache, with_cache
from petl_kernels.layers.loss.late_head import OPTIONS, head_of, heads, late_head
from petl_kernels.layers.loss.obstacles import class_obstacle, head_obstacle, replaced_forward
from petl_kernels.layers.loss.projection import ForwardPass
from petl_kernels.layers.mixed_in import Mixin, mixed, original_class
from petl_kernels.layers.packed_model import first_plain_layer, has_boundaries, packed_obstacle, unpacked
from petl_kernels.layers.packed_positions import packed_positions, plain_positions
from petl_kernels.layers.rule.prefix import one_pass
from petl_kernels.models.transformers_names import (
    adds_losses,
    cache_of,
    decoder_inputs,
    has_cache_beside_loss,
    own_loss_function,
)

_NOT_WHOLE = "after pk.lean a model's loss is not part of compiled graphs: fullgraph=True is not supported"


class LeanLoss(Mixin):
    """Mixed in before the class of a model.

    Beside ``labels`` a call takes ``label_smoothing``, ``reduction`` and ``counted``, those of
    ``ops.linear_cross_entropy``. With ``cu_seqlens`` and ``decoder_cu_seqlens`` its inputs are a packed row
    (``packed.pack``). Where the output projection is not a plain linear layer, but has LoRA, say, the loss is computed
    from logits.
    """

    if TYPE_CHECKING:  # transformers reads annotations of this name from the class
        config: Any

    @property
    def lm_head(self) -> nn.Module | None:
        """The output projection, or what stands for it in a forward pass of this thread."""
        return head_of(self)

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
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        options = {name: value for name, value in options.items() if value is not None}
        if kwargs.get("labels") is None:
            if options:
                raise InputError(f"{', '.join(options)}: expected labels beside it")
            return super().forward(**kwargs)
        if options and adds_losses(self, kwargs):
            raise InputError(
                f"{', '.join(options)}: beside output_router_logits, whose losses are added to a mean over tokens; "
                "expected output_router_logits=False"
            )
        if "reduction" in options and kwargs.get("num_items_in_batch") is not None:
            raise InputError("reduction: beside num_items_in_batch, which divides a sum; expected one of the two")
        kwargs = without_waiting(self, kwargs)
        if not leaves_out_cache(self, kwargs):
            return self._loss(kwargs, options)
        output = self._loss({**kwargs, "use_cache": False}, options)
        if getattr(self, "_is_replica", False):  # DataParallel would read the cache
            return output
        cached = {**kwargs, "use_cache": True, "return_dict": True}
        return with_cache(output, late_cache(self, lambda: cache_of(self._loss(cached, options))))

    def _loss(self, kwargs: dict, options: dict) -> Any:
        replaced = bool(options) and own_loss_function(self)  # it would not heed them
        if not head_obstacle(self._modules["lm_head"]) and not replaced:
            return self._without_logits(kwargs, options)
        return self._from_logits(kwargs, options) if options else super().forward(**kwargs)

    def _without_logits(self, kwargs: dict, options: dict) -> Any:
        forward = ForwardPass(partial(_cross_entropy, self, options, kwargs["labels"].shape))
        head: Any = self._modules["lm_head"]
        before = heads.set((self, late_head(head, forward, bool(options))))
        try:
            return super().forward(**kwargs)
        finally:
            heads.reset(before)
            forward.end()

    def _from_logits(self, kwargs: dict, options: dict) -> Any:
        """Returns the model's output with a loss from logits that has ``options``, which the model's own loss lacks."""
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
        return _bare, (original_class(type(self)),), self.__dict__


def _cross_entropy(
    model: nn.Module,
    options: dict,
    shape: torch.Size,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float,
    reduction: str,
) -> Tensor:
    """Returns the loss of a forward pass. labels: (tokens,); shape: that of the labels that the model got."""
    options = {"reduction": reduction, **options}
    if hasattr(model, "petl_chunk_bytes"):  # of a plan, or of tier "auto"
        options = {**options, "chunk_bytes": model.petl_chunk_bytes}
    loss = ops.linear_cross_entropy(hidden, weight, labels, bias, softcap=softcap, **options)
    return loss.view(shape) if options.get("reduction") == "none" else loss


def loss_of_logits(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
    """Returns the cross-entropy of logits (..., words) in fp32 or wider, as ``ops.linear_cross_entropy`` has it."""
    with torch.autocast(logits.device.type, enabled=False):
        wide = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(
            wide.flatten(0, -2),
            labels.to(logits.device).flatten(),
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    return loss.view(labels.shape) if reduction == "none" else loss


def _named(model: nn.Module, args: tuple, kwargs: dict) -> dict:
    """Returns positional arguments of a forward by their names. Raises TypeError for one that is given twice."""
    names = list(inspect.signature(type(model).forward).bind_partial(model, *args).arguments)[1:]
    for name in names:
        if name in kwargs:
            raise TypeError(f"{type(model).__name__}.forward got multiple values for argument {name!r}")
    return dict(zip(names, args, strict=True))


def lean_loss(model: nn.Module) -> nn.Module:
    """Gives the loss without logits to ``model`` and the models that it wraps, in place; others stay as they are."""
    for module in list(model.modules()):
        if not isinstance(module, LeanLoss) and not class_obstacle(module):
            module.__class__ = _lean_class(type(module))
    packed_positions(model)
    return model


def set_chunk_bytes(model: Any, chunk_bytes: int) -> None:
    """Bounds the bytes of logits that the loss holds at a time, of ``model`` and of the models that it wraps."""
    lean: list[Any] = [module for module in model.modules() if isinstance(module, LeanLoss)]
    for module in (model, *lean):
        module.petl_chunk_bytes = chunk_bytes


def plain_loss(model: nn.Module) -> nn.Module:
    """Undoes ``lean_loss``."""
    for module in list(model.modules()):
        if isinstance(module, LeanLoss):
            module.__class__ = original_class(type(module))
    plain_positions(model)
    return model


def packing_obstacle(model: nn.Module) -> str:
    """Returns why ``model(cu_seqlens=...)`` is refused, with the path of a layer that does; "" where it is not."""
    if not isinstance(model, LeanLoss):
        return class_obstacle(model) or first_plain_layer(model) or "not lean"
    return replaced_forward(model) or packed_obstacle(model) or first_plain_layer(model)


def loss_states(model: nn.Module) -> list[tuple[nn.Module, bool, str]]:
    """Returns (module, whether its loss is computed without logits, why not) for each model with labels in ``model``.

    The reason is "" for a model that could be lean and is not.
    """
    states = []
    for module in model.modules():
        if isinstance(module, LeanLoss):
            reason = replaced_forward(module) or head_obstacle(module._modules["lm_head"])
            states.append((module, not reason, reason))
        elif "lm_head" in module._modules:
            states.append((module, False, class_obstacle(module)))
    return states


@functools.cache
def _lean_class(original: type[Any]) -> type[Any]:
    cls = mixed(LeanLoss, original)

    @functools.wraps(original.forward)  # with the signature of the original, which trainers look at
    def forward(self, *args, **kwargs):
        if torch.compiler.is_exporting():
            raise InputError("torch.export of a lean model is not supported: expected pk.lean(model, 0) first")
        return LeanLoss.forward(self, *args, **kwargs)

    cls.forward = forward
    return cls


def _bare(original: type) -> nn.Module:
    cls: Any = _lean_class(original)
    return cls.__new__(cls)
