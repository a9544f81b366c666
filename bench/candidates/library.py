"""The library's products, to whose results the rank parts are added by skinny products of the library's.

    y_g = x W_gᵀ + c_g,  y_g += scale_g s_g B_gᵀ          dx = Σ dy_g W_g,  dx += ds A

What the fused products save, a read and a write of y and of dx, is paid again; what they lose, a fifth of the library's
speed in the large products, is not. y and dx are rounded twice. s, ds, dA and dB are the shipped launches.
"""

from __future__ import annotations

import torch
from frame import pair, shipped


def _outputs(ys, s, x, weights, biases, a, b, scales) -> None:
    shipped._project(s, x, a, 0.0, None)
    factors = s.split([m.shape[1] for m in b], 1)
    for y, s_g, weight, bias, b_g, scale in zip(ys, factors, weights, biases, b, scales, strict=True):
        if bias is None:
            torch.mm(x, weight.t(), out=y)
        else:
            torch.addmm(bias, x, weight.t(), out=y)
        y.addmm_(s_g, b_g.to(s.dtype).t(), alpha=scale)


def _gradients(dx, da, db, dbias, dys, x, s, weights, a, b, scales) -> None:
    ds = shipped._rank_gradients(dys, b, scales, s)
    torch.mm(dys[0], weights[0], out=dx)
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        dx.addmm_(dy, weight)
    dx.addmm_(ds, torch.cat(a).to(ds.dtype))
    shipped._adapter_gradients(da, db, dbias, dys, x, s, ds, scales, 0.0, None)


_functions = pair(_outputs, _gradients)
lora_linear, lora_linear_backward = _functions.lora_linear, _functions.lora_linear_backward
