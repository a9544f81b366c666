"""LayerNorm tuning (arXiv 2312.11420): weights and biases of the LayerNorms (RMSNorms: weights) are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from petl_kernels.errors import InputError
from petl_kernels.methods.base import Method, setting
from petl_kernels.methods.targets import find_targets
from petl_kernels.models.structure import norms


@dataclass(frozen=True)
class LayerNormTuning(Method):
    """Training of norms. targets: their names, or a regular expression for whole paths; None is every norm."""

    targets: tuple[str, ...] | str | None = setting(
        None, "names of modules, or a regular expression for paths; null: those above"
    )

    method: ClassVar[str] = "ln"
    trains: ClassVar[str] = "weights and biases of the norms"
    learning_rate: ClassVar[float] = 1e-3
    peft_type: ClassVar[str] = "LN_TUNING"

    def base_tensors(self, model: nn.Module) -> list[str]:
        every = norms(model)
        if not every:
            raise InputError(f"ln: {type(model).__name__} has no LayerNorm")
        kinds = tuple({type(model.get_submodule(path)) for path in every})
        paths = every if self.targets is None else find_targets(model, self.targets, kinds, "ln")
        return [name for path in paths for name, _ in model.get_submodule(path).named_parameters(path, recurse=False)]

    def computes(self, model: nn.Module) -> dict[str, object]:
        return {"method": self.label}
