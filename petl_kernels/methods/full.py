"""Full fine-tuning: every parameter of the model is trained, tied ones once.

Position tables computed from sines (Marian holds them as parameters) stay as they are. The values from before are kept
in host memory, so ``use_adapter(model, None)`` brings them back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from petl_kernels.methods.base import Method
from petl_kernels.models.structure import base_modules, base_parameters


@dataclass(frozen=True)
class FullFineTuning(Method):
    method: ClassVar[str] = "full"
    trains: ClassVar[str] = "every tensor of the model"
    learning_rate: ClassVar[float] = 3e-5

    def base_tensors(self, model: nn.Module) -> list[str]:
        fixed = {path for path, module in base_modules(model) if "Sinusoidal" in type(module).__name__}
        return [name for name in base_parameters(model) if name.rpartition(".")[0] not in fixed]
