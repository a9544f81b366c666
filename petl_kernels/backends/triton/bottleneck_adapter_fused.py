"""bottleneck_adapter for a narrow bottleneck: one launch has the whole of a block of rows.

The LayerNorm is folded into the two products. With G = D ⊙ w (rounded to x's dtype once), c1 = Σ_k G and c2 = D v + d,

    z = rstd (x Gᵀ - mean c1) + c2

so one pass over x yields its statistics and z together, where normalising first would take two. The same identity
serves backward, with x̂ = (x - mean) rstd and g = dh ⊙ w = dz G:

    Σ_k g = Σ_j dz_j c1_j        Σ_k g ⊙ x̂ = Σ_j dz_j (z_j - c2_j)        no pass over the width
    E = dzᵀ x̂:    dD = E ⊙ w + dd vᵀ    dw = Σ_j D_j ⊙ E_j    dv = Σ_j D_j dd_j        no pass over the tokens

mean c1 cancels in fp32, which leaves 16-bit inputs exact enough; fp32 inputs are shifted by the mean of the row's first
columns beforehand, and so are the sums behind the variance in every dtype.

Bytes, 16-bit, for t tokens of width d, bottleneck m, R rows in a block. Device memory: x in and y out, 4td. L2: x
again for its statistics and for the residual (4td) and both matrices once for each block of rows (4dm t / R). Keeping a
block of rows on chip instead (2Rd bytes: 128 KB at R = 64, d = 1024, of 227) leaves no room to pipeline the matrices,
and R = 32 reads them twice as often: at m = 64 that costs 4td more to save 2td. So the columns are streamed twice, and
any d works. Backward: one launch for dz, act(z) and dx, one for the sums over tokens, split, one that adds the parts,
and one that makes dD, dw and dv of E.
"""

# A type checker cannot follow ``@triton.jit``: to it, kernels and ``tl.range`` never return.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from petl_kernels.backends.triton import config
from petl_kernels.backends.triton.activation import activate, derivative
from petl_kernels.backends.triton.common import launch, load, load_rows, store, sum_partials


def forward(
    x, res, ln_weight, ln_bias, down, down_bias, up, up_bias, eps, activation, scale
) -> torch.Tensor:  # fmt: skip
    rows, d = x.shape
    y = x.new_empty(rows, d)
    down, up, offsets = _fold(x.dtype, ln_weight, ln_bias, down, down_bias, up)
    m = down.shape[0]
    block = config.padded(m, 1 << 30)
    tile = config.adapter_tile(x, rows, block)
    launch(
        _forward_kernel, (config.cdiv(rows, tile.m),), y, x, res, down, up, offsets, up_bias, rows, d, m,
        x.stride(0), res.stride(0), eps, scale, ACTIVATION=activation, LN=ln_weight is not None,
        BM=tile.m, BN=tile.n, BK=tile.k, BR=block, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return y


def backward(
    dy, x, residual_is_x, ln_weight, ln_bias, down, down_bias, up, eps, activation, scale, need_dx, has_up_bias
) -> tuple[Any, ...]:  # fmt: skip
    rows, d = x.shape
    dx = x.new_empty((rows, d) if need_dx else 0)
    folded, cast, offsets = _fold(x.dtype, ln_weight, ln_bias, down, down_bias, up)
    m, has_ln = folded.shape[0], ln_weight is not None
    latent, dlatent = x.new_empty(2, rows, m)  # act(z) and dz
    statistics = x.new_empty(2, rows, dtype=torch.float32)  # mean and rstd
    block = config.padded(m, 1 << 30)
    tile = config.adapter_tile(x, rows, 2 * block)
    launch(
        _backward_kernel, (config.cdiv(rows, tile.m),), dx, latent, dlatent, statistics, dy, x, folded, cast, offsets,
        rows, d, m, dy.stride(0), x.stride(0), eps, scale,
        ACTIVATION=activation, LN=has_ln, NEED_DX=need_dx, RESIDUAL=residual_is_x,
        BM=tile.m, BN=tile.n, BK=tile.k, BR=block, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    partials = _sums_over_tokens(dy, x, latent, dlatent, statistics, scale, has_ln)
    ddown = down.new_empty(m, d, dtype=torch.float32 if has_ln else down.dtype)
    dup, (dup_bias, ddown_bias) = torch.empty_like(up), (x.new_empty(n, dtype=torch.float32) for n in (d, m))
    sum_partials(partials, [ddown, dup, dup_bias, ddown_bias])
    if not has_ln:
        return dx, None, None, ddown, ddown_bias, dup, dup_bias
    sums, ddown = ddown, torch.empty_like(down)
    dln_weight, dln_bias = x.new_empty(2, d, dtype=torch.float32)
    launch(
        _norm_gradients_kernel, (config.cdiv(d, 32),), ddown, dln_weight, dln_bias, sums, ddown_bias, down, ln_weight,
        ln_bias, d, m, BD=32, BC=16, warps=4, stages=1,
    )  # fmt: skip
    return dx, dln_weight, dln_bias, ddown, ddown_bias, dup, dup_bias


def _fold(dtype, ln_weight, ln_bias, down, down_bias, up):
    """Returns (G or D, U, [c1; c2] in fp32 or d): both matrices in x's dtype, from one launch with a LayerNorm."""
    if ln_weight is None:
        return down.to(dtype), up.to(dtype), down_bias
    m, d = down.shape
    folded, offsets = down.new_empty(m, d, dtype=dtype), down.new_empty(2, m, dtype=torch.float32)
    cast = up if up.dtype == dtype else up.new_empty(d, m, dtype=dtype)
    launch(
        _fold_kernel, (m,), folded, offsets, None if cast is up else cast, down, down_bias, ln_weight, ln_bias, up,
        d, m, BLOCK=min(1024, triton.next_power_of_2(d)), warps=4, stages=2,
    )  # fmt: skip
    return folded, cast, offsets


def _sums_over_tokens(dy, x, latent, dlatent, statistics, scale, has_ln) -> torch.Tensor:
    """Returns (splits, elements), the parts of E (m, d), dU (d, m), Σ dy (d) and Σ dz (m), end to end."""
    rows, d = x.shape
    m = latent.shape[1]
    tile = config.TOKEN_SUM[config.key(x)]
    block = config.padded(m, tile.n)
    tiles, chunks = config.cdiv(d, tile.m), config.cdiv(m, block)
    splits = config.splits(x, tile, 2 * tiles * chunks)
    partials = x.new_empty(splits, 2 * d * m + d + m, dtype=torch.float32)
    launch(
        _token_sums_kernel, (tiles, splits, 2 * chunks), partials, dy, x, latent, dlatent, statistics, rows, d, m,
        dy.stride(0), x.stride(0), scale, LN=has_ln,
        BM=tile.k, BN=tile.m, BR=block, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return partials


@triton.jit
def _fold_kernel(
    folded, offsets, up_cast, down, down_bias, ln_weight, ln_bias, up, d, m, BLOCK: tl.constexpr
):  # fmt: skip
    """Writes G_j = D_j ⊙ w, c1_j = Σ G_j and c2_j = D_j · v + d_j for row j of D, and casts as many elements of U."""
    j = tl.program_id(0)
    c1 = tl.zeros((BLOCK,), tl.float32)
    c2 = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, d, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = k < d
        row = tl.load(down + j * d + k, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(ln_weight + k, mask=inside, other=0.0).to(tl.float32)
        product = (row * weight).to(folded.dtype.element_ty)
        tl.store(folded + j * d + k, product, mask=inside)
        c1 += product.to(tl.float32)
        if ln_bias is not None:
            c2 += row * tl.load(ln_bias + k, mask=inside, other=0.0).to(tl.float32)
        if up_cast is not None:
            part = tl.load(up + j * d + k, mask=inside, other=0.0)
            tl.store(up_cast + j * d + k, part.to(up_cast.dtype.element_ty), mask=inside)
    bias = tl.sum(c2, 0)
    if down_bias is not None:
        bias += tl.load(down_bias + j).to(tl.float32)
    tl.store(offsets + j, tl.sum(c1, 0))
    tl.store(offsets + m + j, bias)


@triton.jit
def _latent(
    x, dy, down, up, offsets, rows, latent, M, d, m, stride_x, stride_dy, eps,
    LN: tl.constexpr, BACKWARD: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Returns z, dy U (when BACKWARD), mean, rstd, c1 and c2 of a block of rows, from one pass over its columns."""
    row_inside, latent_inside = rows < M, latent < m
    shift = tl.zeros((BM,), tl.float32)
    if LN:
        k = tl.arange(0, BK)
        ahead = load(x + rows[:, None] * stride_x + k[None, :], row_inside, k < d)
        shift = tl.sum(ahead.to(tl.float32), 1) / min(d, BK)

    z = tl.zeros((BM, BR), tl.float32)
    da = tl.zeros((BM, BR), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    square = tl.zeros((BM,), tl.float32)
    for start in range(0, d, BK):
        k = start + tl.arange(0, BK)
        left = load(x + rows[:, None] * stride_x + k[None, :], row_inside, k < d)
        if LN:  # from a load that feeds no product (common.py)
            centred = tl.where((k < d)[None, :], ahead.to(tl.float32) - shift[:, None], 0.0)
            ahead = load(x + rows[:, None] * stride_x + (k + BK)[None, :], row_inside, k + BK < d)
            total += tl.sum(centred, 1)
            square += tl.sum(centred * centred, 1)
            if x.dtype.element_ty == tl.float32:
                left = centred
        right = load(down + latent[None, :] * d + k[:, None], k < d, latent_inside)
        z = tl.dot(left, right, z, input_precision="ieee")
        if BACKWARD:
            grad = load(dy + rows[:, None] * stride_dy + k[None, :], row_inside, k < d)
            right = load(up + k[:, None] * m + latent[None, :], k < d, latent_inside)
            da = tl.dot(grad, right, da, input_precision="ieee")

    c1 = tl.zeros((BR,), tl.float32)
    c2 = tl.zeros((BR,), tl.float32)
    mean = total / d
    rstd = tl.full((BM,), 1.0, tl.float32)
    if LN:
        c1 = tl.load(offsets + latent, mask=latent < m, other=0.0)
        c2 = tl.load(offsets + m + latent, mask=latent < m, other=0.0)
        rstd = tl.div_rn(rstd, tl.sqrt_rn(tl.maximum(square / d - mean * mean, 0.0) + eps))
        centre = mean if x.dtype.element_ty == tl.float32 else mean + shift
        z = rstd[:, None] * (z - centre[:, None] * c1[None, :])
        mean += shift
    elif offsets is not None:
        c2 = tl.load(offsets + latent, mask=latent < m, other=0.0).to(tl.float32)
    return z + c2[None, :], da, mean, rstd, c1, c2


@triton.jit
def _forward_kernel(
    y, x, res, down, up, offsets, up_bias, M, d, m, stride_x, stride_res, eps, scale,
    ACTIVATION: tl.constexpr, LN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Writes y of a block of rows."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    latent = tl.arange(0, BR)
    z, _, _, _, _, _ = _latent(
        x, x, down, up, offsets, rows, latent, M, d, m, stride_x, stride_x, eps, LN, False, BM, BK, BR
    )
    a = activate(z, ACTIVATION).to(x.dtype.element_ty)

    row_inside, latent_inside = rows < M, latent < m
    cols = tl.arange(0, BN)
    # Loads that feed no product are not pipelined by the compiler: the next step's are issued a step ahead.
    ahead = load(res + rows[:, None] * stride_res + cols[None, :], row_inside, cols < d)
    for start in range(0, d, BN):
        cols = start + tl.arange(0, BN)
        tile = ahead
        ahead = load(res + rows[:, None] * stride_res + (cols + BN)[None, :], row_inside, cols + BN < d)
        right = load(up + cols[None, :] * m + latent[:, None], latent_inside, cols < d)
        acc = tl.dot(a, right, input_precision="ieee")
        if up_bias is not None:
            acc += tl.load(up_bias + cols, mask=cols < d, other=0.0).to(tl.float32)[None, :]
        store(y + rows[:, None] * d + cols[None, :], tile.to(tl.float32) + scale * acc, row_inside, cols < d)


@triton.jit
def _latent_gradient(a, dz, statistics, z, da, mean, rstd, c1, c2, rows, latent, M, m, scale, ACTIVATION: tl.constexpr):
    """Stores act(z), dz and the row statistics; returns dz, Σ_j dz c1 and Σ_j dz (z - c2)."""
    row_inside, latent_inside = rows < M, latent < m
    block = rows[:, None] * m + latent[None, :]
    gradient = (scale * da * derivative(z, ACTIVATION)).to(dz.dtype.element_ty)
    store(a + block, activate(z, ACTIVATION), row_inside, latent_inside)
    store(dz + block, gradient, row_inside, latent_inside)
    tl.store(statistics + rows, mean, mask=row_inside)
    tl.store(statistics + M + rows, rstd, mask=row_inside)
    exact = gradient.to(tl.float32)
    return gradient, tl.sum(exact * c1[None, :], 1), tl.sum(exact * (z - c2[None, :]), 1)


@triton.jit
def _dx_tile(
    acc, tile, grad, mean, rstd, sum1, sum2, d, LN: tl.constexpr, RESIDUAL: tl.constexpr
):  # fmt: skip
    """Returns dx from acc = dz G: through the LayerNorm, plus dy for the residual."""
    if LN:
        normalised = (tile.to(tl.float32) - mean[:, None]) * rstd[:, None]
        acc = rstd[:, None] * (acc - (sum1 / d)[:, None] - normalised * (sum2 / d)[:, None])
    if RESIDUAL:
        acc += grad.to(tl.float32)
    return acc


@triton.jit
def _backward_kernel(
    dx, a, dz, statistics, dy, x, down, up, offsets, M, d, m, stride_dy, stride_x, eps, scale,
    ACTIVATION: tl.constexpr, LN: tl.constexpr, NEED_DX: tl.constexpr, RESIDUAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Writes act(z), dz, mean, rstd and dx of a block of rows."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    latent = tl.arange(0, BR)
    z, da, mean, rstd, c1, c2 = _latent(
        x, dy, down, up, offsets, rows, latent, M, d, m, stride_x, stride_dy, eps, LN, True, BM, BK, BR
    )
    gradient, sum1, sum2 = _latent_gradient(
        a, dz, statistics, z, da, mean, rstd, c1, c2, rows, latent, M, m, scale, ACTIVATION
    )
    if NEED_DX:
        row_inside, latent_inside = rows < M, latent < m
        x_rows, dy_rows = x + rows[:, None] * stride_x, dy + rows[:, None] * stride_dy
        cols = tl.arange(0, BN)
        x_ahead = load(x_rows + cols[None, :], row_inside & LN, cols < d)
        dy_ahead = load(dy_rows + cols[None, :], row_inside & RESIDUAL, cols < d)
        for start in range(0, d, BN):
            cols = start + tl.arange(0, BN)
            tile, grad = x_ahead, dy_ahead
            x_ahead = load(x_rows + (cols + BN)[None, :], row_inside & LN, cols + BN < d)
            dy_ahead = load(dy_rows + (cols + BN)[None, :], row_inside & RESIDUAL, cols + BN < d)
            right = load(down + latent[:, None] * d + cols[None, :], latent_inside, cols < d)
            acc = tl.dot(gradient, right, input_precision="ieee")
            out = _dx_tile(acc, tile, grad, mean, rstd, sum1, sum2, d, LN, RESIDUAL)
            store(dx + rows[:, None] * d + cols[None, :], out, row_inside, cols < d)


@triton.jit
def _token_sums_kernel(
    partials, dy, x, a, dz, statistics, M, d, m, stride_dy, stride_x, scale,
    LN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Writes this split's part of E = dzᵀ x̂ and Σ dz, or of dU = scale dyᵀ act(z) and scale Σ dy."""
    is_up, chunk = tl.program_id(2) % 2 == 1, tl.program_id(2) // 2
    wide = tl.where(is_up, dy, x)
    narrow = tl.where(is_up, a, dz)
    stride = tl.where(is_up, stride_dy, stride_x)
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    latent = chunk * BR + tl.arange(0, BR)
    col_inside, latent_inside = cols < d, latent < m

    split, splits = tl.program_id(1), tl.num_programs(1)
    length = tl.cdiv(tl.cdiv(M, BM), splits) * BM
    begin, stop = split * length, min((split + 1) * length, M)
    sums_wide, sums_narrow = is_up & (chunk == 0), (is_up == 0) & (tl.program_id(0) == 0)
    acc = tl.zeros((BN, BR), tl.float32)
    wide_sum = tl.zeros((BN,), tl.float32)
    narrow_sum = tl.zeros((BR,), tl.float32)
    # Sums have loads that feed no product (common.py), of no rows where they are not stored. With LN the product takes
    # its tile from registers, as the sum then does, too.
    wide_stop, narrow_stop = tl.where(sums_wide, stop, 0), tl.where(sums_narrow, stop, 0)
    narrow_ahead = load_rows(narrow, m, begin, narrow_stop, latent, latent_inside, BM)
    if not LN:
        wide_ahead = load_rows(wide, stride, begin, wide_stop, cols, col_inside, BM)
    for start in range(begin, stop, BM):
        tile = load_rows(wide, stride, start, stop, cols, col_inside, BM)
        right = load_rows(narrow, m, start, stop, latent, latent_inside, BM)
        narrow_sum += tl.sum(narrow_ahead.to(tl.float32), 0)
        narrow_ahead = load_rows(narrow, m, start + BM, narrow_stop, latent, latent_inside, BM)
        if LN:
            wide_sum += tl.sum(tile.to(tl.float32), 0)
            rows = start + tl.arange(0, BM)
            row_inside = rows < stop
            mean = tl.where(is_up, 0.0, tl.load(statistics + rows, mask=row_inside, other=0.0))
            rstd = tl.where(is_up, 1.0, tl.load(statistics + M + rows, mask=row_inside, other=0.0))
            tile = ((tile.to(tl.float32) - mean[:, None]) * rstd[:, None]).to(tile.dtype)
        else:
            wide_sum += tl.sum(wide_ahead.to(tl.float32), 0)
            wide_ahead = load_rows(wide, stride, start + BM, wide_stop, cols, col_inside, BM)
        acc = tl.dot(tl.trans(tile), right, acc, input_precision="ieee")

    out = partials + split.to(tl.int64) * (2 * d * m + d + m)
    if is_up:
        store(out + d * m + cols[:, None] * m + latent[None, :], scale * acc, col_inside, latent_inside)
        if sums_wide:
            tl.store(out + 2 * d * m + cols, scale * wide_sum, mask=col_inside)
    else:
        store(out + latent[None, :] * d + cols[:, None], acc, col_inside, latent_inside)
        if sums_narrow:
            tl.store(out + 2 * d * m + d + latent, narrow_sum, mask=latent_inside)


@triton.jit
def _norm_gradients_kernel(
    ddown, dln_weight, dln_bias, sums, ddown_bias, down, ln_weight, ln_bias, d, m, BD: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Writes dD, dw and dv of a block of columns, from E, Σ dz and D; BC divides m."""
    cols = tl.program_id(0) * BD + tl.arange(0, BD)
    col_inside = cols < d
    weight = tl.load(ln_weight + cols, mask=col_inside, other=0.0).to(tl.float32)
    bias = tl.zeros((BD,), tl.float32)
    if ln_bias is not None:
        bias += tl.load(ln_bias + cols, mask=col_inside, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((BC, BD), tl.float32)
    bias_sum = tl.zeros((BC, BD), tl.float32)
    for start in range(0, m, BC):
        latent = start + tl.arange(0, BC)
        inside, at = latent < m, latent[:, None] * d + cols[None, :]
        e = load(sums + at, inside, col_inside)
        dd = tl.load(ddown_bias + latent, mask=inside, other=0.0)[:, None]
        row = load(down + at, inside, col_inside).to(tl.float32)
        weight_sum += row * e
        bias_sum += row * dd
        store(ddown + at, e * weight[None, :] + dd * bias[None, :], inside, col_inside)
    tl.store(dln_weight + cols, tl.sum(weight_sum, 0), mask=col_inside)
    tl.store(dln_bias + cols, tl.sum(bias_sum, 0), mask=col_inside)
