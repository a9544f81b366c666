"""Linear layers that compute in fp32 beside products in fp16, as transformers loads T5's last projection.

The outputs of ``wo`` of T5, mT5 and UMT5 leave the range of fp16. Where transformers loads such a model in fp16, it
keeps that weight in fp32 (``_keep_in_fp32_modules``), and the sums behind it are fp32 from then on. Autocast would
compute it in fp16 all the same, so such a layer leaves autocast, with LoRA on it, too. So do bottleneck adapters, which
read those outputs and sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petl_kernels.methods.adapter import BottleneckAdapter
from petl_kernels.methods.lora import LoRALinear
from petl_kernels.models.structure import base_modules
from petl_kernels.models.transformers_names import kept_in_fp32


class WideLinear(nn.Linear):
    """``nn.Linear`` in fp32, also inside autocast; the weight is fp32."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight, self.bias)


class WideLoRALinear(LoRALinear):
    """``LoRALinear`` in fp32, also inside autocast; the weight is fp32, and so are A and B."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


WIDE: dict[type[nn.Module], type[nn.Linear]] = {nn.Linear: WideLinear, LoRALinear: WideLoRALinear}


def widen_linears(model: Any) -> set[Tensor]:
    """Makes those linear layers of ``model`` compute in fp32 that transformers keeps so in fp16; returns their weights.

    The weights are cast by whoever calls this. Bottleneck adapters of such a model compute in the dtype of their input.
    """
    for path, module in list(base_modules(model)):
        if type(module) in WIDE and kept_in_fp32(model, path):
            module.__class__ = WIDE[type(module)]
    found = {module.weight for module in model.modules() if isinstance(module, tuple(WIDE.values()))}
    for module in model.modules() if found else ():
        if isinstance(module, BottleneckAdapter):
            module.wide = True
    return found


def is_widened(model: nn.Module) -> bool:
    """Returns whether ``widen_linears`` has found linear layers in ``model``."""
    return any(type(module) in WIDE.values() for module in model.modules())
