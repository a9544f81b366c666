"""bottleneck_adapter in Triton: y = res + scale (act(LN(x) Dᵀ + d) Uᵀ + u), and all its gradients.

The LayerNorm is folded into the products. With G = D ⊙ w (rounded to x's dtype once), c1 = Σ_k G and c2 = D v + d,

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
any d works. Above `config.ADAPTER_LIMIT` the z of a block of rows no longer fits its registers: then one launch
writes act(z) (2tm bytes) and a second multiplies it by U.

Backward: one launch for dz, act(z) and dx, one for the sums over tokens, split, and one that adds the parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from petl_kernels.backends.triton import config
from petl_kernels.backends.triton.activation import activate, derivative
from petl_kernels.backends.triton.common import as_rows, launch, load, load_rows, store, swizzle


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
    y = x.new_empty(rows.shape)
    if rows.shape[0]:
        down, up, offsets = _fold(x.dtype, ln_weight, ln_bias, down, down_bias, up)
        arguments = (y, rows, res, down, up, offsets, up_bias, eps, activation, scale, ln_weight is not None)
        (_forward_fused if _is_fused(x, down, 1) else _forward_split)(*arguments)
    return y.view(x.shape)


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
    tokens, d = rows.shape
    new = torch.Tensor.new_empty if tokens else torch.Tensor.new_zeros
    dx = x.new_empty((tokens, d) if need_dx else 0)
    dup_bias = new(x, d, dtype=torch.float32) if has_up_bias else None
    dln_weight, dln_bias, ddown, ddown_bias, dup = (
        None if p is None else new(p, p.shape) for p in (ln_weight, ln_bias, down, down_bias, up)
    )
    if tokens:
        folded, up, offsets = _fold(x.dtype, ln_weight, ln_bias, down, down_bias, up)
        # act(z) and dz (tokens, m); mean and rstd (tokens)
        latent, dlatent = x.new_empty(2, tokens, folded.shape[0])
        statistics = x.new_empty(2, tokens, dtype=torch.float32)
        run = _backward_fused if _is_fused(x, down, 2) else _backward_split
        has_ln = ln_weight is not None
        run(
            dx, dys, rows, folded, up, offsets, latent, dlatent, statistics, eps, activation, scale,
            has_ln, need_dx, residual_is_x,
        )  # fmt: skip
        partials = _sums_over_tokens(dys, rows, latent, dlatent, statistics, scale, has_ln)
        outs = (ddown, ddown_bias, dup, dup_bias, dln_weight, dln_bias)
        launch(
            _finish_kernel, (config.cdiv(d, 16),), partials, *outs, down.contiguous(), ln_weight, ln_bias,
            partials.shape[0], d, down.shape[0], folded.shape[0], LN=has_ln, BD=16, BC=32, warps=4, stages=2,
        )  # fmt: skip
    absent = x.new_empty(0)
    grads = (dln_weight, dln_bias, ddown, ddown_bias, dup, dup_bias)
    return dx.view(x.shape if need_dx else (0,)), *(absent if grad is None else grad for grad in grads)


def _is_fused(x: torch.Tensor, down: torch.Tensor, accumulators: int) -> bool:
    return accumulators * config.padded(down.shape[0], 1 << 30) <= config.ADAPTER_LIMIT[config.key(x)]


def _fold(dtype, ln_weight, ln_bias, down, down_bias, up):
    """(G or D, U, [c1; c2] in fp32 or d): both matrices in x's dtype, from one launch when there is a LayerNorm.

    A bottleneck that 16 does not divide is padded with zeros, which add nothing anywhere: loads stay 16 bytes wide.
    """
    if odd := -down.shape[0] % 16:
        down, up = F.pad(down, (0, 0, 0, odd)), F.pad(up, (0, odd))
        down_bias = None if down_bias is None else F.pad(down_bias, (0, odd))
    down, up = down.contiguous(), up.contiguous()
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


def _forward_fused(y, x, res, down, up, offsets, up_bias, eps, activation, scale, has_ln) -> None:
    rows, d = x.shape
    m = down.shape[0]
    block = config.padded(m, 1 << 30)
    tile = config.adapter_tile(x, rows, block)
    launch(
        _forward_kernel, (config.cdiv(rows, tile.m),), y, x, res, down, up, offsets, up_bias, rows, d, m,
        x.stride(0), res.stride(0), eps, scale, ACTIVATION=activation, LN=has_ln,
        BM=tile.m, BN=tile.n, BK=tile.k, BR=block, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def _forward_split(y, x, res, down, up, offsets, up_bias, eps, activation, scale, has_ln) -> None:
    rows, d = x.shape
    m = down.shape[0]
    latent = x.new_empty(rows, m)
    block = config.ADAPTER_LIMIT[config.key(x)] // 2
    tile = config.adapter_tile(x, rows, block)
    launch(
        _latent_kernel, (config.cdiv(rows, tile.m), config.cdiv(m, block)), latent, x, down, offsets, rows, d, m,
        x.stride(0), eps, ACTIVATION=activation, LN=has_ln,
        BM=tile.m, BK=tile.k, BR=block, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    tile = config.matmul_tile(x, rows, d, elements=64)
    launch(
        _up_kernel, (config.cdiv(rows, tile.m) * config.cdiv(d, tile.n),), y, latent, res, up, up_bias, rows, d, m,
        res.stride(0), scale, BM=tile.m, BN=tile.n, BK=tile.k, GROUP=config.TILE_GROUP,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def _backward_fused(
    dx, dy, x, down, up, offsets, latent, dlatent, statistics, eps, activation, scale, has_ln, need_dx, residual_is_x
) -> None:  # fmt: skip
    rows, d = x.shape
    m = down.shape[0]
    block = config.padded(m, 1 << 30)
    tile = config.adapter_tile(x, rows, 2 * block)
    launch(
        _backward_kernel, (config.cdiv(rows, tile.m),), dx, latent, dlatent, statistics, dy, x, down, up, offsets,
        rows, d, m, dy.stride(0), x.stride(0), eps, scale,
        ACTIVATION=activation, LN=has_ln, NEED_DX=need_dx, RESIDUAL=residual_is_x,
        BM=tile.m, BN=tile.n, BK=tile.k, BR=block, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def _backward_split(
    dx, dy, x, down, up, offsets, latent, dlatent, statistics, eps, activation, scale, has_ln, need_dx, residual_is_x
) -> None:  # fmt: skip
    rows, d = x.shape
    m = down.shape[0]
    block = config.ADAPTER_LIMIT[config.key(x)] // 4
    tile = config.adapter_tile(x, rows, 2 * block)
    chunks = config.cdiv(m, block)
    row_sums = x.new_empty(chunks, 2, rows, dtype=torch.float32)
    launch(
        _latent_backward_kernel, (config.cdiv(rows, tile.m), chunks), latent, dlatent, statistics, row_sums,
        dy, x, down, up, offsets, rows, d, m, dy.stride(0), x.stride(0), eps, scale, ACTIVATION=activation, LN=has_ln,
        BM=tile.m, BK=tile.k, BR=block, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    if not need_dx:
        return
    tile = config.matmul_tile(x, rows, d, elements=64)
    launch(
        _dx_kernel, (config.cdiv(rows, tile.m) * config.cdiv(d, tile.n),), dx, dlatent, statistics, row_sums,
        dy, x, down, chunks, rows, d, m, dy.stride(0), x.stride(0), LN=has_ln, RESIDUAL=residual_is_x,
        BM=tile.m, BN=tile.n, BK=tile.k, GROUP=config.TILE_GROUP, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def _sums_over_tokens(dy, x, latent, dlatent, statistics, scale, has_ln) -> torch.Tensor:
    """(splits, elements) parts of E (m, d), dU (d, m), Σ dy (d) and Σ dz (m), end to end."""
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
    """One row j of D: G_j = D_j ⊙ w, c1_j = Σ G_j, c2_j = D_j · v + d_j; and as many elements of U cast."""
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
    """One pass over the columns of a block of rows: z, dy U (when BACKWARD), mean, rstd, c1, c2."""
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
    """y for a block of rows."""
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
def _latent_kernel(
    a, x, down, offsets, M, d, m, stride_x, eps,
    ACTIVATION: tl.constexpr, LN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """act(z) for a block of rows and a block of the bottleneck."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    latent = tl.program_id(1) * BR + tl.arange(0, BR)
    z, _, _, _, _, _ = _latent(
        x, x, down, x, offsets, rows, latent, M, d, m, stride_x, stride_x, eps, LN, False, BM, BK, BR
    )
    store(a + rows[:, None] * m + latent[None, :], activate(z, ACTIVATION), rows < M, latent < m)


@triton.jit
def _up_kernel(
    y, a, res, up, up_bias, M, d, m, stride_res, scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = res + scale (a Uᵀ + u)."""
    pid_m, pid_n = swizzle(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(d, BN), GROUP)
    rows = (pid_m * BM + tl.arange(0, BM)).to(tl.int64)
    cols = pid_n * BN + tl.arange(0, BN)
    row_inside, col_inside = rows < M, cols < d
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, m, BK):
        j = start + tl.arange(0, BK)
        left = load(a + rows[:, None] * m + j[None, :], row_inside, j < m)
        right = load(up + cols[None, :] * m + j[:, None], j < m, col_inside)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    if up_bias is not None:
        acc += tl.load(up_bias + cols, mask=cols < d, other=0.0).to(tl.float32)[None, :]
    tile = load(res + rows[:, None] * stride_res + cols[None, :], row_inside, col_inside)
    store(y + rows[:, None] * d + cols[None, :], tile.to(tl.float32) + scale * acc, row_inside, col_inside)


@triton.jit
def _latent_gradient(
    a, dz, statistics, z, da, mean, rstd, c1, c2, rows, latent, first, M, m, scale, ACTIVATION: tl.constexpr
):
    """Store act(z), dz and the row statistics; returns dz, Σ_j dz c1 and Σ_j dz (z - c2)."""
    row_inside, latent_inside = rows < M, latent < m
    block = rows[:, None] * m + latent[None, :]
    gradient = (scale * da * derivative(z, ACTIVATION)).to(dz.dtype.element_ty)
    store(a + block, activate(z, ACTIVATION), row_inside, latent_inside)
    store(dz + block, gradient, row_inside, latent_inside)
    if first:
        tl.store(statistics + rows, mean, mask=row_inside)
        tl.store(statistics + M + rows, rstd, mask=row_inside)
    exact = gradient.to(tl.float32)
    return gradient, tl.sum(exact * c1[None, :], 1), tl.sum(exact * (z - c2[None, :]), 1)


@triton.jit
def _dx_tile(
    acc, tile, grad, mean, rstd, sum1, sum2, d, LN: tl.constexpr, RESIDUAL: tl.constexpr
):  # fmt: skip
    """dx from acc = dz G: through the LayerNorm, plus dy for the residual."""
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
    """act(z), dz, mean, rstd and dx for a block of rows."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    latent = tl.arange(0, BR)
    z, da, mean, rstd, c1, c2 = _latent(
        x, dy, down, up, offsets, rows, latent, M, d, m, stride_x, stride_dy, eps, LN, True, BM, BK, BR
    )
    gradient, sum1, sum2 = _latent_gradient(
        a, dz, statistics, z, da, mean, rstd, c1, c2, rows, latent, True, M, m, scale, ACTIVATION
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
def _latent_backward_kernel(
    a, dz, statistics, row_sums, dy, x, down, up, offsets, M, d, m, stride_dy, stride_x, eps, scale,
    ACTIVATION: tl.constexpr, LN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """act(z), dz, mean and rstd for a block of rows and a block of the bottleneck; its part of the two row sums."""
    chunk = tl.program_id(1)
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    latent = chunk * BR + tl.arange(0, BR)
    z, da, mean, rstd, c1, c2 = _latent(
        x, dy, down, up, offsets, rows, latent, M, d, m, stride_x, stride_dy, eps, LN, True, BM, BK, BR
    )
    _, sum1, sum2 = _latent_gradient(
        a, dz, statistics, z, da, mean, rstd, c1, c2, rows, latent, chunk == 0, M, m, scale, ACTIVATION
    )
    tl.store(row_sums + chunk * 2 * M + rows, sum1, mask=rows < M)
    tl.store(row_sums + chunk * 2 * M + M + rows, sum2, mask=rows < M)


@triton.jit
def _dx_kernel(
    dx, dz, statistics, row_sums, dy, x, down, chunks, M, d, m, stride_dy, stride_x,
    LN: tl.constexpr, RESIDUAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dx for one tile, from dz and the row sums of every block of the bottleneck."""
    pid_m, pid_n = swizzle(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(d, BN), GROUP)
    rows = (pid_m * BM + tl.arange(0, BM)).to(tl.int64)
    cols = pid_n * BN + tl.arange(0, BN)
    row_inside, col_inside = rows < M, cols < d
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, m, BK):
        j = start + tl.arange(0, BK)
        left = load(dz + rows[:, None] * m + j[None, :], row_inside, j < m)
        right = load(down + j[:, None] * d + cols[None, :], j < m, col_inside)
        acc = tl.dot(left, right, acc, input_precision="ieee")

    sum1 = tl.zeros((BM,), tl.float32)
    sum2 = tl.zeros((BM,), tl.float32)
    for chunk in range(chunks):
        sum1 += tl.load(row_sums + chunk * 2 * M + rows, mask=rows < M, other=0.0)
        sum2 += tl.load(row_sums + chunk * 2 * M + M + rows, mask=rows < M, other=0.0)
    mean = tl.load(statistics + rows, mask=rows < M, other=0.0)
    rstd = tl.load(statistics + M + rows, mask=rows < M, other=0.0)
    tile = load(x + rows[:, None] * stride_x + cols[None, :], row_inside & LN, col_inside)
    grad = load(dy + rows[:, None] * stride_dy + cols[None, :], row_inside & RESIDUAL, col_inside)
    out = _dx_tile(acc, tile, grad, mean, rstd, sum1, sum2, d, LN, RESIDUAL)
    store(dx + rows[:, None] * d + cols[None, :], out, row_inside, col_inside)


@triton.jit
def _token_sums_kernel(
    partials, dy, x, a, dz, statistics, M, d, m, stride_dy, stride_x, scale,
    LN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """This split's part of E = dzᵀ x̂ and Σ dz, or of dU = scale dyᵀ act(z) and scale Σ dy."""
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
def _finish_kernel(
    partials, ddown, ddown_bias, dup, dup_bias, dln_weight, dln_bias, down, ln_weight, ln_bias, splits, d, m, padded,
    LN: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Add the splits of a block of columns, and derive dD and the LayerNorm's gradients from E and Σ dz.

    The parts have the padded bottleneck, the gradients the m it was given.
    """
    cols = tl.program_id(0) * BD + tl.arange(0, BD)
    col_inside = cols < d
    total = 2 * d * padded + d + padded
    weight_sum = tl.zeros((BD,), tl.float32)
    bias_sum = tl.zeros((BD,), tl.float32)
    for start in range(0, m, BC):
        latent = start + tl.arange(0, BC)
        inside = latent < m
        e = tl.zeros((BC, BD), tl.float32)
        u = tl.zeros((BC, BD), tl.float32)
        dd = tl.zeros((BC,), tl.float32)
        part = partials
        for _ in range(splits):
            e += load(part + latent[:, None] * d + cols[None, :], inside, col_inside)
            u += load(part + d * padded + cols[None, :] * padded + latent[:, None], inside, col_inside)
            dd += tl.load(part + 2 * d * padded + d + latent, mask=inside, other=0.0)
            part += total
        if LN:
            row = load(down + latent[:, None] * d + cols[None, :], inside, col_inside).to(tl.float32)
            weight_sum += tl.sum(row * e, 0)
            bias_sum += tl.sum(row * dd[:, None], 0)
            e *= tl.load(ln_weight + cols, mask=col_inside, other=0.0).to(tl.float32)[None, :]
            if ln_bias is not None:
                e += dd[:, None] * tl.load(ln_bias + cols, mask=col_inside, other=0.0).to(tl.float32)[None, :]
        store(ddown + latent[:, None] * d + cols[None, :], e, inside, col_inside)
        store(dup + cols[None, :] * m + latent[:, None], u, inside, col_inside)
        if ddown_bias is not None:
            if tl.program_id(0) == 0:
                tl.store(ddown_bias + latent, dd.to(ddown_bias.dtype.element_ty), mask=inside)
    if LN:
        tl.store(dln_weight + cols, weight_sum.to(dln_weight.dtype.element_ty), mask=col_inside)
        if ln_bias is not None:
            tl.store(dln_bias + cols, bias_sum.to(dln_bias.dtype.element_ty), mask=col_inside)
    if dup_bias is not None:
        acc = tl.zeros((BD,), tl.float32)
        part = partials + 2 * d * padded
        for _ in range(splits):
            acc += tl.load(part + cols, mask=col_inside, other=0.0)
            part += total
        tl.store(dup_bias + cols, acc, mask=col_inside)
