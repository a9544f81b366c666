"""The vocabulary loss chunk of rows by chunk of rows: for a trained or quantized table, biases, scales, caps and fp16.

    z = s · (h Wᵀ) + b, losses, and dz in place of z        for all words of some rows at a time
    z = t · tanh(s · (h Wᵀ) / t) + b                        with a cap; dz is multiplied by 1 - tanh², kept beside z
    dh = dz W,  dW += dzᵀ h,  db += Σ_rows dz               without the factor s

The formulas are in ``ops/linear_cross_entropy.py``. One buffer holds a chunk's logits, and then, in place, dz:
`chunk_bytes` bytes at most, but one row at least; with a cap half of that, since what dz is multiplied by takes as
much. dW is added up, and a W of another dtype than h is cast, for each chunk in blocks of words that take
`chunk_bytes` / 4 more. Each product is over a multiple of 64 words, and the remaining words have one of their own
(``aligned_parts``); dh is then summed in the wide dtype.

Saves: nothing of its own (``ops/linear_cross_entropy.py``).
Source: chunks by rows as in Liger (arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from petl_kernels.dispatch import Kernel, active, register
from petl_kernels.ops.define import accumulate_dtype, empty
from petl_kernels.ops.loss_options import LossOptions, Needs
from petl_kernels.ops.product import ALIGNED, aligned_parts, product_into
from petl_kernels.ops.quantized.products import project, project_back
from petl_kernels.ops.quantized.storage import is_quantized, out_features, part_rows, row_blocks


def compute(
    kernel: Kernel,
    rows: Tensor,
    weight: list[Tensor],
    labels: Tensor,
    counting: Tensor | None,
    bias: Tensor | None,
    dlosses: Tensor | None,
    options: LossOptions,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (losses (rows,), dhidden, dweight, dbias) of Σ dlosses · losses, through ``kernel`` (see ``reference``).

    rows (rows, d), weight in any storage, labels (rows,), bias (V,) in the dtype of sums; counting: indices of the rows
    that count, None for all. Gradients that are not needed have the shape (0,).
    """
    d, sums = rows.shape[1], accumulate_dtype(rows.dtype)
    words = out_features(weight, d)
    losses = rows.new_zeros(rows.shape[0], dtype=sums)
    drows = rows.new_zeros(rows.shape) if needs.hidden else empty(rows)
    dweight = losses.new_zeros(words, d) if needs.weight else empty(losses)
    dbias = losses.new_zeros(words) if needs.bias else empty(losses)
    block_bytes, cap, scale = options.chunk_bytes // 4, options.softcap, options.logit_scale
    factors = (*options.weights(words), 1.0 if cap else scale)
    for index, buffer in chunks(rows, counting, words, options.chunk_bytes // (2 if cap else 1)):
        chunk, chunk_dlosses = rows[index], None if dlosses is None else dlosses[index]
        _project(chunk, weight, block_bytes, buffer)
        slopes = cap_logits(buffer, scale, cap, any(needs)) if cap else None
        losses[index] = kernel(buffer, labels[index], bias, *factors, chunk_dlosses, any(needs))
        if needs.bias:
            _add_bias_gradient(buffer, block_bytes, dbias)
        if slopes is not None and (needs.hidden or needs.weight):
            buffer.mul_(slopes)
        slopes = None  # before the products
        if needs.hidden:
            drows[index] = _project_back(buffer, weight, chunk, block_bytes)
        if needs.weight:
            _add_weight_gradient(buffer, chunk, block_bytes, dweight)
    return losses, drows, dweight, dbias


def chunks(
    rows: Tensor, counting: Tensor | None, words: int, chunk_bytes: int
) -> Iterator[tuple[slice | Tensor, Tensor]]:
    """Yields (index of some of the rows, buffer for their logits), in chunks of nearly equal size."""
    count = rows.shape[0] if counting is None else counting.shape[0]
    if count == 0:
        return
    # cuBLAS and Triton are fast for rows that begin at aligned addresses.
    stride = -(-words // ALIGNED) * ALIGNED if rows.is_cuda else words
    most = max(1, chunk_bytes // (stride * rows.itemsize))
    size = -(-count // -(-count // most))
    buffer = rows.new_empty(size, stride)
    for first in range(0, count, size):
        last = min(first + size, count)
        yield slice(first, last) if counting is None else counting[first:last], buffer[: last - first, :words]


def cap_logits(logits: Tensor, scale: float, softcap: float, gradient: bool) -> Tensor | None:
    """Writes softcap · tanh(scale · logits / softcap) into ``logits`` (rows, V).

    gradient: returns the derivative 1 - tanh² (rows, V) in the dtype of logits, in which it is rounded once.
    """
    slopes = torch.empty_like(logits) if gradient else None
    size = max(1, logits.shape[0] // 16)  # wide copies of a few rows, not of the chunk
    for first in range(0, logits.shape[0], size):
        rows = slice(first, first + size)
        t = logits[rows].to(accumulate_dtype(logits.dtype), copy=True).mul_(scale / softcap).tanh_()
        logits[rows] = t * softcap
        if slopes is not None:
            slopes[rows] = t.square_().neg_().add_(1)
    return slopes


# A backend has a kernel for everything between the products, over one chunk of logits.


@register("linear_cross_entropy", "reference")
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
    """Returns the losses (rows,) of ``logits`` (rows, V), which ``gradient`` overwrites with dz for ``dlosses`` (rows,)
    or 1.

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


# The products: the functions below are the ones that distinguish storages of the weight.


def _project(rows: Tensor, parts: list[Tensor], block_bytes: int, logits: Tensor) -> None:
    """Writes rows (rows, d) Wᵀ into logits (rows, V)."""
    if is_quantized(parts):
        for words in _quantized_blocks(parts, logits.shape[1], rows, block_bytes):
            logits[:, words] = project(rows, part_rows(parts, words, rows.shape[1]), None, active())
        return
    weight = parts[0]
    for words in _dense_blocks(weight, rows.dtype, block_bytes):
        product_into(logits[:, words], rows, weight[words].to(rows.dtype).T)


def _project_back(dlogits: Tensor, parts: list[Tensor], rows: Tensor, block_bytes: int) -> Tensor:
    """Returns dlogits (rows, V) W in the dtype of dlogits; ``rows`` (rows, d) has the width of W."""
    if is_quantized(parts):
        total = torch.zeros_like(rows, dtype=accumulate_dtype(rows.dtype))
        for words in _quantized_blocks(parts, dlogits.shape[1], rows, block_bytes):
            total += project_back(dlogits[:, words], part_rows(parts, words, rows.shape[1]), active())
        return total.to(dlogits.dtype)
    weight = parts[0]
    if weight.dtype == dlogits.dtype and len(aligned_parts(weight.shape[0])) == 1:
        product_into(total := torch.empty_like(rows), dlogits, weight)
        return total
    total = torch.empty_like(rows, dtype=accumulate_dtype(rows.dtype))
    for words in _dense_blocks(weight, dlogits.dtype, block_bytes):
        product_into(total, dlogits[:, words], weight[words].to(dlogits.dtype), add=words.start > 0)
    return total.to(dlogits.dtype)


def _add_weight_gradient(dlogits: Tensor, rows: Tensor, block_bytes: int, total: Tensor) -> None:
    """Adds dlogitsᵀ rows to total (V, d)."""
    for words in _word_blocks(total.shape, rows.dtype, block_bytes):
        product_into(total[words], dlogits[:, words].T, rows, add=True)


def _add_bias_gradient(dlogits: Tensor, block_bytes: int, total: Tensor) -> None:
    """Adds Σ_rows dlogits to total (V,)."""
    # Blocks, because a sum in a wider dtype makes a wide copy of its input on a CPU.
    for words in _word_blocks(dlogits.T.shape, total.dtype, block_bytes):
        total[words] += dlogits[:, words].sum(0, dtype=total.dtype)


def _dense_blocks(weight: Tensor, dtype: torch.dtype, block_bytes: int) -> Iterable[slice]:
    """Returns blocks of words that are multiplied at a time: few where W is cast, all where it has ``dtype``."""
    if weight.dtype == dtype:
        return aligned_parts(weight.shape[0])
    return _word_blocks(weight.shape, dtype, block_bytes)


def _quantized_blocks(parts: list[Tensor], words: int, rows: Tensor, block_bytes: int) -> Iterator[slice]:
    """Yields blocks of words like ``_word_blocks``, cut where a quantized weight can be cut."""
    columns = rows.shape[1]
    return row_blocks(parts, words, columns, _block_size(block_bytes, columns, rows.dtype))


def _word_blocks(sizes: torch.Size, dtype: torch.dtype, block_bytes: int) -> Iterator[slice]:
    """Yields blocks of words of a (words, columns) matrix: ``block_bytes`` in ``dtype``, but one word at least."""
    words, columns = sizes
    size = _block_size(block_bytes, columns, dtype)
    for part in aligned_parts(words):
        for first in range(part.start, part.stop, size):
            yield slice(first, min(first + size, part.stop))


def _block_size(block_bytes: int, columns: int, dtype: torch.dtype) -> int:
    size = max(1, block_bytes // (columns * dtype.itemsize))
    return size // ALIGNED * ALIGNED or size
