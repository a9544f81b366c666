"""Cross-attention tuning (arXiv 2104.08771).

It trains q, k, v and the output projection of the decoder's attention to the source, with its LayerNorm (before it, in
post-norm models after it); everything else is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from petl_kernels.errors import InputError
from petl_kernels.methods.base import Method
from petl_kernels.models.structure import describe


@dataclass(frozen=True)
class CrossAttention(Method):
    method: ClassVar[str] = "cross-attention"
    trains: ClassVar[str] = "the decoder's cross-attentions, whole, with their norms"
    learning_rate: ClassVar[float] = 1e-4

    def base_tensors(self, model: nn.Module) -> list[str]:
        modules = [
            path
            for attention in describe(model).attentions
            if attention.kind == "cross"
            for path in (*attention.linears, attention.norm)
        ]
        if not modules:  # T5Gemma 2 has one attention over both sides
            name = type(model).__name__
            raise InputError(f"cross-attention: {name} has none that stands alone; expected another method")
        return [
            f"{path}.{name}"
            for path in modules
            for name in ("weight", "bias")
            if getattr(model.get_submodule(path), name, None) is not None
        ]
