"""The vocabulary loss chunk of rows by chunk of rows: for a trained or quantized table, biases, scales, and fp16.

    z = s · (h Wᵀ) + b, losses, and dz in place of z        for all words of some rows at a time
    dh = dz W,  dW += dzᵀ h,  db += Σ_rows dz               without the factor s

The formulas are in ``ops/linear_cross_entropy.py``. One buffer holds a chunk's logits, and then, in place, dz:
`chunk_bytes` bytes at most, but one row at least. dW is added up, and a W of another dtype than h is cast, for each
chunk in blocks of words that take `chunk_bytes` / 4 more. Each product is over a multiple of 64 words, and over what is
left apart (``aligned_parts``); dh is then summed in the wide dtype.

Saves: nothing of its own (``ops/linear_cross_entropy.py``).
Source: chunks by rows as in Liger (arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from petl_kernels.dispatch import active, register
from petl_kernels.ops.common import accumulate_dtype, empty
from petl_kernels.ops.product import ALIGNED, aligned_parts, product_into
from petl_kernels.ops.quantized import is_quantized, out_features, part_rows, project, project_back, row_blocks


def compute(
    kernel: Callable,
    rows: Tensor,
    weight: list[Tensor],
    labels: Tensor,
    kept: Tensor | None,
    bias: Tensor | None,
    weights: tuple[float, float],
    scale: float,
    chunk_bytes: int,
    dlosses: Tensor | None,
    need_drows: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(losses (rows,), dhidden, dweight, dbias) of Σ dlosses · losses, through ``kernel`` (see ``reference``).

    rows (rows, d), weight in parts, labels (rows,), bias (V,) in the dtype of sums; kept: indices of the rows that
    count, None for all; weights: (a, c). Gradients that are not needed have the shape (0,).
    """
    d, sums = rows.shape[1], accumulate_dtype(rows.dtype)
    words = out_features(weight, d)
    losses = rows.new_zeros(rows.shape[0], dtype=sums)
    drows = rows.new_zeros(rows.shape) if need_drows else empty(rows)
    dweight = losses.new_zeros(words, d) if need_dweight else empty(losses)
    dbias = losses.new_zeros(words) if need_dbias else empty(losses)
    gradient, block_bytes = need_drows or need_dweight or need_dbias, chunk_bytes // 4
    for index, buffer in chunks(rows, kept, words, chunk_bytes):
        chunk, chunk_dlosses = rows[index], None if dlosses is None else dlosses[index]
        _project(chunk, weight, block_bytes, buffer)
        losses[index] = kernel(buffer, labels[index], bias, *weights, scale, chunk_dlosses, gradient)
        if need_drows:
            drows[index] = _project_back(buffer, weight, chunk, block_bytes)
        if need_dweight:
            _add_weight_gradient(buffer, chunk, block_bytes, dweight)
        if need_dbias:
            _add_bias_gradient(buffer, block_bytes, dbias)
    return losses, drows, dweight, dbias


def chunks(rows: Tensor, kept: Tensor | None, words: int, chunk_bytes: int) -> Iterator[tuple[slice | Tensor, Tensor]]:
    """(index of some of the rows, buffer for their logits), chunks of nearly equal size."""
    count = rows.shape[0] if kept is None else kept.shape[0]
    if count == 0:
        return
    # cuBLAS and Triton are fast for rows that begin at aligned addresses.
    stride = -(-words // ALIGNED) * ALIGNED if rows.is_cuda else words
    most = max(1, chunk_bytes // (stride * rows.itemsize))
    size = -(-count // -(-count // most))
    buffer = rows.new_empty(size, stride)
    for first in range(0, count, size):
        last = min(first + size, count)
        yield slice(first, last) if kept is None else kept[first:last], buffer[: last - first, :words]


# What a backend has a kernel for: everything between the products, over one chunk of logits.


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
    if is_quantized(parts):
        for words in _quantized_blocks(parts, logits.shape[1], rows, block_bytes):
            logits[:, words] = project(rows, part_rows(parts, words, rows.shape[1]), None, active())
        return
    (weight,) = parts
    for words in _dense_blocks(weight, rows.dtype, block_bytes):
        product_into(logits[:, words], rows, weight[words].to(rows.dtype).T)


def _project_back(dlogits: Tensor, parts: list[Tensor], rows: Tensor, block_bytes: int) -> Tensor:
    """dlogits (rows, V) W, in the dtype of dlogits; ``rows`` (rows, d) shows the width of W."""
    if is_quantized(parts):
        total = torch.zeros_like(rows, dtype=accumulate_dtype(rows.dtype))
        for words in _quantized_blocks(parts, dlogits.shape[1], rows, block_bytes):
            total += project_back(dlogits[:, words], part_rows(parts, words, rows.shape[1]), active())
        return total.to(dlogits.dtype)
    (weight,) = parts
    if weight.dtype == dlogits.dtype and len(aligned_parts(weight.shape[0])) == 1:
        product_into(total := torch.empty_like(rows), dlogits, weight)
        return total
    total = torch.empty_like(rows, dtype=accumulate_dtype(rows.dtype))
    for words in _dense_blocks(weight, dlogits.dtype, block_bytes):
        product_into(total, dlogits[:, words], weight[words].to(dlogits.dtype), add=words.start > 0)
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


def _dense_blocks(weight: Tensor, dtype: torch.dtype, block_bytes: int) -> Iterable[slice]:
    """Blocks of words that are multiplied at a time: few where W is cast, all where it has ``dtype``."""
    if weight.dtype == dtype:
        return aligned_parts(weight.shape[0])
    return _word_blocks(weight.shape, dtype, block_bytes)


def _quantized_blocks(parts: list[Tensor], words: int, rows: Tensor, block_bytes: int) -> Iterator[slice]:
    """Blocks of words that are multiplied at a time: as ``_word_blocks``, cut where a quantized weight can be cut."""
    columns = rows.shape[1]
    return row_blocks(parts, words, columns, _block_size(block_bytes, columns, rows.dtype))


def _word_blocks(sizes: torch.Size, dtype: torch.dtype, block_bytes: int) -> Iterator[slice]:
    """Blocks of words of a (words, columns) matrix that take ``block_bytes`` in ``dtype``, but one word at least."""
    words, columns = sizes
    size = _block_size(block_bytes, columns, dtype)
    for part in aligned_parts(words):
        for first in range(part.start, part.stop, size):
            yield slice(first, min(first + size, part.stop))


def _block_size(block_bytes: int, columns: int, dtype: torch.dtype) -> int:
    size = max(1, block_bytes // (columns * dtype.itemsize))
    return size // ALIGNED * ALIGNED or size
