"""tma.py with one loop over tiles and steps: a tile's first copies start under the epilogue of the one before."""

from __future__ import annotations

from tma import make, runs_on

__all__ = ["lora_linear", "lora_linear_backward", "runs_on"]
_functions = make(flatten=True, specialise=False)
lora_linear, lora_linear_backward = _functions.lora_linear, _functions.lora_linear_backward
