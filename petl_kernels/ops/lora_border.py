"""Linear layers that read one input as one product, with their adapters in a border of the stacked weights.

For G linears with outputs N_g, N = Σ N_g, and adapters of ranks r_g (0 for one without), R ≥ Σ r_g,

    border = [[W, S],  (N + R, K + R)     W = [W_1; …; W_G]     A = [A_1; …; A_G; 0]
              [A, 0]]                     S = scale_g · B_g in the rows of g and the columns of its ranks, else 0

    s                = x Aᵀ
    [y_1, …, y_G]    = [x, s] border[:N]ᵀ + [c_1, …, c_G]        one product over K + R

    ds               = [dy_1, …, dy_G] S
    dx               = [dy_1, …, dy_G, ds] border[:, :K]         one product over N + R
    dA = dsᵀ x       dB_g = scale_g · dy_gᵀ s_g       dc_g = Σ_tokens dy_g

which is ``lora_linear`` for those with an adapter and ``frozen_linear`` for the others. The rounding of
``scale_g`` · B_g into S is one rounding more of B_g.

x and dy come as the first columns of rows that have room for s and ds behind them: ``wide`` (tokens, K + R) and
(tokens, N + R). Both are written there, zeros in the columns beyond Σ r_g. S and c are written into their places before
each product that reads them, and A too, so that the values of A_g, B_g and c_g are always those of the call. No
dropout: dx's mask would fall on the rank part alone.

Saves: x, and s (2 Σ r_g bytes per token in bf16).

There is no function of this name: only a layer's rule has such rows (``petl_kernels/layers/rule/border.py``).
Source: the block product written out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from petl_kernels.dispatch import dispatch, register
from petl_kernels.ops.define import accumulate_dtype, define, empty, present

CUDA_PARTS = 64  # at most, of dB's sum over tokens on CUDA: in fp32, each of N_g · r_g numbers for every adapter
ALIGNMENT = 8  # columns: 16 bytes of a 16-bit row, which the library's products want rows to begin at


def room(ranks: int) -> int:
    """Returns how many rows and columns a border has for adapters of so many ranks in all."""
    return -(-ranks // ALIGNMENT) * ALIGNMENT


def fill_outputs(
    border: Tensor, bias: Tensor | None, biases: list[Tensor], a: list[Tensor], b: list[Tensor], scales: list[float]
) -> None:
    """Writes S and c, each in one copy, so that another thread that runs the same adapters reads only their values."""
    k, row, column = a[0].shape[1], 0, 0
    s = border.new_zeros(sum(b_g.shape[0] for b_g in b), border.shape[1] - k)
    c = s.new_zeros(s.shape[0])
    for c_g, b_g, scale in zip(biases, b, scales, strict=True):
        rows, ranks = b_g.shape
        s[row : row + rows, column : column + ranks] = scale * b_g.to(accumulate_dtype(b_g.dtype))
        if present(c_g) is not None:
            c[row : row + rows] = c_g
        row, column = row + rows, column + ranks
    border[: s.shape[0], k:] = s
    if bias is not None:
        bias.copy_(c)


def fill_inputs(border: Tensor, a: list[Tensor], outputs: int) -> None:
    """Writes A, with zeros below it."""
    stacked = torch.cat(a).to(border.dtype)
    border[outputs:, : stacked.shape[1]] = F.pad(stacked, (0, 0, 0, border.shape[0] - outputs - stacked.shape[0]))


@register("lora_border", "reference")
def reference(
    wide: Tensor,
    border: Tensor,
    bias: Tensor | None,
    biases: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
) -> tuple[Tensor, Tensor]:
    k, outputs = a[0].shape[1], sum(b_g.shape[0] for b_g in b)
    fill_outputs(border, bias, biases, a, b, scales)
    s = wide[:, :k] @ torch.cat(a).to(wide.dtype).T
    _write_behind(wide, k, s)
    y = wide @ border[:outputs].T
    return y if bias is None else y + bias, s


@register("lora_border_backward", "reference")
def reference_backward(
    wide: Tensor,
    x: Tensor | None,
    s: Tensor,
    border: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    need_dx: bool,
    need_dbias: list[bool],
):
    outputs, ranks = sum(b_g.shape[0] for b_g in b), [a_g.shape[0] for a_g in a]
    dys = _split(wide[:, :outputs], [b_g.shape[0] for b_g in b])
    ds = [scale * (dy @ b_g.to(wide.dtype)) for dy, b_g, scale in zip(dys, b, scales, strict=True)]
    _write_behind(wide, outputs, torch.cat(ds, 1))
    da = [empty(a_g) if x is None else (ds_g.T @ x).to(a_g.dtype) for ds_g, a_g in zip(ds, a, strict=True)]
    parts = _split(s, ranks)
    db = [(scale * (dy.T @ s_g)).to(b_g.dtype) for dy, s_g, b_g, scale in zip(dys, parts, b, scales, strict=True)]
    dx = empty(wide)
    if need_dx:
        fill_inputs(border, a, outputs)
        dx = wide @ border[:, : a[0].shape[1]]
    sums = accumulate_dtype(wide.dtype)
    dbias = [dy.sum(0, dtype=sums) if need else empty(dy) for dy, need in zip(dys, need_dbias, strict=True)]
    return dx, da, db, dbias


def _split(columns: Tensor, widths: list[int]) -> tuple[Tensor, ...]:
    return columns.split(widths, 1)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _write_behind(wide: Tensor, first: int, columns: Tensor) -> None:
    """Writes ``columns`` from ``first`` on, and zeros after them; nothing where there is no room."""
    if wide.shape[1] > first:
        wide[:, first : first + columns.shape[1]] = columns
        wide[:, first + columns.shape[1] :] = 0


def _forward(
    wide: Tensor,
    border: Tensor,
    bias: Tensor | None,
    biases: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    backend: str,
) -> tuple[Tensor, Tensor]:
    kernel = dispatch("lora_border", wide.device, backend, wide.dtype)
    bias = None if bias is None else bias.to(wide.dtype)
    return kernel(wide, border.to(wide.dtype), bias, biases, a, b, scales)


def _forward_fake(
    wide: Tensor,
    border: Tensor,
    bias: Tensor | None,
    biases: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    backend: str,
) -> tuple[Tensor, Tensor]:
    tokens = wide.shape[0]
    y = wide.new_empty(tokens, sum(b_g.shape[0] for b_g in b))
    return y, wide.new_empty(tokens, sum(a_g.shape[0] for a_g in a))


def _backward(
    wide: Tensor,
    x: Tensor | None,
    s: Tensor,
    border: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    need_dx: bool,
    need_dbias: list[bool],
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    kernel = dispatch("lora_border_backward", wide.device, backend, wide.dtype)
    dx, da, db, dbias = kernel(wide, x, s, border.to(wide.dtype), a, b, scales, need_dx, need_dbias)
    return dx, list(da), list(db), [grad.to(accumulate_dtype(wide.dtype)) for grad in dbias]


def _backward_fake(
    wide: Tensor,
    x: Tensor | None,
    s: Tensor,
    border: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    need_dx: bool,
    need_dbias: list[bool],
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    dx = wide.new_empty(wide.shape[0], a[0].shape[1]) if need_dx else empty(wide)
    da = [a_g.new_empty(a_g.shape if x is not None else 0) for a_g in a]
    db = [b_g.new_empty(b_g.shape) for b_g in b]
    sums = accumulate_dtype(wide.dtype)
    dbias = [wide.new_empty(b_g.shape[0] if need else 0, dtype=sums) for b_g, need in zip(b, need_dbias, strict=True)]
    return dx, da, db, dbias


define(
    "lora_border",
    "(Tensor(a!) wide, Tensor(b!) border, Tensor(c!)? bias, Tensor[] biases, Tensor[] a, Tensor[] b, float[] scales,"
    " str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
define(
    "lora_border_backward",
    "(Tensor(a!) wide, Tensor? x, Tensor s, Tensor(b!) border, Tensor[] a, Tensor[] b, float[] scales, bool need_dx,"
    " bool[] need_dbias, str backend) -> (Tensor, Tensor[], Tensor[], Tensor[])",
    _backward,
    _backward_fake,
)
