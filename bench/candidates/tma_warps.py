"""tma.py with warp specialisation, which Triton 3.7 compiles for sm_100 alone: smaller tiles, 4 warps."""

from __future__ import annotations

import torch
from tma import config, make

__all__ = ["lora_linear", "lora_linear_backward", "runs_on"]
_functions = make(flatten=False, specialise=True)
lora_linear, lora_linear_backward = _functions.lora_linear, _functions.lora_linear_backward


def runs_on(x: torch.Tensor) -> bool:
    return config.key(x) in ("sm100", "interpreter")
