"""Fine-tuning methods, one file each. ``METHODS`` names them as ``--method`` does."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from torch import nn

from petl_kernels.errors import InputError
from petl_kernels.methods.adapter import Adapter
from petl_kernels.methods.base import Method, adapter_state, load_adapter_state
from petl_kernels.methods.bitfit import BitFit
from petl_kernels.methods.budget import budget_parameters, parse_budget
from petl_kernels.methods.cross_attention import CrossAttention
from petl_kernels.methods.full import FullFineTuning
from petl_kernels.methods.ia3 import IA3
from petl_kernels.methods.ln_tuning import LayerNormTuning
from petl_kernels.methods.lora import LoRA
from petl_kernels.methods.prefix import PrefixTuning
from petl_kernels.models.structure import describe, total_parameters


@dataclass(frozen=True)
class Variant:
    """A method with some settings made: ``variant(bottleneck=64)`` or ``variant.for_budget(model, "10%")``."""

    config: type[Method]
    settings: dict[str, Any]

    def __call__(self, **fields) -> Method:
        return self.config.from_fields({**self.settings, **fields})

    def for_budget(self, model: nn.Module, budget: float | int | str, **fixed) -> Method:
        self(**fixed)  # names unknown settings
        return self.config.for_budget(model, budget, **{**self.settings, **fixed})


METHODS: dict[str, Variant] = {
    "full": Variant(FullFineTuning, {}),
    "adapter": Variant(Adapter, {}),
    "adapter-sublayer": Variant(Adapter, {"placement": "sublayer"}),
    "pfeiffer": Variant(Adapter, {"pfeiffer": True}),
    "parallel": Variant(Adapter, {"parallel": True}),
    "lora": Variant(LoRA, {}),
    "bitfit": Variant(BitFit, {}),
    "bitfit-biases": Variant(BitFit, {"layer_norm": False}),
    "cross-attention": Variant(CrossAttention, {}),
    "prefix": Variant(PrefixTuning, {}),
    "ia3": Variant(IA3, {}),
    "ln": Variant(LayerNormTuning, {}),
}


def from_dict(settings: dict[str, Any]) -> Method:
    """The config that ``to_dict`` wrote. Raises InputError for an unknown method or setting."""
    fields = dict(settings)
    name = fields.pop("method", None)
    classes = {variant.config.method: variant.config for variant in METHODS.values()}
    if name not in classes:
        near = difflib.get_close_matches(str(name), classes, n=3) or sorted(classes)
        raise InputError(f"method {name!r}: unknown, expected {', '.join(near)}")
    return classes[name].from_fields(fields)


__all__ = [
    "IA3",
    "METHODS",
    "Adapter",
    "BitFit",
    "CrossAttention",
    "FullFineTuning",
    "LayerNormTuning",
    "LoRA",
    "Method",
    "PrefixTuning",
    "Variant",
    "adapter_state",
    "budget_parameters",
    "describe",
    "from_dict",
    "load_adapter_state",
    "parse_budget",
    "total_parameters",
]
