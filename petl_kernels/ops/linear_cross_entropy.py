"""The vocabulary loss of hidden states, which never holds all of their logits.

    z     = cap(s · (h Wᵀ)) + b                         one row a token; cap(x) = t · tanh(x / t), or x without a t
    loss  = a · (-log p_y) + c · Σ_v (-log p_v)         with p = softmax(z), y the label
          = log Σ_v exp z_v - a · z_y - c · Σ_v z_v     since a + c·V = 1

    label smoothing ε     a              c
    "uniform"             1 - ε          ε / V          ε over all V words: torch, Hugging Face
    "fairseq"             1 - ε - c      ε / (V - 1)    ε over the V - 1 other words

    dz_v  = (p_v - c - a · [v = y]) · dloss
    dx_v  = dz_v · (1 - tanh²)          of the logit below the cap; dz_v without one
    dh    = s · dx W
    dW    = s · dxᵀ h
    db    = Σ_rows dz           (dW and db with fp32 sums over chunks)

h (..., d), W (V, d), labels (...) int64, b (V,) or (1, V) or None; h bf16, fp16, fp32 or fp64, W and b of any such
dtype. The scale comes before the bias, as T5 scales its hidden states (by 1/√d) and has no bias. A
cap t keeps logits between -t and t, as Gemma's are. The loss is fp32 (fp64 for fp64), logits are rounded to h's dtype
as those of ``F.linear`` are, capped ones once more, and all that follows them is fp32.

Rows whose label is ``ignore_index`` are taken out first: no work is done for them, their loss and gradient are 0. To
find them, and labels that are out of range, the host waits for a CUDA device. With ``counted`` it does not: the first
``counted`` rows in the order (those that count, the others) are worked on, with a weight of 1 or 0.

The rest goes one of two ways, each within `chunk_bytes` bytes of buffers:
- a frozen, dense W of h's dtype, without bias, scale and cap, by words (``ops/loss_by_words.py``): two products over
  blocks of many rows and some words, at any memory;
- all else, and fp16, by rows (``ops/loss_by_rows.py``): some rows and all words at a time. `chunk_bytes` is 32 MiB by
  default, and on a CPU 256 rows if that is more: a product of few rows waits there for W, which each chunk reads from
  memory twice. A W of another dtype than h is cast block by block; one of h's dtype is faster. A frozen W may be
  quantized (``ops/quantized``).
Forward forms the gradients as well, for a dloss of 1; backward multiplies them by the true one.

Saves: d · itemsize bytes per row (dh), and 4. W trained: 4·V·d more, once (dW in fp32, like dh until backward); b: 4·V.
``reduction="none"`` with W or b trained keeps h (d · itemsize bytes per row), the labels (8 per row), W and b, and
forms the logits again in backward: a gradient summed over rows cannot be formed before each row's dloss is known.

Source: the derivative of the above; fairseq's label_smoothed_nll_loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from petl_kernels.dispatch import Kernel, active, dispatch
from petl_kernels.errors import InputError
from petl_kernels.ops import loss_by_rows, loss_by_words
from petl_kernels.ops.checks import check_device, check_floating, check_parameter, shape
from petl_kernels.ops.define import accumulate_dtype, define, differentiate, empty
from petl_kernels.ops.loss_options import ALL_ROWS, NOTHING, LossOptions, Needs
from petl_kernels.ops.quantized.storage import is_quantized, out_features
from petl_kernels.ops.quantized.tensor import parts_of

OP = "linear_cross_entropy"
REDUCTIONS = ("mean", "sum", "none")
SMOOTHINGS = ("uniform", "fairseq")
CHUNK_BYTES = 32 * 2**20
CPU_ROWS = 256  # a product of few rows waits for the weight, which is read from memory again for each chunk


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
    softcap: float = 0.0,
) -> Tensor:
    """Returns the cross entropy of ``logit_scale · (hidden weightᵀ) + bias``; hidden (..., d), labels (...).

    ``reduction``: "mean" over the rows that are not ignored (as in torch: nan, with gradients of 0, when all are),
    "sum", or "none" (the shape of labels, 0 where ignored). ``chunk_bytes`` bounds the buffers that hold the logits of
    some rows at a time; they are never smaller than one row. None: 32 MiB, on a CPU at least 256 rows. ``counted``: how
    many labels are not ``ignore_index``, or a larger number: the host then does not wait for a CUDA device, and a CUDA
    graph can hold the call. There a wrong label, or a number that is too small, is an assertion of the device and no
    InputError. ``softcap``: the t of the cap on the logits, 0 for none.

    Raises InputError: shapes that do not fit, devices that differ, labels that are neither words nor ``ignore_index``,
    a label smoothing outside [0, 1], an unknown reduction or smoothing, fewer ``counted`` than there are,
    a softcap below 0.
    """
    words = weight.shape[0] if weight.dim() else 0
    if bias is not None and tuple(bias.shape) == (1, words):
        bias = bias.view(words)
    _check(hidden, weight, labels, bias, label_smoothing, reduction, smoothing)
    if counted is not None and (type(counted) is not int or counted < 0):
        raise InputError(f"{OP}: counted is {counted!r}: expected how many labels count, a whole number")
    if not softcap >= 0:
        raise InputError(f"{OP}: softcap is {softcap}: expected a number above 0, or 0 for none")
    needs = (torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias))
    chunk_bytes = _usual_chunk(hidden, words) if chunk_bytes is None else chunk_bytes
    counted = ALL_ROWS if counted is None else counted
    options = float(label_smoothing), smoothing, float(logit_scale), ignore_index, chunk_bytes, counted, float(softcap)
    tensors = hidden, parts_of(weight), labels, bias
    loss, *_ = torch.ops.petl.linear_cross_entropy(*tensors, *options, reduction, *needs, active())
    return loss


def _usual_chunk(hidden: Tensor, words: int) -> int:
    least = CPU_ROWS * words * hidden.itemsize if hidden.device.type == "cpu" else 0
    return max(CHUNK_BYTES, least)


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    label_smoothing: float,
    reduction: str,
    smoothing: str,
) -> None:
    if hidden.dim() == 0:
        raise InputError(f"{OP}: hidden has rank 0: expected (..., d)")
    check_floating(OP, "hidden", hidden)
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


class Kernels(NamedTuple):
    """A backend's passes between the products: over rows of logits, and those of ``ops/loss_by_words.py``."""

    rows: Kernel
    words: loss_by_words.Kernels


def kernels_from(kernel: Callable[[str], Kernel]) -> Kernels:
    """Returns the passes among a backend's kernels, each of which ``kernel`` returns for its name."""
    return Kernels(kernel(OP), loss_by_words.Kernels(*(kernel(OP + part) for part in ("_begin", "_words", "_end"))))


def kernels_of(device: torch.device, backend: str, dtype: torch.dtype) -> Kernels:
    """Returns the passes for hidden states of ``dtype`` on ``device``; ``backend``: a name, or "" for the default."""
    return kernels_from(lambda name: dispatch(name, device, backend, dtype))


def compute(
    kernels: Kernels,
    hidden: Tensor,
    weight: list[Tensor],
    labels: Tensor,
    bias: Tensor | None,
    dlosses: Tensor | None,
    options: LossOptions,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int | Tensor]:
    """Returns (losses, dhidden, dweight, dbias, how many rows count), by words where that way serves, else by rows.

    The gradients are those of Σ dlosses · losses (dlosses (rows,), or 1), before the factor ``logit_scale`` that
    dhidden and dweight have; their shape is (0,) where they are not needed.
    """
    d, sums = hidden.shape[-1], accumulate_dtype(hidden.dtype)
    words = out_features(weight, d)
    rows, row_labels = hidden.reshape(-1, d), labels.reshape(-1).contiguous()
    if options.counted == ALL_ROWS:
        counting, share = _counting_rows(labels, words, options.ignore_index), None
        count = rows.shape[0] if counting is None else counting.shape[0]
    else:
        counting, share, count = _first_rows(row_labels, words, options, sums)
        row_labels = row_labels.clamp(0, words - 1)  # of a row without a share
        dlosses = share if dlosses is None else dlosses * share
    if loss_by_words.serves(hidden, weight, bias, options.logit_scale, needs.weight, options.softcap):
        losses, dhidden = loss_by_words.compute(
            kernels.words, rows, weight[0], row_labels, counting, dlosses, options, gradient=needs.hidden
        )
        dweight, dbias = empty(losses), empty(losses)
    else:
        bias = None if bias is None else bias.to(sums).contiguous()
        tensors = rows, weight, row_labels, counting, bias, dlosses
        losses, dhidden, dweight, dbias = loss_by_rows.compute(kernels.rows, *tensors, options, needs)
    if share is not None:
        losses = losses.where(share != 0, 0)
    return losses, dhidden.view(hidden.shape) if needs.hidden else dhidden, dweight, dbias, count


def _counting_rows(labels: Tensor, words: int, ignore_index: int) -> Tensor | None:
    """Returns the indices of the rows that are not ignored, None for all rows. Raises InputError for a wrong label."""
    keep = labels != ignore_index
    wrong = keep & ((labels < 0) | (labels >= words))
    if wrong.any():
        where = cast("list[int]", wrong.nonzero()[0].tolist())  # pyright: ignore[reportUnknownMemberType]
        raise InputError(
            f"{OP}: labels{where} is {labels[tuple(where)].item()}: expected 0 to {words - 1},"
            f" or ignore_index {ignore_index}"
        )
    counting = keep.reshape(-1).nonzero().squeeze(1)
    return None if counting.shape[0] == labels.numel() else counting


def _first_rows(
    labels: Tensor, words: int, options: LossOptions, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Returns indices of ``counted`` rows (None for all), 1 for each row that counts and 0 for others, and their sum.

    No shape depends on the labels, so the host waits for nothing.
    """
    ignore_index, counted = options.ignore_index, options.counted
    keep = labels != ignore_index
    right = ~keep | ((labels >= 0) & (labels < words))
    count = keep.sum()
    if labels.is_cuda or labels.is_meta:
        torch._assert_async(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            right.all() & (count <= counted)
        )
    else:
        _counting_rows(labels, words, ignore_index)  # raises an error that names a wrong label
        if count > counted:
            raise InputError(f"{OP}: counted is {counted}: expected at least the {int(count)} labels that count")
    share = keep.to(dtype)
    if counted >= labels.numel():
        return None, share, count
    return torch.argsort(keep.byte(), descending=True, stable=True)[:counted], share, count


def _deferred(reduction: str, needs: Needs) -> bool:
    """Returns whether the gradients have to wait for dloss: see ``Saves:``."""
    return reduction == "none" and (needs.weight or needs.bias)


def _forward(
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
    softcap: float,
    reduction: str,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    options = LossOptions(label_smoothing, smoothing, logit_scale, ignore_index, chunk_bytes, counted, softcap)
    needs = Needs(need_dhidden, need_dweight, need_dbias)
    if _deferred(reduction, needs):
        needs = NOTHING
    kernels = kernels_of(hidden.device, backend, hidden.dtype)
    losses, *grads, count = compute(kernels, hidden, weight, labels, bias, None, options, needs)
    count = count.to(losses.dtype) if isinstance(count, Tensor) else losses.new_full((), count)
    loss = losses.view(labels.shape) if reduction == "none" else losses.sum()
    return loss / count if reduction == "mean" else loss, *grads, count


def _forward_fake(
    hidden: Tensor, weight: list[Tensor], labels: Tensor, bias: Tensor | None, *given: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, reduction, need_dhidden, need_dweight, need_dbias, _ = given
    needs = Needs(need_dhidden, need_dweight, need_dbias)
    if _deferred(reduction, needs):
        needs = NOTHING
    sums = accumulate_dtype(hidden.dtype)
    loss = hidden.new_empty(labels.shape if reduction == "none" else (), dtype=sums)
    dhidden = hidden.new_empty(hidden.shape if needs.hidden else 0)
    words = out_features(weight, hidden.shape[-1])
    dweight = hidden.new_empty((words, hidden.shape[-1]) if needs.weight else 0, dtype=sums)
    dbias = hidden.new_empty(words if needs.bias else 0, dtype=sums)
    return loss, dhidden, dweight, dbias, loss.new_empty(())


def _backward(
    dlosses: Tensor,
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
    softcap: float,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    options = LossOptions(label_smoothing, smoothing, logit_scale, ignore_index, chunk_bytes, counted, softcap)
    needs = Needs(need_dhidden, need_dweight, need_dbias)
    dlosses = dlosses.reshape(-1).contiguous()
    kernels = kernels_of(hidden.device, backend, hidden.dtype)
    _, dhidden, dweight, dbias, _ = compute(kernels, hidden, weight, labels, bias, dlosses, options, needs)
    factor = dlosses.new_full((1,), logit_scale)
    return _scaled(dhidden, factor, hidden.dtype), _scaled(dweight, factor, weight[0].dtype), dbias


def _backward_fake(
    dlosses: Tensor, hidden: Tensor, weight: list[Tensor], labels: Tensor, bias: Tensor | None, *given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_dhidden, need_dweight, need_dbias, _ = given
    dhidden = hidden.new_empty(hidden.shape if need_dhidden else 0)
    dweight = weight[0].new_empty(weight[0].shape if need_dweight else 0)
    return dhidden, dweight, dlosses.new_empty(out_features(weight, hidden.shape[-1]) if need_dbias else 0)


SCALED_BYTES = 2**20


def _scaled(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns values (..., d) times ``factor`` (one number, or one a row), multiplied in the dtype of factor.

    It goes block by block, because a product in a wider dtype makes wide copies of its factors on a CPU.
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


def _save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    hidden, weight, labels, bias, *options, ctx.reduction, need_dhidden, need_dweight, need_dbias, ctx.backend = inputs
    _, *grads, count = output
    ctx.options = LossOptions(*options)
    ctx.weights, ctx.trains_weight = len(weight), not is_quantized(weight)
    ctx.dtypes = (weight[0].dtype, None if bias is None else bias.dtype)
    ctx.deferred = _deferred(ctx.reduction, Needs(need_dhidden, need_dweight, need_dbias))
    ctx.mark_non_differentiable(*grads, count)
    ctx.set_materialize_grads(False)  # no zeros for the outputs that are gradients
    if ctx.deferred:
        ctx.save_for_backward(hidden, labels, bias, *weight)
    else:
        ctx.save_for_backward(*grads, count)


def _gradients(ctx: Any, needs: Sequence[Any], dloss: Tensor | None, *others: Any) -> tuple[Any, ...]:
    if dloss is None:
        return None, [None] * ctx.weights, *[None] * (len(needs) - 2)
    need_dhidden, need_dweight, _, need_dbias, *_ = needs
    wanted = Needs(need_dhidden, any(need_dweight), need_dbias)
    grads = _recomputed if ctx.deferred else _finished
    dhidden, dweight, dbias = grads(ctx, dloss, wanted)
    dweights = [dweight] if ctx.trains_weight else [None] * ctx.weights
    return dhidden, dweights, None, dbias, *[None] * (len(needs) - 4)


def _recomputed(ctx: Any, dlosses: Tensor, needs: Needs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    hidden, labels, bias, *weight = ctx.saved_tensors
    options = dataclasses.astuple(ctx.options)
    grads = torch.ops.petl.linear_cross_entropy_backward(
        dlosses, hidden, weight, labels, bias, *options, *needs, ctx.backend
    )
    dhidden, dweight, dbias = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return dhidden, dweight, None if dbias is None else dbias.to(ctx.dtypes[1])


def _finished(ctx: Any, dloss: Tensor, needs: Needs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dhidden, dweight, dbias, count = ctx.saved_tensors
    if ctx.reduction == "mean":
        dloss = dloss / count.clamp(min=1)
    dloss = dloss.reshape(-1)
    factor = dloss * ctx.options.logit_scale
    scaled = torch.ops.petl.linear_cross_entropy_scaled
    return (
        scaled(dhidden, factor, dhidden.dtype) if needs.hidden else None,
        scaled(dweight, factor, ctx.dtypes[0]) if needs.weight else None,
        scaled(dbias.unsqueeze(0), dloss, ctx.dtypes[1]).squeeze(0) if needs.bias else None,
    )


_OPTIONS = (
    "float label_smoothing, str smoothing, float logit_scale, int ignore_index, int chunk_bytes, int counted, "
    "float softcap"
)
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
