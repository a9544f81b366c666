"""LayerNorm tuning (arXiv 2312.11420): weights and biases of the LayerNorms (RMSNorms: weights) are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from petl_kernels.errors import InputError
from petl_kernels.methods.base import Method
from petl_kernels.models.structure import find_targets, norms


@dataclass(frozen=True)
class LayerNormTuning(Method):
    """targets: names of the norms, or a regular expression for whole paths; None is every norm."""

    targets: tuple[str, ...] | str | None = None

    method: ClassVar[str] = "ln"

    def base_tensors(self, model: nn.Module) -> list[str]:
        every = norms(model)
        if not every:
            raise InputError(f"ln: {type(model).__name__} has no LayerNorm")
        kinds = tuple({type(model.get_submodule(path)) for path in every})
        paths = every if self.targets is None else find_targets(model, self.targets, kinds, "ln")
        return [name for path in paths for name, _ in model.get_submodule(path).named_parameters(path, recurse=False)]

    def count(self, model: nn.Module) -> int:
        return sum(model.get_parameter(name).numel() for name in self.base_tensors(model))
