"""rms_norm in Triton: the kernels of layer_norm without a mean."""

from __future__ import annotations

import torch

from petl_kernels.backends.triton.layer_norm import norm, norm_again, norm_backward
from petl_kernels.backends.triton.registry import serves, serves_with_room


@serves_with_room
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, room: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return norm(x, None, rstd, weight, None, eps, room), rstd


@serves_with_room
def rms_norm_from_statistics(x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, room: int = 0) -> torch.Tensor:
    return norm_again(x, None, rstd, weight, None, room)


@serves
def rms_norm_backward(dy, x, rstd, weight, need_dx, need_dweight) -> tuple[torch.Tensor, torch.Tensor]:
    dx, _, dweight, *_ = norm_backward(dy, x, None, rstd, weight, need_dx, need_dweight)
    return dx, dweight
