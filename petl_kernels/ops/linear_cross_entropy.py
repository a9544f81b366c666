"""The vocabulary loss of hidden states, without their logits.

    z     = s · (h Wᵀ) + b                              one row a token
    loss  = a · (-log p_y) + c · Σ_v (-log p_v)         with p = softmax(z), y the label
          = log Σ_v exp z_v - a · z_y - c · Σ_v z_v     since a + c·V = 1

    label smoothing ε     a              c
    "uniform"             1 - ε          ε / V          ε over all V words: torch, Hugging Face
    "fairseq"             1 - ε - c      ε / (V - 1)    ε over the V - 1 other words

    dz_v  = (p_v - c - a · [v = y]) · dloss
    dh    = s · dz W
    dW    = s · dzᵀ h
    db    = Σ_rows dz           (dW and db with fp32 sums over chunks)

h (..., d), W (V, d), labels (...) int64, b (V,) or (1, V) or None; h bf16, fp16, fp32 or fp64, W and b of any such
dtype. The scale comes before the bias, as T5 scales its hidden states (by 1/√d) and has no bias. The loss is fp32
(fp64 for fp64), logits are rounded to h's dtype as those of ``F.linear`` are, and all that follows them is fp32.

Rows whose label is ``ignore_index`` are taken out first: no work is done for them, their loss and gradient are 0. To
find them, and labels that are out of range, the host waits for a CUDA device. With ``counted`` it does not: the first
``counted`` rows in the order (those that count, the others) are worked on, with a weight of 1 or 0.

The rest is worked on in chunks of rows. One buffer holds a chunk's logits, and then, in place, dz: `chunk_bytes` bytes
at most, but one row at least. Where nobody has said how many, 32 MiB, and on a CPU 256 rows if that is more: a product
of few rows waits there for W, which each chunk reads from memory twice. The gradients are formed there and then, for a
dloss of 1; backward multiplies them by the true one. dW is added up, and a W of another dtype than h is cast, for each
chunk in blocks of words that take `chunk_bytes` / 4 more. A W of h's dtype is faster. A frozen W may be quantised
(``ops/quantised.py``).

Saves: d · itemsize bytes per row (dh), and 4. W trained: 4·V·d more, once (dW in fp32, like dh until backward); b: 4·V.
``reduction="none"`` with W or b trained keeps h (d · itemsize bytes per row), the labels (8 per row), W and b, and
forms the logits again in backward: a gradient summed over rows cannot be formed before each row's dloss is known.

Source: the derivative of the above; chunks by rows as in Liger (arXiv 2410.10989); fairseq's label_smoothed_nll_loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from petl_kernels.backends import active, dispatch, register
from petl_kernels.errors import InputError
from petl_kernels.ops.common import (
    accumulate_dtype,
    check_device,
    check_parameter,
    define,
    differentiate,
    empty,
    shape,
)
from petl_kernels.ops.product import product_into
from petl_kernels.ops.quantised import (
    is_quantised,
    out_features,
    part_rows,
    parts_of,
    project,
    project_back,
    row_blocks,
)

OP = "linear_cross_entropy"
REDUCTIONS = ("mean", "sum", "none")
SMOOTHINGS = ("uniform", "fairseq")
CHUNK_BYTES = 32 * 2**20
CPU_ROWS = 256  # a product of few rows waits for the weight, which is read from memory again for each chunk
ALL_ROWS = -1  # for ``counted``: the op finds out which rows count


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    logit_scale: float = 1.0,
    smoothing: str = "uniform",
    chunk_bytes: int | None = None,
    counted: int | None = None,
) -> Tensor:
    """Cross entropy of ``logit_scale · (hidden weightᵀ) + bias`` with label smoothing; hidden (..., d), labels (...).

    ``reduction``: "mean" over the rows that are not ignored (as in torch: nan, with gradients of 0, when all are),
    "sum", or "none" (the shape of labels, 0 where ignored). ``chunk_bytes`` bounds the buffer that holds the logits of
    some rows at a time; it is never smaller than one row. None: 32 MiB, on a CPU at least 256 rows. ``counted``: how
    many labels are not ``ignore_index``, or a larger number, for a caller who knows: the host then does not wait for a
    CUDA device, and a CUDA graph can hold the call. There a wrong label, or a number that is too small, is an assertion
    of the device and no InputError.

    Raises InputError: shapes that do not fit, devices that differ, labels that are neither words nor ``ignore_index``,
    a label smoothing outside [0, 1], an unknown reduction or smoothing, fewer ``counted`` than there are.
    """
    words = weight.shape[0] if weight.dim() == 2 else None
    if bias is not None and tuple(bias.shape) == (1, words):
        bias = bias.view(words)
    _check(hidden, weight, labels, bias, label_smoothing, reduction, smoothing)
    if counted is not None and (type(counted) is not int or counted < 0):
        raise InputError(f"{OP}: counted is {counted!r}: expected how many labels count, a whole number")
    needs = (torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias))
    if chunk_bytes is None:
        chunk_bytes = _usual_chunk(hidden, words)
    options = (float(label_smoothing), smoothing, float(logit_scale), ignore_index, chunk_bytes)
    options = (*options, ALL_ROWS if counted is None else counted)
    loss, *_ = torch.ops.petl.linear_cross_entropy(
        hidden, parts_of(weight), labels, bias, *options, reduction, *needs, active()
    )
    return loss


def _usual_chunk(hidden: Tensor, words: int) -> int:
    least = CPU_ROWS * words * hidden.itemsize if hidden.device.type == "cpu" else 0
    return max(CHUNK_BYTES, least)


def _check(hidden, weight, labels, bias, label_smoothing, reduction, smoothing) -> None:
    if hidden.dim() == 0:
        raise InputError(f"{OP}: hidden has rank 0: expected (..., d)")
    if not hidden.is_floating_point():
        raise InputError(f"{OP}: hidden has dtype {hidden.dtype}: expected a floating-point tensor")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.numel() == 0:
        raise InputError(
            f"{OP}: weight has shape {shape(weight)}: expected (words, {hidden.shape[-1]})"
            f" for hidden of shape {shape(hidden)}"
        )
    check_parameter(OP, "weight", weight, tuple(weight.shape), hidden)
    if bias is not None:
        check_parameter(OP, "bias", bias, (weight.shape[0],), hidden)
    if labels.shape != hidden.shape[:-1]:
        raise InputError(f"{OP}: labels has shape {shape(labels)}: expected {tuple(hidden.shape[:-1])}")
    if labels.dtype != torch.int64:
        raise InputError(f"{OP}: labels has dtype {labels.dtype}: expected torch.int64")
    check_device(OP, "labels", labels, hidden)
    if not 0 <= label_smoothing <= 1:
        raise InputError(f"{OP}: label_smoothing is {label_smoothing}: expected 0 <= label_smoothing <= 1")
    if reduction not in REDUCTIONS:
        raise InputError(f"{OP}: reduction is {reduction!r}: expected one of {', '.join(REDUCTIONS)}")
    if smoothing not in SMOOTHINGS:
        raise InputError(f"{OP}: smoothing is {smoothing!r}: expected one of {', '.join(SMOOTHINGS)}")
    if smoothing == "fairseq" and label_smoothing and weight.shape[0] == 1:
        raise InputError(f"{OP}: smoothing is 'fairseq' and weight has 1 word: expected at least 2 words")


# What a backend has a kernel for: everything between the products, over one chunk of logits.


@register(OP, "reference")
def reference(
    logits: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    label_weight: float,
    word_weight: float,
    scale: float,
    dlosses: Tensor | None,
    gradient: bool,
) -> Tensor:
    """The losses (rows,) of ``logits`` (rows, V), which ``gradient`` overwrites with dz for ``dlosses`` (rows,) or 1.

    labels (rows,), bias (V,) and dlosses in the dtype of sums; ``label_weight`` is a, ``word_weight`` is c.
    """
    losses = labels.new_empty(labels.shape, dtype=accumulate_dtype(logits.dtype))
    size = max(1, logits.shape[0] // 16)  # wide copies of a few rows, not of the chunk
    for first in range(0, logits.shape[0], size):
        rows = slice(first, first + size)
        z = logits[rows].to(losses.dtype, copy=True).mul_(scale)
        if bias is not None:
            z += bias
        z -= z.amax(1, keepdim=True)
        label = labels[rows].unsqueeze(1)
        log_sum = z.exp().sum(1, keepdim=True).log_()
        loss = log_sum - label_weight * z.gather(1, label)
        if word_weight:  # without it, 0 · inf for words whose logit is -inf
            loss -= word_weight * z.sum(1, keepdim=True)
        losses[rows] = loss.squeeze(1)
        if gradient:
            dz = z.sub_(log_sum).exp_().sub_(word_weight)
            dz.scatter_add_(1, label, dz.new_full(label.shape, -label_weight))
            logits[rows] = dz if dlosses is None else dz.mul_(dlosses[rows].unsqueeze(1))
    return losses


# The products. Another storage of the weight changes these functions and nothing else.


def _project(rows: Tensor, parts: list[Tensor], block_bytes: int, logits: Tensor) -> None:
    """logits (rows, V) = rows (rows, d) Wᵀ"""
    if is_quantised(parts):
        for words in _quantised_blocks(parts, logits.shape[1], rows, block_bytes):
            logits[:, words] = project(rows, part_rows(parts, words, rows.shape[1]), None, active())
        return
    (weight,) = parts
    if weight.dtype == rows.dtype:
        product_into(logits, rows, weight.T)
        return
    for words in _word_blocks(weight.shape, rows.dtype, block_bytes):
        product_into(logits[:, words], rows, weight[words].to(rows.dtype).T)


def _project_back(dlogits: Tensor, parts: list[Tensor], rows: Tensor, block_bytes: int) -> Tensor:
    """dlogits (rows, V) W, in the dtype of dlogits; ``rows`` (rows, d) shows the width of W."""
    if is_quantised(parts):
        total = torch.zeros_like(rows, dtype=accumulate_dtype(rows.dtype))
        for words in _quantised_blocks(parts, dlogits.shape[1], rows, block_bytes):
            total += project_back(dlogits[:, words], part_rows(parts, words, rows.shape[1]), active())
        return total.to(dlogits.dtype)
    (weight,) = parts
    if weight.dtype == dlogits.dtype:
        product_into(total := torch.empty_like(rows), dlogits, weight)
        return total
    total = dlogits.new_zeros(dlogits.shape[0], weight.shape[1], dtype=accumulate_dtype(dlogits.dtype))
    for words in _word_blocks(weight.shape, dlogits.dtype, block_bytes):
        product_into(total, dlogits[:, words], weight[words].to(dlogits.dtype), add=True)
    return total.to(dlogits.dtype)


def _add_weight_gradient(dlogits: Tensor, rows: Tensor, block_bytes: int, total: Tensor) -> None:
    """total (V, d) += dlogitsᵀ rows"""
    for words in _word_blocks(total.shape, rows.dtype, block_bytes):
        product_into(total[words], dlogits[:, words].T, rows, add=True)


def _add_bias_gradient(dlogits: Tensor, block_bytes: int, total: Tensor) -> None:
    """total (V,) += Σ_rows dlogits"""
    # Blocks, because a sum in a wider dtype makes a wide copy of what it sums on a CPU.
    for words in _word_blocks(dlogits.T.shape, total.dtype, block_bytes):
        total[words] += dlogits[:, words].sum(0, dtype=total.dtype)


def _quantised_blocks(parts: list[Tensor], words: int, rows: Tensor, block_bytes: int) -> Iterator[slice]:
    """Blocks of words that are multiplied at a time: as ``_word_blocks``, cut where a quantised weight can be cut."""
    columns = rows.shape[1]
    return row_blocks(parts, words, columns, block_bytes // (columns * rows.itemsize))


def _word_blocks(sizes: torch.Size, dtype: torch.dtype, block_bytes: int) -> Iterator[slice]:
    """Blocks of words of a (words, columns) matrix that take ``block_bytes`` in ``dtype``, but one word at least."""
    words, columns = sizes
    size = max(1, block_bytes // (columns * dtype.itemsize))
    return (slice(first, min(first + size, words)) for first in range(0, words, size))


def compute(
    kernel: Callable,
    hidden: Tensor,
    weight: list[Tensor],
    labels: Tensor,
    bias: Tensor | None,
    label_smoothing: float,
    smoothing: str,
    logit_scale: float,
    ignore_index: int,
    chunk_bytes: int,
    counted: int,
    dlosses: Tensor | None,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int | Tensor]:
    """(losses, dhidden, dweight, dbias, how many rows count), chunk by chunk, through ``kernel`` (see ``reference``).

    The gradients are those of Σ dlosses · losses (dlosses (rows,), or 1), before the factor ``logit_scale`` that
    dhidden and dweight have; shape (0,) where they are not needed.
    """
    d, sums = hidden.shape[-1], accumulate_dtype(hidden.dtype)
    words = out_features(weight, d)
    rows, row_labels = hidden.reshape(-1, d), labels.reshape(-1)
    if counted == ALL_ROWS:
        kept, share = _kept_rows(labels, words, ignore_index), None
        count = rows.shape[0] if kept is None else kept.shape[0]
    else:
        kept, share, count = _first_rows(row_labels, words, ignore_index, counted, sums)
        row_labels = row_labels.clamp(0, words - 1)  # of a row without a share
        dlosses = share if dlosses is None else dlosses * share
    weights = _label_and_word_weight(label_smoothing, smoothing, words)
    bias = None if bias is None else bias.to(sums).contiguous()

    losses = rows.new_zeros(rows.shape[0], dtype=sums)
    dhidden = hidden.new_zeros(hidden.shape) if need_dhidden else empty(hidden)
    dweight = losses.new_zeros(words, d) if need_dweight else empty(losses)
    dbias = losses.new_zeros(words) if need_dbias else empty(losses)
    gradient, block_bytes = need_dhidden or need_dweight or need_dbias, chunk_bytes // 4

    for index, buffer in _chunks(rows, kept, words, chunk_bytes):
        chunk, chunk_dlosses = rows[index], None if dlosses is None else dlosses[index]
        _project(chunk, weight, block_bytes, buffer)
        losses[index] = kernel(buffer, row_labels[index], bias, *weights, logit_scale, chunk_dlosses, gradient)
        if need_dhidden:
            dhidden.view(rows.shape)[index] = _project_back(buffer, weight, chunk, block_bytes)
        if need_dweight:
            _add_weight_gradient(buffer, chunk, block_bytes, dweight)
        if need_dbias:
            _add_bias_gradient(buffer, block_bytes, dbias)
    if share is not None:
        losses = losses.where(share != 0, 0)
    return losses, dhidden, dweight, dbias, count


def _label_and_word_weight(label_smoothing: float, smoothing: str, words: int) -> tuple[float, float]:
    """(a, c) of the formula."""
    if smoothing == "uniform" or not label_smoothing:
        return 1 - label_smoothing, label_smoothing / words
    others = label_smoothing / (words - 1)
    return 1 - label_smoothing - others, others


def _kept_rows(labels: Tensor, words: int, ignore_index: int) -> Tensor | None:
    """Indices of the rows that are not ignored, None for all rows."""
    keep = labels != ignore_index
    wrong = keep & ((labels < 0) | (labels >= words))
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        raise InputError(
            f"{OP}: labels{where} is {labels[tuple(where)].item()}: expected 0 to {words - 1},"
            f" or ignore_index {ignore_index}"
        )
    kept = keep.reshape(-1).nonzero().squeeze(1)
    return None if kept.shape[0] == labels.numel() else kept


def _first_rows(
    labels: Tensor, words: int, ignore_index: int, counted: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(indices of ``counted`` rows, None for all; 1 for each row that counts and 0 for others; their sum).

    All shapes are known to the host, which waits for nothing.
    """
    keep = labels != ignore_index
    right = ~keep | ((labels >= 0) & (labels < words))
    count = keep.sum()
    if labels.is_cuda or labels.is_meta:
        torch._assert_async(right.all() & (count <= counted))
    else:
        _kept_rows(labels, words, ignore_index)  # which names what is wrong
        if count > counted:
            raise InputError(f"{OP}: counted is {counted}: expected at least the {int(count)} labels that count")
    share = keep.to(dtype)
    if counted >= labels.numel():
        return None, share, count
    return torch.argsort(keep.byte(), descending=True, stable=True)[:counted], share, count


def _chunks(rows: Tensor, kept: Tensor | None, words: int, chunk_bytes: int) -> Iterator[tuple[slice | Tensor, Tensor]]:
    """(index of some of the rows, buffer for their logits), chunks of nearly equal size."""
    count = rows.shape[0] if kept is None else kept.shape[0]
    if count == 0:
        return
    # cuBLAS and Triton are fast for rows that begin at multiples of 16 numbers.
    stride = -(-words // 16) * 16 if rows.is_cuda else words
    most = max(1, chunk_bytes // (stride * rows.itemsize))
    size = -(-count // -(-count // most))
    buffer = rows.new_empty(size, stride)
    for first in range(0, count, size):
        last = min(first + size, count)
        yield slice(first, last) if kept is None else kept[first:last], buffer[: last - first, :words]


def _deferred(reduction: str, need_dweight: bool, need_dbias: bool) -> bool:
    """Whether the gradients have to wait for dloss: see ``Saves:``."""
    return reduction == "none" and (need_dweight or need_dbias)


def _forward(
    hidden, weight, labels, bias, label_smoothing, smoothing, logit_scale, ignore_index, chunk_bytes, counted,
    reduction, need_dhidden, need_dweight, need_dbias, backend,
):  # fmt: skip
    needs = (need_dhidden, need_dweight, need_dbias)
    if _deferred(reduction, need_dweight, need_dbias):
        needs = (False, False, False)
    options = (label_smoothing, smoothing, logit_scale, ignore_index, chunk_bytes, counted)
    kernel = dispatch(OP, hidden.device, backend, hidden.dtype)
    losses, *grads, count = compute(kernel, hidden, weight, labels, bias, *options, None, *needs)
    kept = count.to(losses.dtype) if isinstance(count, Tensor) else losses.new_full((), count)
    loss = losses.view(labels.shape) if reduction == "none" else losses.sum()
    return loss / kept if reduction == "mean" else loss, *grads, kept


def _forward_fake(
    hidden, weight, labels, bias, label_smoothing, smoothing, logit_scale, ignore_index, chunk_bytes, counted,
    reduction, need_dhidden, need_dweight, need_dbias, backend,
):  # fmt: skip
    if _deferred(reduction, need_dweight, need_dbias):
        need_dhidden = need_dweight = need_dbias = False
    sums = accumulate_dtype(hidden.dtype)
    loss = hidden.new_empty(labels.shape if reduction == "none" else (), dtype=sums)
    dhidden = hidden.new_empty(hidden.shape if need_dhidden else 0)
    words = out_features(weight, hidden.shape[-1])
    dweight = hidden.new_empty((words, hidden.shape[-1]) if need_dweight else 0, dtype=sums)
    dbias = hidden.new_empty(words if need_dbias else 0, dtype=sums)
    return loss, dhidden, dweight, dbias, loss.new_empty(())


def _backward(
    dlosses, hidden, weight, labels, bias, label_smoothing, smoothing, logit_scale, ignore_index, chunk_bytes, counted,
    need_dhidden, need_dweight, need_dbias, backend,
):  # fmt: skip
    options = (label_smoothing, smoothing, logit_scale, ignore_index, chunk_bytes, counted)
    needs = (need_dhidden, need_dweight, need_dbias)
    dlosses = dlosses.reshape(-1).contiguous()
    kernel = dispatch(OP, hidden.device, backend, hidden.dtype)
    _, dhidden, dweight, dbias, _ = compute(kernel, hidden, weight, labels, bias, *options, dlosses, *needs)
    factor = dlosses.new_full((1,), logit_scale)
    return _scaled(dhidden, factor, hidden.dtype), _scaled(dweight, factor, weight[0].dtype), dbias


def _backward_fake(
    dlosses, hidden, weight, labels, bias, label_smoothing, smoothing, logit_scale, ignore_index, chunk_bytes, counted,
    need_dhidden, need_dweight, need_dbias, backend,
):  # fmt: skip
    dhidden = hidden.new_empty(hidden.shape if need_dhidden else 0)
    dweight = weight[0].new_empty(weight[0].shape if need_dweight else 0)
    return dhidden, dweight, dlosses.new_empty(out_features(weight, hidden.shape[-1]) if need_dbias else 0)


SCALED_BYTES = 2**20


def _scaled(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """values (..., d) times ``factor`` (a number for all, or one a row), multiplied in the dtype of factor.

    In blocks, because a product in a wider dtype makes wide copies of its factors on a CPU.
    """
    scaled = values.new_empty(values.shape, dtype=dtype)
    if values.numel() == 0:
        return scaled
    columns = values.shape[-1]
    rows, out, factor = values.reshape(-1, columns), scaled.view(-1, columns), factor.unsqueeze(1)
    size = max(1, SCALED_BYTES // (columns * factor.itemsize))
    for first in range(0, rows.shape[0], size):
        block = slice(first, first + size)
        torch.mul(rows[block], factor if factor.shape[0] == 1 else factor[block], out=out[block])
    return scaled


def _scaled_fake(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return values.new_empty(values.shape, dtype=dtype)


def _save(ctx, inputs, output) -> None:
    hidden, weight, labels, bias, *ctx.options, ctx.reduction, _, need_dweight, need_dbias, ctx.backend = inputs
    _, *grads, kept = output
    ctx.logit_scale = ctx.options[2]
    ctx.parts = len(weight)
    ctx.dtypes = (weight[0].dtype, None if bias is None else bias.dtype)
    ctx.deferred = _deferred(ctx.reduction, need_dweight, need_dbias)
    ctx.mark_non_differentiable(*grads, kept)
    ctx.set_materialize_grads(False)  # no zeros for the outputs that are gradients
    if ctx.deferred:
        ctx.save_for_backward(hidden, labels, bias, *weight)
    else:
        ctx.save_for_backward(*grads, kept)


def _gradients(ctx, needs, dloss: Tensor | None, *_):
    if dloss is None:
        return None, [None] * ctx.parts, *[None] * (len(needs) - 2)
    need_dhidden, need_dweight, _, need_dbias, *_ = needs
    wanted = (need_dhidden, any(need_dweight), need_dbias)
    grads = _recomputed if ctx.deferred else _finished
    dhidden, dweight, dbias = grads(ctx, dloss, *wanted)
    return dhidden, [dweight] if ctx.parts == 1 else [None] * ctx.parts, None, dbias, *[None] * (len(needs) - 4)


def _recomputed(ctx, dlosses: Tensor, need_dhidden: bool, need_dweight: bool, need_dbias: bool):
    needs = (need_dhidden, need_dweight, need_dbias)
    hidden, labels, bias, *weight = ctx.saved_tensors
    given = (dlosses, hidden, weight, labels, bias, *ctx.options, *needs, ctx.backend)
    grads = torch.ops.petl.linear_cross_entropy_backward(*given)
    dhidden, dweight, dbias = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return dhidden, dweight, dbias.to(ctx.dtypes[1]) if need_dbias else None


def _finished(ctx, dloss: Tensor, need_dhidden: bool, need_dweight: bool, need_dbias: bool):
    dhidden, dweight, dbias, kept = ctx.saved_tensors
    if ctx.reduction == "mean":
        dloss = dloss / kept.clamp(min=1)
    dloss = dloss.reshape(-1)
    factor = dloss * ctx.logit_scale
    scaled = torch.ops.petl.linear_cross_entropy_scaled
    return (
        scaled(dhidden, factor, dhidden.dtype) if need_dhidden else None,
        scaled(dweight, factor, ctx.dtypes[0]) if need_dweight else None,
        scaled(dbias.unsqueeze(0), dloss, ctx.dtypes[1]).squeeze(0) if need_dbias else None,
    )


_OPTIONS = "float label_smoothing, str smoothing, float logit_scale, int ignore_index, int chunk_bytes, int counted"
_NEEDS = "bool need_dhidden, bool need_dweight, bool need_dbias"

define(
    OP,
    f"(Tensor hidden, Tensor[] weight, Tensor labels, Tensor? bias, {_OPTIONS}, str reduction, {_NEEDS}, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    autocast=(0,),
)
define(
    f"{OP}_backward",
    f"(Tensor dlosses, Tensor hidden, Tensor[] weight, Tensor labels, Tensor? bias, {_OPTIONS}, {_NEEDS}, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
define(f"{OP}_scaled", "(Tensor values, Tensor factor, ScalarType dtype) -> Tensor", _scaled, _scaled_fake)
differentiate(OP, _save, _gradients)
