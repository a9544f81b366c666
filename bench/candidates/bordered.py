"""A bordered weight: the rank parts ride in the library's products over K + R and N + R.

For G linears with outputs N_g and ranks r_g, N = Σ N_g, R = Σ r_g, one buffer

    [[W_1, scale_1 B_1,     0    ],
     [W_2,     0,    scale_2 B_2 ],          (N + R) x (K + R)
     [A_1,     0,           0    ],
     [A_2,     0,           0    ]]

    [x, s]           (tokens, K + R):  y  = [x, s] border[:N]ᵀ + c        one product over K + R
    [dy_1, dy_2, ds] (tokens, N + R):  dx = [dy, ds] border[:, :K]        one product over N + R

Only s, ds, dA and dB are Triton's. Who writes x (the norm before) has to give its rows K + R columns; who writes dy
(the attention's backward) rows of N + R, shared by q, k and v; y comes as column slices of (tokens, N). R has to be a
multiple of 8, or the library's 16-byte loads are lost. The adapters in the border are a copy in x's dtype, 4·R·d bytes
that the optimiser's step writes again; merging is border[:N, :K] += border[:N, K:] border[N:, :K]. scale_g is rounded
into B_g, exactly where it is a power of two. No dropout: dx's mask falls on the rank part alone.
"""

from __future__ import annotations

import torch

from bench.candidates.frame import shipped
from petl_kernels.backends.triton import common


def border_of(weights, a, b, scales) -> torch.Tensor:
    dtype = weights[0].dtype
    scaled = [scale * m.float() for scale, m in zip(scales, b, strict=True)]
    top = torch.cat([torch.cat(list(weights)), torch.block_diag(*scaled).to(dtype)], 1)
    ranks = sum(m.shape[0] for m in a)
    bottom = torch.cat([torch.cat(list(a)).to(dtype), top.new_zeros(ranks, ranks)], 1)
    return torch.cat([top, bottom])


class Bordered:
    """The pair for one set of weights and one number of tokens; the wide buffers are the caller's in a real model."""

    def __init__(self, x, dys, weights, biases, a, b, scales):
        self.inner, self.outer = x.shape[-1], sum(m.shape[0] for m in b)
        rows, ranks = x.numel() // self.inner, sum(m.shape[0] for m in a)
        self.border = border_of(weights, a, b, scales)
        sizes = [m.shape[0] for m in b]
        some = any(c is not None for c in biases)
        zero = [x.new_zeros(n) for n in sizes]
        parts = [n if c is None else c for c, n in zip(biases, zero, strict=True)]
        self.bias = torch.cat(parts) if some else None
        self.wide_x, self.wide_dy = x.new_empty(rows, self.inner + ranks), x.new_empty(rows, self.outer + ranks)
        # The norm and the attention would have written these.
        self.wide_x[:, : self.inner] = common.as_rows(x)
        self.wide_dy[:, : self.outer] = torch.cat([common.as_rows(dy) for dy in dys], 1)
        self.sizes = sizes

    def lora_linear(self, x, weights, biases, a, b, scales, dropout, seed):
        assert dropout == 0
        s = self.wide_x[:, self.inner :]
        shipped._project(s, self.wide_x[:, : self.inner], shipped._same_dtype(a), 0.0, None)
        right = self.border[: self.outer].t()
        y = self.wide_x @ right if self.bias is None else torch.addmm(self.bias, self.wide_x, right)
        return [part.view(*x.shape[:-1], -1) for part in y.split(self.sizes, 1)], s

    def lora_linear_backward(self, dys, x, s, weights, a, b, scales, dropout, seed, need_dx, need_dbias):
        assert dropout == 0 and need_dx
        dys, ds = self.wide_dy[:, : self.outer].split(self.sizes, 1), self.wide_dy[:, self.outer :]
        narrow_ds = shipped._rank_gradients(list(dys), shipped._same_dtype(b), scales, s)
        # The shipped kernels take a ds whose rows are Σ r_g long; one of its own would write there and not copy.
        ds.copy_(narrow_ds)
        dx = self.wide_dy @ self.border[:, : self.inner]
        da, db = [torch.empty_like(m) for m in a], [torch.empty_like(m) for m in b]
        sizes = [n if need else 0 for n, need in zip(self.sizes, need_dbias, strict=True)]
        dbias = [x.new_empty(n, dtype=torch.float32) for n in sizes]
        rows = self.wide_x[:, : self.inner]
        shipped._adapter_gradients(da, db, dbias, list(dys), rows, s, narrow_ds, scales, 0.0, None)
        return dx.view(x.shape), da, db, dbias
