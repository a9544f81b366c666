"""The vocabulary loss of a frozen table, block of words by block of words: an attention whose keys and values are W.

    z  = h W_kᵀ                                 one block k of words at a time, a product of the library's
    E  = exp(z - m), 0 for the label            in place of z, in the dtype of h
    r += Σ E                                    in the dtype of sums
    O += E W_k                                  a product of the library's, in the dtype of sums

    s    = r + exp(z_y - m)                     at the end; z_y = h · W_y
    loss = log s - a · (z_y - m) - c · Σ_v (z_v - m)         Σ_v z_v = h · w̄,  w̄ = Σ_v W_v
    dh   = (O / s + (exp(z_y - m) / s - a) W_y - c w̄) · dloss

a and c are those of ``ops/linear_cross_entropy.py``. No row has to be complete before the second product, so a block
has all the rows that fit and few words: W is read once a block of rows and not once for some 60 of them, and both
products are over a multiple of 64 words, but for the last few words. (An odd number of words costs a card three
times as much.) Each logit is met once. The label's is a sum in the wide dtype that nothing rounds, and its gradient is
made without E, whose rounding would be the largest there.

Each row has its own m: first the larger of z_y and the first block's largest logit. Any m is right as long as no E is
too large, so it rises only when a later block has a logit above m + 8: r and the row of O are then multiplied by
exp(m - new m). E is e⁸ at most, far inside of the range that bf16 and fp32 share; values below e⁻⁸⁷ of the largest
are 0. Rows that rise are rare, others cost nothing, and the host waits for nothing. -inf, inf and NaN among logits have
the effect that they have in a softmax. fp16 does not have that range.

O and E, and the rows of h where they are copied, take `chunk_bytes` bytes, but one row of 64 words at least. They are
copied where those that count lie apart, or numbers of a row do.

Saves: nothing of its own (``ops/linear_cross_entropy.py``).
Source: softmax of one pass (arXiv 1805.02867) with lazy rescaling; no code of others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from petl_kernels.dispatch import Kernel, register
from petl_kernels.ops.define import accumulate_dtype, empty
from petl_kernels.ops.loss_options import LossOptions
from petl_kernels.ops.product import ALIGNED, aligned_parts, product_into
from petl_kernels.ops.quantized.storage import is_quantized

RISE = 8.0  # how far above m a logit may be: see above
# A CPU's second cache holds a block of E or of O, and the third both. A card needs tiles for all its multiprocessors,
# and a block of E that has at least as many bytes as the rows of O that it is added to.
CPU_ROWS, CPU_WORDS = 512, 1024
LEAST_WORDS, MOST_WORDS = 2048, 8192
SUMMED_WORDS = 256  # at a time, because a sum in a wider dtype makes a wide copy of its input on a CPU


class Kernels(NamedTuple):
    """A backend's passes between the products: see ``begin``, ``words`` and ``end``."""

    begin: Kernel
    words: Kernel
    end: Kernel


class Blocks(NamedTuple):
    """The sizes of the blocks: rows at a time, and words at a time."""

    rows: int
    words: int


def serves(
    hidden: Tensor, weight: list[Tensor], bias: Tensor | None, scale: float, trained: bool, softcap: float = 0.0
) -> bool:
    """Returns whether a loss of these tensors goes this way."""
    fits = not is_quantized(weight) and weight[0].dtype == hidden.dtype and weight[0].stride(1) == 1
    return fits and hidden.dtype != torch.float16 and bias is None and scale == 1 and not softcap and not trained


def blocks_of(
    rows: int,
    d: int,
    words: int,
    dtype: torch.dtype,
    device: str,
    chunk_bytes: int,
    copied: bool,
    gradient: bool = True,
) -> Blocks:
    """Returns the sizes that keep the buffers within ``chunk_bytes``; ``copied``: the rows of h are copied, too.

    The words of a block are a power of two, so that blocks begin at aligned addresses: 64, or more.
    """
    beside = _bytes_beside(d, dtype, copied, gradient)
    least, most = _words_of_blocks(words, device)
    fitting = max(1, chunk_bytes // (beside + least * dtype.itemsize))
    size = min(rows, fitting, CPU_ROWS) if device == "cpu" else min(rows, fitting)
    size = -(-rows // -(-rows // size))
    room = max(ALIGNED, (chunk_bytes // size - beside) // dtype.itemsize)
    return Blocks(size, min(most, 1 << (room.bit_length() - 1)))


def most_bytes(rows: int, d: int, words: int, dtype: torch.dtype, device: str, chunk_bytes: int, gradient: bool) -> int:
    """Returns the most bytes of the buffers, whichever of the rows count."""
    beside, (_, most) = _bytes_beside(d, dtype, True, gradient), _words_of_blocks(words, device)
    all_rows = min(rows, CPU_ROWS) if device == "cpu" else rows
    whole = all_rows * (beside + most * dtype.itemsize)
    return max(min(whole, chunk_bytes), beside + ALIGNED * dtype.itemsize)


def _bytes_beside(d: int, dtype: torch.dtype, copied: bool, gradient: bool) -> int:
    """Returns the bytes of a row's O and of its copy."""
    return d * (accumulate_dtype(dtype).itemsize * gradient + dtype.itemsize * copied)


def _words_of_blocks(words: int, device: str) -> tuple[int, int]:
    """Returns the fewest words of a block, for which rows are given up, and the most."""
    least, most = (CPU_WORDS, CPU_WORDS) if device == "cpu" else (LEAST_WORDS, MOST_WORDS)
    all_words = max(ALIGNED, 1 << (words - 1).bit_length())
    return min(least, all_words), min(most, all_words)


def compute(
    kernels: Kernels,
    rows: Tensor,
    weight: Tensor,
    labels: Tensor,
    counting: Tensor | None,
    dlosses: Tensor | None,
    options: LossOptions,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Returns losses (rows,) in the dtype of sums, and dhidden (rows, d) of Σ dlosses · losses.

    rows (rows, d), weight (V, d), labels (rows,); counting: indices of the rows that count, None for all. Without
    ``gradient`` dhidden has the shape (0,).
    """
    (count, d), words, sums = rows.shape, weight.shape[0], accumulate_dtype(rows.dtype)
    losses = rows.new_zeros(count, dtype=sums)
    drows = rows.new_zeros(count, d) if gradient else empty(rows)
    count = count if counting is None else counting.shape[0]
    if count == 0:
        return losses, drows
    weights = options.weights(words)
    word_sum = _word_sum(weight, sums) if weights[1] else None
    copied = counting is not None or not rows.is_contiguous()
    blocks = blocks_of(count, d, words, rows.dtype, rows.device.type, options.chunk_bytes, copied, gradient)
    logits = rows.new_empty(blocks.rows, blocks.words)
    total = rows.new_empty(blocks.rows, d, dtype=sums) if gradient else None
    for first in range(0, count, blocks.rows):
        last = min(first + blocks.rows, count)
        index = slice(first, last) if counting is None else counting[first:last]
        some, some_labels = rows[index].contiguous(), labels[index]
        some_dlosses = None if dlosses is None else dlosses[index]
        some_total = None if total is None else total[: last - first]
        # Rows that were copied have no use once their sums are made: their gradient takes their place.
        out = None if total is None else drows[index] if counting is None else some
        state = kernels.begin(some, weight, some_labels, word_sum)
        _all_words(kernels.words, some, weight, some_labels, logits[: last - first], state, some_total)
        losses[index] = kernels.end(weight, some_labels, state, some_total, word_sum, *weights, some_dlosses, out)
        if out is not None and counting is not None:
            drows[index] = out
        del some, out  # before the next are copied
    return losses, drows


def _all_words(
    kernel: Kernel, rows: Tensor, weight: Tensor, labels: Tensor, logits: Tensor, state: Tensor, total: Tensor | None
) -> None:
    """Adds Σ E to ``state`` and E W to ``total`` (rows, d), block by block; ``logits`` (rows, words of a block)."""
    words, size = weight.shape[0], logits.shape[1]
    for first in range(0, words, size):
        block = weight[first : first + size]
        z = logits[:, : block.shape[0]]
        for part in aligned_parts(block.shape[0]):
            product_into(z[:, part], rows, block[part].T)
        kernel(z, labels, first, state, total, first == 0)
        if total is not None:
            for part in aligned_parts(block.shape[0]):
                product_into(total, z[:, part], block[part], add=first + part.start > 0)


def _word_sum(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns w̄ (d,) in ``dtype``; made for each call, since a frozen table may be another one at the next."""
    if weight.device.type != "cpu":
        return weight.sum(0, dtype=dtype)
    total = weight.new_zeros(weight.shape[1], dtype=dtype)
    for first in range(0, weight.shape[0], SUMMED_WORDS):
        total += weight[first : first + SUMMED_WORDS].sum(0, dtype=dtype)
    return total


# A backend has kernels for the passes below. ``state`` (4, rows) in the dtype of sums: m, r, z_y and h · w̄ of each
# row.


@register("linear_cross_entropy_begin", "reference", op="linear_cross_entropy")
def begin(rows: Tensor, weight: Tensor, labels: Tensor, word_sum: Tensor | None) -> Tensor:
    """Returns the state of ``rows`` (rows, d) before the first block of words; ``word_sum``: w̄ (d,), or None."""
    state = rows.new_zeros(4, rows.shape[0], dtype=accumulate_dtype(rows.dtype))
    for some in _few(rows):
        wide = rows[some].to(state.dtype)
        state[2, some] = (wide * weight[labels[some]]).sum(1)
        if word_sum is not None:
            state[3, some] = wide @ word_sum
    state[0] = state[2]
    return state


@register("linear_cross_entropy_words", "reference", op="linear_cross_entropy")
def words(logits: Tensor, labels: Tensor, first: int, state: Tensor, total: Tensor | None, fresh: bool) -> None:
    """Writes E in place of ``logits`` (rows, words), whose first word is ``first``, and m and r into ``state``.

    Where m rises, r and the row of ``total`` (rows, d) are multiplied. ``fresh``: nothing is in either yet. Without
    ``total`` E is not read afterwards, and need not be written.
    """
    for some in _few(logits):
        z = logits[some].to(state.dtype, copy=True)
        label = labels[some].unsqueeze(1) - first
        z.masked_fill_(torch.arange(z.shape[1], device=z.device) == label, -torch.inf)
        old, largest = state[0, some], z.amax(1)
        if fresh:
            top = torch.maximum(old, largest)
        else:
            top = torch.where(largest > old + RISE, largest, old)
            factor = torch.where(top == old, 1, (old - top).exp())
            state[1, some] *= factor
            if total is not None:
                total[some] *= factor.unsqueeze(1)
        origin = torch.where(top == -torch.inf, 0, top)  # so far all words are switched off
        z.sub_(origin.unsqueeze(1)).exp_()
        state[0, some] = top
        state[1, some] += z.sum(1)
        logits[some] = z


@register("linear_cross_entropy_end", "reference", op="linear_cross_entropy")
def end(
    weight: Tensor,
    labels: Tensor,
    state: Tensor,
    total: Tensor | None,
    word_sum: Tensor | None,
    label_weight: float,
    word_weight: float,
    dlosses: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """Returns the losses (rows,), and writes their gradient for ``dlosses`` (rows,), or 1, into ``out`` (rows, d)."""
    top, rest, label_logit, word_logits = state
    label = (label_logit - top).exp()
    both = rest + label
    losses = both.log() - label_weight * (label_logit - top)
    if word_sum is not None:
        losses -= word_weight * (word_logits - weight.shape[0] * top)
    if out is None:
        return losses
    assert total is not None
    for some in _few(out):
        # p_y - a, without the difference of two numbers near 1
        factor = (1 - label_weight) - rest[some] / both[some]
        dh = total[some] / both[some].unsqueeze(1)
        dh += factor.unsqueeze(1) * weight[labels[some]]
        if word_sum is not None:
            dh -= word_weight * word_sum
        out[some] = dh if dlosses is None else dh.mul_(dlosses[some].unsqueeze(1))
    return losses


def _few(rows: Tensor) -> list[slice]:
    """Returns slices of a few rows each, since wide copies of these are smaller than those of the block."""
    size = max(1, rows.shape[0] // 16)
    return [slice(first, first + size) for first in range(0, rows.shape[0], size)]
