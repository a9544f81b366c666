"""The vocabulary loss by words: against the formula on full logits, and what it takes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from planning.peaks import peak_bytes
from torch.nn import functional as F

from petl_kernels import ops, parity
from petl_kernels.ops import loss_by_rows, loss_by_words
from petl_kernels.ops.linear_cross_entropy import compute, kernels_of
from petl_kernels.ops.loss_options import ALL_ROWS, LossOptions, Needs
from petl_kernels.ops.product import ALIGNED, aligned_parts, widens
from petl_kernels.planning.scratch import scratch_bytes

from . import contract
from .test_linear_cross_entropy import loss_of

OP = "linear_cross_entropy"
FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16


def arguments_of(dtype, rows=(33,), words=206, **options) -> dict:
    draw = contract.source(dtype, words)
    return parity.linear_cross_entropy_arguments(draw, rows, words=words, bias=False, frozen=True, **options)


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("smoothing", ["uniform", "fairseq", "no"])
@pytest.mark.parametrize("words", [1, 7, 206, 2049])
def test_values_and_gradients(backend, dtype, smoothing, words):
    smooth = {"label_smoothing": 0.0} if smoothing == "no" or words == 1 else {"smoothing": smoothing}
    options = {"chunk_rows": 2, "dlosses": words == 7, "counted": 40 if words == 206 else -1}
    contract.assert_parity(OP, backend, arguments_of(dtype, words=words, **options, **smooth))


def rows_of(kind: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden, weight, labels); a label in every block of words."""
    draw = contract.source(FP64, 3)
    rows, d, words = 96, 64, 2049
    weight, labels = draw(words, d, std=d**-0.5).to(dtype), torch.linspace(0, words - 1, rows).long()
    hidden = draw(rows, d)
    if kind == "peaked":
        hidden += 12 * weight[labels].double()
    elif kind == "far below":  # losses of some hundred nats
        hidden -= 200 * weight[labels].double()
    elif kind == "rising":  # each block has a word that is by 100 more likely than all before it
        weight[torch.arange(60, words, 128)] = weight[60] * torch.arange(1.0, 17).unsqueeze(1).to(dtype)
        hidden += 100 * weight[60].double() / weight[60].double().square().sum()
    return hidden.to(dtype), weight, labels


def errors_of(computed: dict, exact: dict) -> dict[str, float]:
    return {name: ((computed[name].double() - exact[name]).norm() / exact[name].norm()).item() for name in exact}


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("smoothing", ["uniform", "fairseq", "no"])
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16], ids=str)
@pytest.mark.parametrize("kind", ["random", "peaked", "far below", "rising"])
def test_the_formula_on_full_logits(backend, smoothing, dtype, kind):
    hidden, weight, labels = rows_of(kind, dtype)
    options = {"label_smoothing": 0.0 if smoothing == "no" else 0.1, "reduction": "none"}
    options["smoothing"] = "fairseq" if smoothing == "fairseq" else "uniform"
    dloss = torch.ones(len(labels), dtype=FP64)

    def ours(hidden):
        assert loss_by_words.serves(hidden, [weight], None, 1.0, False)
        return ops.linear_cross_entropy(hidden, weight, labels, chunk_bytes=20 * 1024, **options)

    def plain(hidden):
        wide = weight.to(hidden.dtype)
        logits = hidden @ wide.T
        # the formula on logits of h's dtype, with sums in fp32
        eye = torch.eye(weight.shape[0], dtype=FP64 if hidden.dtype == FP64 else FP32)
        return loss_of(logits.to(eye.dtype), eye, labels, **options)

    exact = contract.gradients(plain, {"hidden": hidden.double()}, dloss)
    eager = errors_of(contract.gradients(plain, {"hidden": hidden}, dloss.to(FP64 if dtype == FP64 else FP32)), exact)
    with ops.use(backend):
        found = contract.gradients(ours, {"hidden": hidden}, dloss.to(FP64 if dtype == FP64 else FP32))
    mine = errors_of(found, exact)
    for name, error in mine.items():  # nothing is more exact than fp64
        assert error <= (1e-12 if dtype == FP64 else 2 * eager[name]), (name, error, eager[name])
    if dtype == BF16:
        assert kind == "rising" or mine["y"] <= eager["y"]  # the label's logit is not rounded
        assert kind != "peaked" or mine["dhidden"] <= 1.05 * eager["dhidden"]


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("word", [3, 70, 205])
def test_logits_that_are_no_numbers(backend, dtype, value, word):
    """In the first block and in a later one, the label's and another's; only their own rows are touched."""
    hidden, weight = torch.randn(6, 8).to(dtype), torch.randn(206, 8).to(dtype)
    hidden[:, 0] = 0
    hidden[2:4, 0] = 1e30 if value == value else math.nan
    weight[:, 0] = 0
    weight[word, 0] = 1e30 * math.copysign(1, value)
    labels = torch.tensor([word, 9, word, 9, 100, 204])
    for smoothing in (0.0, 0.1):
        leaf, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        with ops.use(backend):
            losses = ops.linear_cross_entropy(
                leaf, weight, labels, label_smoothing=smoothing, reduction="none", chunk_bytes=1024
            )
        logits = F.linear(plain, weight).float()
        expected = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        torch.testing.assert_close(losses, expected, equal_nan=True, rtol=2e-2, atol=2e-2)
        (grad,), (wanted,) = torch.autograd.grad(losses.sum(), leaf), torch.autograd.grad(expected.sum(), plain)
        columns = slice(1, None)  # 0 · 1e30 and inf - inf in the other
        torch.testing.assert_close(grad[:, columns], wanted[:, columns], equal_nan=True, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_a_block_of_words_that_are_switched_off(backend):
    """The first block, with the label in it and without: nothing is known of a row's size until the second."""
    hidden, weight = torch.ones(2, 4), torch.randn(200, 4)
    weight[:64] = -1e38
    hidden *= 10
    labels = torch.tensor([5, 100])
    with ops.use(backend):
        losses = ops.linear_cross_entropy(hidden, weight, labels, reduction="none", chunk_bytes=1)
    torch.testing.assert_close(losses, F.cross_entropy(hidden @ weight.T, labels, reduction="none"))
    assert losses[0] == torch.inf and losses[1].isfinite()


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_ignored_rows_are_not_looked_at(backend):
    arguments = arguments_of(FP32, rows=(17,))
    ignored = arguments["labels"] == -100
    arguments["hidden"][ignored] = torch.nan
    values = parity.run(OP, backend, arguments)
    assert all(value.isfinite().all() for value in values.values()) and not values["dhidden"][ignored].any()


@pytest.mark.parametrize("counted", [26, 30, 33])
def test_counted_changes_nothing(counted):
    given = arguments_of(FP64)
    assert (given["labels"] != -100).sum() == 26
    values = [parity.run(OP, "reference", given | {"counted": number}) for number in (-1, counted)]
    for name in values[0]:
        torch.testing.assert_close(values[1][name], values[0][name], msg=name)


def test_the_sum_of_words_is_that_of_the_table_as_it_is():
    hidden, weight, labels = torch.randn(5, 8), torch.randn(90, 8), torch.arange(5)
    for _ in range(2):
        loss = ops.linear_cross_entropy(hidden, weight, labels, label_smoothing=0.5)
        torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, labels, label_smoothing=0.5))
        weight.data.mul_(-2)


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_same_bits_with_one_thread_and_two(backend, dtype):
    arguments = arguments_of(dtype, rows=(70,), chunk_rows=20)
    contract.assert_deterministic(OP, backend, arguments, (1, 2) if backend == "cpu" else (2, 2))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("gradient", [True, False])
def test_blocks_fit(device, gradient):
    """O, E and the copied rows within the bytes that are given, or one row of 64 words."""
    for rows, d, words in ((8192, 1024, 256206), (1, 8, 1), (77, 2048, 32128), (5000, 64, 300)):
        for chunk_bytes in (1, 5000, 2 << 20, 32 << 20, 300 << 20):
            for dtype in (BF16, FP32, FP64):
                most = loss_by_words.most_bytes(rows, d, words, dtype, device, chunk_bytes, gradient)
                for some in {rows, -(-rows // 3), 1}:
                    given = (some, d, words, dtype, device, chunk_bytes, True, gradient)
                    size, columns = loss_by_words.blocks_of(*given)
                    wide = 8 if dtype == FP64 else 4
                    row = columns * dtype.itemsize + d * (dtype.itemsize + wide * gradient)
                    assert size * row <= most <= max(chunk_bytes, 64 * dtype.itemsize + d * (wide + dtype.itemsize))
                    assert columns % ALIGNED == 0 and columns.bit_count() == 1 and 1 <= size <= some


def test_blocks_of_a_card():
    """The sizes are those of docs/PERFORMANCE.md's two rows."""
    sizes = (8192, 1024, 256206, BF16, "cuda")
    assert loss_by_words.blocks_of(*sizes, 32 << 20, False) == (4096, 2048)
    assert loss_by_words.blocks_of(*sizes, 300 << 20, False) == (8192, 8192)


@pytest.mark.skipif("cpu" not in contract.BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("gradient", [True, False])
def test_peak_memory_is_the_blocks(dtype, apart, gradient):
    """Full logits are 16 or 8 MB, the buffers are 256 KB, and no more than a plan counts."""
    rows, words, d, chunk_bytes = 256, 16384, 64, 2**18
    hidden, weight = torch.randn(rows, d).to(dtype), torch.randn(words, d).to(dtype)
    labels = torch.randint(0, words, (rows,))
    labels[::7] = -100 if apart else 0
    kernels, living = kernels_of(contract.CPU, "cpu", dtype), [hidden, labels, weight]
    options = LossOptions(0.1, "uniform", 1.0, -100, chunk_bytes, ALL_ROWS)

    def work():
        compute(kernels, hidden, [weight], labels, None, None, options, Needs(gradient, False, False))

    peak = peak_bytes(work, living) - sum(tensor.nbytes for tensor in living) - gradient * hidden.nbytes
    function = torch.ops.petl.linear_cross_entropy.default
    given = (hidden, [weight], labels, None, *dataclasses.astuple(options), "mean", gradient, False, False, "")
    planned = scratch_bytes(function, given)
    few = 24 * rows + 8 * d  # labels, indices, losses and states of rows: less than a second copy of some
    product = 0 if dtype == FP32 or widens(BF16) else 2 * rows * d  # one before it is added
    assert peak <= chunk_bytes + few + product
    assert peak <= planned + few


def test_what_goes_by_rows():
    hidden, weight, half = torch.randn(3, 8), torch.randn(9, 8), torch.float16
    assert loss_by_words.serves(hidden, [weight], None, 1.0, False)
    assert not loss_by_words.serves(hidden, [weight], None, 1.0, True)
    assert not loss_by_words.serves(hidden, [weight], torch.zeros(9), 1.0, False)
    assert not loss_by_words.serves(hidden, [weight], None, 0.5, False)
    assert not loss_by_words.serves(hidden, [weight], None, 1.0, False, 30.0)
    assert not loss_by_words.serves(hidden, [weight.bfloat16()], None, 1.0, False)
    assert not loss_by_words.serves(hidden.to(half), [weight.to(half)], None, 1.0, False)
    assert not loss_by_words.serves(hidden, [torch.randn(8, 9).T], None, 1.0, False)
    assert not loss_by_words.serves(hidden, ops.quantize(weight, "int8").parts(), None, 1.0, False)


@pytest.mark.parametrize("words", [1, 64, 206, 1500])
@pytest.mark.parametrize("way", ["by words", "trained", "of another dtype", "fp16"])
def test_products_are_over_multiples_of_64_words(monkeypatch, words, way):
    """Each, but one for what is left, in the ways that multiply by a dense table."""
    seen, others = [], {26, 24}  # rows that count, features

    def product(out, left, right, add=False):
        (size,) = {*out.shape, *left.shape, *right.shape} - others
        seen.append(size)
        (out.add_ if add else out.copy_)((left.double() @ right.double()).to(out.dtype))

    for module in (loss_by_words, loss_by_rows):
        monkeypatch.setattr(module, "product_into", product)
    dtype = torch.float16 if way == "fp16" else FP32
    options = {"words": words, "weight_dtype": BF16 if way == "of another dtype" else None}
    given = arguments_of(dtype, **options) | {"frozen": way != "trained", "chunk_bytes": 2**20}
    parity.run(OP, "reference", given)
    uses = 3 if way == "trained" else 2
    left = [size for size in seen if size % ALIGNED]
    assert left == [words % ALIGNED] * uses if words % ALIGNED else not left
    assert sum(seen) == uses * words


def test_parts_of_a_product():
    assert aligned_parts(256206) == [slice(0, 256192), slice(256192, 256206)]
    assert aligned_parts(64) == [slice(0, 64)] and aligned_parts(3) == [slice(0, 3)]
