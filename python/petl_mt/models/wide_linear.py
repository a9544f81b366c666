"""Linear layers that compute in fp32 beside products in fp16, as transformers loads T5's last projection.

The outputs of ``wo`` of T5 and mT5 leave the range of fp16. Where transformers loads a model in fp16, it keeps that
weight in fp32 (``_keep_in_fp32_modules``), and the sums behind it are fp32 from then on. Autocast would compute it in
fp16 all the same, so such a layer leaves autocast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class WideLinear(nn.Linear):
    """``nn.Linear`` in fp32, also inside autocast; the weight is fp32."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight, self.bias)


def widen_linears(model: Any) -> None:
    """Makes those linear layers of ``model`` compute in fp32 that transformers keeps so; others, and LoRA, stay."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for path, module in model.named_modules():
        if type(module) is nn.Linear and kept.intersection(path.split(".")):
            module.__class__ = WideLinear
