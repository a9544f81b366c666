"""bottleneck_adapter in Triton: y = res + scale (act(LN(x) Dᵀ + d) Uᵀ + u), and all its gradients.

Up to config.ADAPTER_FUSED hidden units one launch has the whole of a block of rows (bottleneck_adapter_fused.py); with
more the library multiplies (bottleneck_adapter_by_products.py).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from petl_kernels.backends.triton import bottleneck_adapter_by_products as by_products
from petl_kernels.backends.triton import bottleneck_adapter_fused as fused
from petl_kernels.backends.triton import config
from petl_kernels.backends.triton.common import as_rows
from petl_kernels.backends.triton.registry import serves


@serves
def bottleneck_adapter(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    ln_weight: torch.Tensor | None,
    ln_bias: torch.Tensor | None,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    up: torch.Tensor,
    up_bias: torch.Tensor | None,
    eps: float,
    activation: str,
    scale: float,
) -> torch.Tensor:
    rows = as_rows(x)
    res = rows if residual is None else as_rows(residual)
    if not rows.shape[0]:
        return x.new_empty(x.shape)
    forward = fused.forward if config.adapter_is_fused(x, down.shape[0]) else by_products.forward
    padded = _padded(down, down_bias, up)
    return forward(rows, res, ln_weight, ln_bias, *padded, up_bias, eps, activation, scale).view(x.shape)


@serves
def bottleneck_adapter_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    residual_is_x: bool,
    ln_weight: torch.Tensor | None,
    ln_bias: torch.Tensor | None,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    up: torch.Tensor,
    eps: float,
    activation: str,
    scale: float,
    need_dx: bool,
    has_up_bias: bool,
) -> tuple[torch.Tensor, ...]:
    rows, dys = as_rows(x), as_rows(dy)
    m, d = down.shape
    if rows.shape[0]:
        backward = fused.backward if config.adapter_is_fused(x, m) else by_products.backward
        options = eps, activation, scale, need_dx, has_up_bias
        dx, dln_weight, dln_bias, ddown, ddown_bias, dup, dup_bias = backward(
            dys, rows, residual_is_x, ln_weight, ln_bias, *_padded(down, down_bias, up), *options
        )
        ddown, ddown_bias, dup = ddown[:m], ddown_bias[:m], dup[:, :m].contiguous()
    else:
        dx = rows
        dln_weight, dln_bias, ddown, ddown_bias, dup, dup_bias = (
            x.new_zeros(size, dtype=torch.float32) for size in (d, d, (m, d), m, (d, m), d)
        )
    found = (dln_weight, dln_bias, ddown, ddown_bias, dup)
    parameters = (ln_weight, ln_bias, down, down_bias, up)
    absent = x.new_empty(0)
    grads = (absent if p is None else grad.to(p.dtype) for p, grad in zip(parameters, found, strict=True))
    return dx.view(x.shape) if need_dx else absent, *grads, dup_bias if has_up_bias else absent


def _padded(down, down_bias, up) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Returns D, d and U with a bottleneck that 16 divides: zeros add nothing, and loads stay 16 bytes wide."""
    if odd := -down.shape[0] % 16:
        down, up = F.pad(down, (0, 0, 0, odd)), F.pad(up, (0, odd))
        down_bias = None if down_bias is None else F.pad(down_bias, (0, odd))
    return down.contiguous(), down_bias, up.contiguous()
