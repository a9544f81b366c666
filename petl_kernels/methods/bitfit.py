"""BitFit (arXiv 2106.10199): only biases are trained, LayerNorms' among them; with ``layer_norm`` their weights too.

The second form is the study's (arXiv 2205.11277), which finds it better. T5 has no biases: its linears get them, from
zero, in the base's dtype, and its RMSNorms, which have weights only, get none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from petl_kernels.errors import InputError
from petl_kernels.methods.base import Method, setting
from petl_kernels.methods.owner import find_record
from petl_kernels.models.structure import base_parameters, describe, norms


@dataclass(frozen=True)
class BitFit(Method):
    """Training of biases alone. layer_norm: the LayerNorms' weights are trained as well."""

    layer_norm: bool = setting(True, "the norms' weights are trained, too")

    method: ClassVar[str] = "bitfit"
    trains: ClassVar[str] = "all biases, and the weights of the norms"
    learning_rate: ClassVar[float] = 1e-3
    variants: ClassVar[dict] = {"bitfit-biases": ({"layer_norm": False}, "all biases")}

    def base_tensors(self, model: nn.Module) -> list[str]:
        weights = {f"{path}.weight" for path in norms(model)} if self.layer_norm else set()
        names = [name for name in base_parameters(model) if name.endswith("bias") or name in weights]
        if not names and not self.added_tensors(model):
            raise InputError(f"bitfit: {type(model).__name__} has no biases")
        return names

    def added_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        plain = base_parameters(model)
        weights = {f"{path}.bias": model.get_parameter(f"{path}.weight") for path in _layer_linears(model)}
        return {
            name: torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
            for name, weight in weights.items()
            if name not in plain
        }

    def count(self, model: nn.Module) -> int:
        return super().count(model) + sum(bias.numel() for bias in self.added_tensors(model).values())

    def merged_weights(self, model: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
        if find_record(model, name).added:
            raise InputError(f"adapter {name!r}: {type(model).__name__} has no biases that could hold BitFit's")
        return iter(())


def _layer_linears(model: nn.Module) -> tuple[str, ...]:
    """Returns the paths of the linears that BitFit gives biases; none in models of other kinds."""
    try:
        return describe(model).linears
    except InputError:
        return ()
