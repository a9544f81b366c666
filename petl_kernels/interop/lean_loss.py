"""``model(labels=...)`` of a Hugging Face sequence-to-sequence model without logits.

The model's own forward runs up to its output projection, whose input goes to ``ops.linear_cross_entropy`` with the
projection's weight and ``final_logits_bias``. The result is the model's own output class; its ``logits`` are computed
when they are asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl_kernels import ops
from petl_kernels.interop.device_masks import without_waiting
from petl_kernels.transformers_names import decoder_inputs

_OPTIONS = ("label_smoothing", "reduction")


class LeanLoss:
    """Before the class of a model. ``label_smoothing``, ``reduction`` and ``counted`` may be given beside ``labels``.

    Where the output projection is not a plain linear layer (LoRA on it, say), the loss comes from logits.
    """

    @torch.compiler.disable(recursive=False)  # what it calls is compiled; the exchange of the projection is not
    def forward(self, *args, **kwargs):
        labels = kwargs.pop("labels", None)
        if labels is None:
            return super().forward(*args, **kwargs)
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        counted = kwargs.pop("counted", None)
        as_tuple = kwargs.pop("return_dict", None) is False
        if kwargs.get("use_cache") is None:
            kwargs["use_cache"] = False
        if kwargs.get("decoder_input_ids") is None and kwargs.get("decoder_inputs_embeds") is None and len(args) < 3:
            kwargs["decoder_input_ids"] = decoder_inputs(self, labels)
        kwargs = without_waiting(self, kwargs)
        if lean_loss_obstacle(self):
            result = super().forward(*args, **kwargs)
            result["loss"] = loss_of_logits(result.logits, labels, **options)
        else:
            with _captured(self.lm_head) as captured:
                output = super().forward(*args, **kwargs)
            (hidden,) = captured
            bias = getattr(self, "final_logits_bias", None)
            if hasattr(self, "petl_chunk_bytes"):  # of a plan, or of tier "auto"
                options["chunk_bytes"] = self.petl_chunk_bytes
            options["counted"] = counted
            loss = ops.linear_cross_entropy(hidden, self.lm_head.weight, labels.to(hidden.device), bias, **options)
            result = _output_class(type(output))(**{**output, "loss": loss, "logits": None})
            result.__dict__["petl_logits"] = functools.partial(_logits, self, hidden)
        return result.to_tuple() if as_tuple else result

    def __reduce_ex__(self, protocol):
        return _bare, type(self).petl_bases, self.__dict__


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


def lean_loss(model: nn.Module) -> nn.Module:
    """Give ``model`` the loss without logits, in place; a model without an output projection is left as it is."""
    if getattr(model, "lm_head", None) is not None and not isinstance(model, LeanLoss):
        model.__class__ = _lean_class(type(model))
    return model


def plain_loss(model: nn.Module) -> nn.Module:
    """Undo ``lean_loss``."""
    if isinstance(model, LeanLoss):
        (model.__class__,) = type(model).petl_bases
    return model


def lean_loss_obstacle(model: nn.Module) -> str:
    """Why the loss needs logits; empty when it does not."""
    head = getattr(model, "lm_head", None)
    if head is None:
        return "no lm_head"
    if type(head) is not nn.Linear or head.bias is not None:
        return f"lm_head is a {type(head).__name__}{' with a bias' if type(head) is nn.Linear else ''}"
    if head._forward_hooks or head._forward_pre_hooks:
        return "a hook on lm_head"
    return ""


@contextmanager
def _captured(head: nn.Linear) -> Iterator[list[Tensor]]:
    """Inside, ``head`` hands its input over and gives logits of no rows."""
    captured: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        captured.append(x)
        return x.new_empty(0, 1)

    head.forward = forward
    try:
        yield captured
    finally:
        del head.forward


def _logits(model: nn.Module, hidden: Tensor) -> Tensor:
    logits = model.lm_head(hidden)
    bias = getattr(model, "final_logits_bias", None)
    return logits if bias is None else logits + bias.to(logits.device)


@functools.cache
def _lean_class(original: type) -> type:
    # the name stays: save_pretrained writes it into the config
    members = {"__module__": original.__module__, "__qualname__": original.__qualname__, "petl_bases": (original,)}
    cls = type(original.__name__, (LeanLoss, original), members)
    forward = functools.wraps(original.forward)(lambda self, *args, **kwargs: LeanLoss.forward(self, *args, **kwargs))
    cls.forward = forward  # with the signature of the original, which trainers look at
    return cls


def _bare(original: type) -> nn.Module:
    cls = _lean_class(original)
    return cls.__new__(cls)


@functools.cache
def _output_class(original: type) -> type:
    """``original`` with logits that are computed when somebody asks."""

    def get(self, name: str):
        value = original.__getattribute__(self, name)
        if name != "logits" or value is not None:
            return value
        make = original.__getattribute__(self, "__dict__").get("petl_logits")
        if make is not None:
            self["logits"] = value = make()
        return value

    def get_item(self, key):
        if key == "logits":
            return self.logits
        return original.__getitem__(self, key)

    members = {"__getattribute__": get, "__getitem__": get_item, "__module__": original.__module__}
    return type(original.__name__, (original,), members)
