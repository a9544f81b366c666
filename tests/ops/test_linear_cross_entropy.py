from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
from planning.peaks import peak_bytes
from torch.nn import functional as F

from petl_kernels import dispatch, ops, parity
from petl_kernels.errors import InputError
from petl_kernels.ops import loss_by_rows
from petl_kernels.ops.linear_cross_entropy import compute, kernels_of
from petl_kernels.ops.loss_options import ALL_ROWS, LossOptions, Needs

from . import contract

op = importlib.import_module("petl_kernels.ops.linear_cross_entropy")  # the package shows the function of that name
OP = "linear_cross_entropy"
FP32, FP64 = torch.float32, torch.float64
REDUCTIONS = ("mean", "sum", "none")
DEFAULTS = (
    0.1,
    "uniform",
    1.0,
    -100,
    400,
    -1,
    0.0,
)  # label_smoothing, smoothing, logit_scale, ignore_index, chunk_bytes, counted, softcap


def arguments_of(dtype, seed=0, **options) -> dict:
    return parity.linear_cross_entropy_arguments(contract.source(dtype, seed), **options)


def loss_of(
    hidden, weight, labels, bias=None, label_smoothing=0.0, smoothing="uniform", logit_scale=1.0, reduction="mean"
):
    """The formula on full logits; fairseq's smoothing as its label_smoothed_nll_loss has it."""
    logits = logit_scale * F.linear(hidden, weight)
    logits = (logits if bias is None else logits + bias).flatten(0, -2)
    kept = labels.flatten() != -100
    if smoothing == "uniform":
        losses = F.cross_entropy(logits, labels.flatten(), reduction="none", label_smoothing=label_smoothing)
    else:
        log_p = logits.log_softmax(-1)
        nll = -log_p.gather(1, labels.flatten().clamp(min=0).unsqueeze(1)).squeeze(1)
        eps_i = label_smoothing / (logits.shape[1] - 1)
        losses = ((1 - label_smoothing - eps_i) * nll - eps_i * log_p.sum(1)).where(kept, 0)
    if reduction == "none":
        return losses.view(labels.shape)
    return losses.sum() / (kept.sum() if reduction == "mean" else 1)


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(1,), (3,), (17,), (129,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("smoothing", ["uniform", "fairseq", "no"])
@pytest.mark.parametrize(("words", "bias"), [(2, False), (131, True), (1200, True)])
def test_values_and_gradients(backend, dtype, rows, smoothing, words, bias):
    smooth = {"label_smoothing": 0.0} if smoothing == "no" else {"smoothing": smoothing}
    options = {"words": words, "bias": bias, "logit_scale": 0.7, "dlosses": words == 131, "chunk_rows": 50}
    contract.assert_parity(OP, backend, arguments_of(dtype, rows=rows, **options, **smooth))


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_capped_logits(backend, dtype, bias):
    """t · tanh(z / t), with logits on both sides of the cap."""
    options = {"rows": (3, 11), "words": 131, "bias": bias, "softcap": 1.5, "logit_scale": 0.7, "chunk_rows": 9}
    contract.assert_parity(OP, backend, arguments_of(dtype, **options))


@pytest.mark.parametrize("smoothing", ["uniform", "fairseq"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("trained", ["hidden", "hidden weight bias"])
def test_capped_logits_are_the_formula(reduction, smoothing, trained):
    """In float64, with the table frozen, too: it goes by rows then."""
    tensors, labels = leaves_of(contract.source(FP64))
    labels[0, 1] = -100
    for name in trained.split():
        tensors[name].requires_grad_()
    bias = tensors["bias"] if "bias" in trained else None
    hidden, weight, cap = tensors["hidden"], tensors["weight"], 0.7
    logits = cap * torch.tanh(F.linear(hidden, weight) / cap)
    eye = torch.eye(13, dtype=FP64)
    options = {"label_smoothing": 0.2, "smoothing": smoothing, "reduction": reduction}
    expected = loss_of(logits, eye, labels, bias, **options)
    found = ops.linear_cross_entropy(hidden, weight, labels, bias, softcap=cap, chunk_bytes=400, **options)
    torch.testing.assert_close(found, expected)
    leaves = [tensors[name] for name in trained.split()]
    dloss = torch.randn_like(expected)
    for one, other in zip(*(torch.autograd.grad(loss, leaves, dloss) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_a_cap_of_logits_below_zero():
    hidden, weight, labels = torch.randn(7, 4), torch.randn(11, 4), torch.arange(7)
    for cap in (-1.0, float("nan")):
        with pytest.raises(InputError, match="^linear_cross_entropy: softcap is .*: expected a number above 0"):
            ops.linear_cross_entropy(hidden, weight, labels, softcap=cap)


@pytest.mark.parametrize("backend", contract.HELD)
def test_many_words(backend):
    """Sums over a vocabulary stay exact."""
    contract.assert_parity(OP, backend, arguments_of(FP32, rows=(9,), d=8, words=50021))


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_dtype", [FP32, torch.bfloat16], ids=str)
def test_weight_of_another_dtype_is_cast_block_by_block(backend, dtype, weight_dtype):
    arguments = arguments_of(dtype, rows=(33,), words=300, weight_dtype=weight_dtype, chunk_rows=3)
    contract.assert_parity(OP, backend, arguments)


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize("chunk_rows", [0, 1, 8, 100])
def test_chunks(backend, chunk_rows):
    """A limit below one row gives chunks of one row."""
    contract.assert_parity(OP, backend, arguments_of(FP32, rows=(5, 5), chunk_rows=chunk_rows))


def test_a_chunk_of_a_cpu_has_many_rows_by_default(monkeypatch):
    hidden, weight, labels = torch.randn(7, 4), torch.randn(11, 4), torch.arange(7)
    chunks, cut = [], loss_by_rows.chunks
    monkeypatch.setattr(
        loss_by_rows, "chunks", lambda *given: [chunks.append(len(b)) or (i, b) for i, b in cut(*given)]
    )
    monkeypatch.setattr(op, "CHUNK_BYTES", 11 * 4)
    monkeypatch.setattr(op, "CPU_ROWS", 4)
    ops.linear_cross_entropy(hidden, weight, labels, logit_scale=2.0)
    ops.linear_cross_entropy(hidden, weight, labels, logit_scale=2.0, chunk_bytes=11 * 4)
    assert chunks == [4, 3] + 7 * [1]
    assert op._usual_chunk(torch.empty(7, 4, device="meta"), 11) == 11 * 4


@pytest.mark.parametrize("backend", contract.HELD)
def test_non_contiguous_and_expanded(backend):
    arguments = arguments_of(FP32, rows=(6, 5))
    draw = contract.source(FP32, 1)
    arguments["hidden"] = draw(5, 6, 48)[..., ::2].transpose(0, 1)
    arguments["weight"] = draw(24, 72).T
    arguments["bias"] = draw(1).expand(72)
    arguments["labels"] = arguments["labels"].T.contiguous().T
    contract.assert_parity(OP, backend, arguments)


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("rows", ["none", "all ignored"])
def test_no_rows_that_count(backend, rows):
    arguments = arguments_of(FP32, rows=(2, 0) if rows == "none" else (2, 3))
    arguments["labels"].fill_(-100)
    values = parity.run(OP, backend, arguments)
    assert values["dhidden"].shape == arguments["hidden"].shape
    assert not any(value.any() for value in values.values())


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_rows_ignored_is_as_in_torch(backend, reduction):
    hidden, weight, labels = torch.randn(2, 3, requires_grad=True), torch.randn(5, 3), torch.tensor([-100, -100])
    options = {"label_smoothing": 0.1, "reduction": reduction}
    with ops.use(backend):
        losses = (
            ops.linear_cross_entropy(hidden, weight, labels, **options),
            F.cross_entropy(F.linear(hidden, weight), labels, **options),
        )
        results = [(loss, torch.autograd.grad(loss.sum(), hidden)[0]) for loss in losses]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def leaves_of(draw, bias=True) -> tuple[dict, torch.Tensor]:
    arguments = parity.linear_cross_entropy_arguments(draw, rows=(2, 5), d=7, words=13, bias=bias)
    return {name: arguments[name] for name in ("hidden", "weight", "bias")[: 2 + bias]}, arguments["labels"]


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("smoothing", ["uniform", "fairseq"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("trained", ["hidden", "hidden weight", "hidden bias", "weight", "hidden weight bias"])
def test_autograd_equals_the_formula(backend, smoothing, reduction, trained):
    draw = contract.source(FP64)
    tensors, labels = leaves_of(draw)
    leaves = {name: tensors.pop(name) for name in trained.split()}
    dloss = draw(2, 5) if reduction == "none" else draw(1).squeeze(0)
    options = {"label_smoothing": 0.1, "smoothing": smoothing, "logit_scale": 0.3, "reduction": reduction}

    def ours(**leaves):
        return ops.linear_cross_entropy(labels=labels, **tensors, **leaves, **options, chunk_bytes=3 * 13 * 8)

    def plain(**leaves):
        return loss_of(labels=labels, **tensors, **leaves, **options)

    with ops.use(backend):
        computed = contract.gradients(ours, leaves, dloss)
    contract.assert_close_by_name(computed, contract.gradients(plain, leaves, dloss), 1e-13)


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(backend, reduction):
    leaves, labels = leaves_of(contract.source(FP64))
    leaves = [leaf.requires_grad_() for leaf in leaves.values()]

    def function(hidden, weight, bias):
        return ops.linear_cross_entropy(
            hidden, weight, labels, bias, 0.1, reduction=reduction, logit_scale=0.7, smoothing="fairseq"
        )

    with ops.use(backend):
        assert torch.autograd.gradcheck(function, leaves)


def test_backward_twice_gives_the_same_gradient():
    leaves, labels = leaves_of(contract.source(FP32))
    hidden = leaves["hidden"].requires_grad_()
    loss = ops.linear_cross_entropy(hidden, leaves["weight"], labels)
    first, second = (torch.autograd.grad(3 * loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("reduction", ["mean", pytest.param("sum", marks=pytest.mark.repeat), "none"])
def test_opcheck(reduction):
    tensors, labels = leaves_of(contract.source(FP32))
    hidden, weight, bias = (tensor.requires_grad_() for tensor in tensors.values())
    op = torch.ops.petl.linear_cross_entropy.default
    contract.opcheck(op, (hidden, [weight], labels, bias, *DEFAULTS, reduction, True, True, True))
    contract.opcheck(op, (hidden, [weight.detach()], labels, None, *DEFAULTS, reduction, True, False, False))
    contract.opcheck(op, (hidden.detach(), [weight.detach()], labels, None, *DEFAULTS, reduction, False, False, False))


def test_opcheck_of_backward():
    tensors, labels = leaves_of(contract.source(FP32))
    hidden, weight, bias = tensors.values()
    op = torch.ops.petl.linear_cross_entropy_backward.default
    dlosses = torch.randn(2, 5)
    contract.opcheck(op, (dlosses, hidden, [weight], labels, bias, *DEFAULTS, True, True, True))
    contract.opcheck(op, (dlosses, hidden, [weight], labels, None, *DEFAULTS, False, True, False))
    scaled = torch.ops.petl.linear_cross_entropy_scaled.default
    torch.library.opcheck(scaled, (hidden, torch.randn(1), torch.bfloat16))
    torch.library.opcheck(scaled, (hidden.bfloat16(), torch.randn(10), torch.bfloat16))


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
def test_same_bits_in_two_runs(backend, dtype):
    contract.assert_deterministic(OP, backend, arguments_of(dtype, rows=(40,), words=1100, chunk_rows=16))


@pytest.mark.skipif("cpu" not in contract.BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
def test_the_row_pass_does_not_depend_on_threads(dtype):
    logits, labels, before = torch.randn(37, 5000).to(dtype), torch.arange(37), torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        copy = logits.clone()
        results.append((dispatch.kernel_of(OP, "cpu")(copy, labels, None, 0.9, 1e-5, 1.0, None, True), copy))
    torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


SAVED = {
    # reduction, what is trained beside hidden -> bytes beside the 4 or 8 of the row count
    ("mean", ""): 10 * 2 * 7,
    ("none", ""): 10 * 2 * 7,
    ("sum", "weight bias"): 10 * 2 * 7 + 4 * 13 * 7 + 4 * 13,
    ("none", "weight"): 10 * 2 * 7 + 10 * 8 - 4,  # hidden and labels instead of gradients and row count
}


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize(("reduction", "trained"), SAVED)
def test_saved_bytes(backend, reduction, trained):
    tensors, labels = leaves_of(contract.source(torch.bfloat16))
    for name in ("hidden", *trained.split()):
        tensors[name].requires_grad_()
    parameters = [tensors["weight"], tensors["bias"]]
    with ops.use(backend):
        saved = contract.bytes_saved(
            lambda: ops.linear_cross_entropy(labels=labels, **tensors, reduction=reduction), parameters
        )
    assert saved == SAVED[reduction, trained] + 4


def test_keeps_nothing_without_gradients():
    tensors, labels = leaves_of(contract.source(FP32))
    weight = tensors["weight"].requires_grad_()
    with torch.no_grad():
        loss = ops.linear_cross_entropy(tensors["hidden"], weight, labels)
    assert not loss.requires_grad
    _, dhidden, dweight, dbias, _ = torch.ops.petl.linear_cross_entropy(
        tensors["hidden"], [weight.detach()], labels, None, *DEFAULTS, "mean", False, True, False, ""
    )
    assert dhidden.shape == dbias.shape == (0,) and dweight.shape == (13, 7)


SMALL = 64 * 1024


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize(
    ("needs", "weight_dtype", "blocks"),
    [
        ((False, False, False), torch.bfloat16, 0),
        ((True, False, False), torch.bfloat16, 0),
        ((True, True, True), torch.bfloat16, 1),
        ((True, False, False), FP32, 1),
    ],
    ids=["evaluation", "frozen", "trained", "cast"],
)
def test_peak_memory_is_the_chunk(backend, needs, weight_dtype, blocks):
    """Full logits are 8 MB; the buffer is 1 MB, a block of words a quarter of that. The rest are the gradients."""
    rows, words, d, chunk_bytes = 256, 16384, 64, 2**20
    hidden, labels = torch.randn(rows, d).bfloat16(), torch.randint(0, words, (rows,))
    labels[::7] = -100
    weight, bias = torch.randn(words, d).to(weight_dtype), torch.randn(words)
    kernels = kernels_of(contract.CPU, backend, hidden.dtype)
    living = [hidden, labels, weight, bias]
    options = LossOptions(0.1, "uniform", 1.0, -100, chunk_bytes, ALL_ROWS)

    def work():
        compute(kernels, hidden, [weight], labels, bias, None, options, Needs(*needs))

    peak = peak_bytes(work, living) - sum(tensor.nbytes for tensor in living)
    dhidden, dweight, dbias = (
        need * size for need, size in zip(needs, (2 * rows * d, 4 * words * d, 4 * words), strict=True)
    )
    row_copies = 0 if backend == "cpu" else 3 * chunk_bytes // 8
    assert peak <= chunk_bytes + dhidden + dweight + dbias + blocks * chunk_bytes // 4 + row_copies + SMALL


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_ignored_rows_are_not_looked_at(backend):
    arguments = arguments_of(FP32, rows=(17,))
    arguments["hidden"][arguments["labels"] == -100] = float("nan")
    values = parity.run(OP, backend, arguments)
    assert all(value.isfinite().all() for value in values.values())
    assert not values["dhidden"][arguments["labels"] == -100].any()


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("counted", [14, 15, 17, 40])
def test_rows_that_the_caller_has_counted(backend, dtype, counted):
    """14 of 17 labels count: exactly these, some more, or all rows are worked on."""
    contract.assert_parity(OP, backend, arguments_of(dtype, counted=counted))
    contract.assert_parity(OP, backend, arguments_of(dtype, counted=counted, dlosses=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("counted", [8, 9, 10])
def test_counted_changes_nothing(reduction, counted):
    tensors, labels = leaves_of(contract.source(FP64))
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    options = {"label_smoothing": 0.1, "reduction": reduction}
    plain, given = (
        ops.linear_cross_entropy(**tensors, labels=labels, counted=number, **options) for number in (None, counted)
    )
    torch.testing.assert_close(given, plain)
    for name, one, other in zip(
        tensors, *(torch.autograd.grad(loss.sum(), tensors.values()) for loss in (given, plain)), strict=True
    ):
        torch.testing.assert_close(one, other, msg=name)


@pytest.mark.parametrize("scale", [1.0, 2.0], ids=["by words", "by rows"])
@pytest.mark.parametrize("counted", [5, 9, 20])
def test_counted_asks_the_device_for_nothing(counted, scale):
    """A tensor without values cannot answer."""
    hidden, weight, labels = torch.randn(9, 8), torch.randn(30, 8), torch.zeros(9, dtype=torch.int64)
    hidden, weight, labels = (tensor.to("meta") for tensor in (hidden, weight, labels))
    kernels = kernels_of(contract.CPU, "reference", FP32)
    given, needs = (kernels, hidden, [weight], labels, None, None), Needs(True, False, False)
    options = LossOptions(0.1, "uniform", scale, -100, 400, counted)
    losses, dhidden, *_, count = compute(*given, options, needs)
    assert losses.shape == (9,) and dhidden.shape == (9, 8) and count.is_meta
    with pytest.raises(RuntimeError):
        compute(*given, dataclasses.replace(options, counted=ALL_ROWS), needs)


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_a_word_as_ignore_index(backend):
    """Padding is a word of the vocabulary: it is in the sums, and its rows are not."""
    hidden, weight = torch.randn(6, 4), torch.randn(9, 4)
    labels = torch.tensor([1, 5, 2, 1, 8, 0])
    with ops.use(backend):
        loss = ops.linear_cross_entropy(hidden, weight, labels, ignore_index=1)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, labels, ignore_index=1))


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
def test_a_word_that_is_switched_off(backend, dtype):
    hidden, weight, labels = (
        torch.randn(6, 4).to(dtype).requires_grad_(),
        torch.randn(900, 4).to(dtype),
        torch.arange(6),
    )
    bias = torch.zeros(900).index_fill(0, torch.tensor([7, 400]), -torch.inf)
    with ops.use(backend):
        loss = ops.linear_cross_entropy(hidden, weight, labels, bias)
        assert torch.autograd.grad(loss, hidden)[0].isfinite().all()
    torch.testing.assert_close(loss, loss_of(hidden, weight, labels, bias.to(dtype)).float(), rtol=1e-2, atol=1e-2)
    with ops.use(backend):
        assert ops.linear_cross_entropy(hidden, weight, labels, bias, label_smoothing=0.1) == torch.inf


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_large_logits(backend):
    arguments = arguments_of(FP32, rows=(17,))
    arguments["hidden"] *= 100
    arguments["bias"] += 1000
    contract.assert_parity(OP, backend, arguments)
    arguments["hidden"][0, 0] = float("nan")
    values = parity.run(OP, backend, arguments)
    assert values["losses"][0].isnan() and values["losses"][1:].isfinite().all()


def test_bias_as_hugging_face_has_it():
    tensors, labels = leaves_of(contract.source(FP32))
    row = tensors["bias"].clone().unsqueeze(0).requires_grad_()
    loss = ops.linear_cross_entropy(tensors["hidden"], tensors["weight"], labels, row)
    torch.testing.assert_close(loss, ops.linear_cross_entropy(labels=labels, **tensors))
    assert torch.autograd.grad(loss, row)[0].shape == (1, 13)


def test_small_gradients_do_not_vanish_in_fp16():
    """The mean over many rows is taken of the finished gradient, not of each word's share."""
    hidden, weight = torch.randn(4096, 8).half().requires_grad_(), torch.randn(50, 8).half()
    labels = torch.arange(4096) % 50
    loss = 1000 * ops.linear_cross_entropy(hidden, weight, labels)
    exact = hidden.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(1000 * loss_of(exact, weight.double(), labels), exact)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0].double(), expected, rtol=1e-2, atol=3e-3)


def test_autocast_follows_linear():
    tensors, labels = leaves_of(contract.source(FP32))
    hidden, weight, bias = (tensor.requires_grad_() for tensor in tensors.values())
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_cross_entropy(hidden, weight, labels, bias)
        # the copy that the cast makes is not kept
        saved = contract.bytes_saved(lambda: ops.linear_cross_entropy(hidden, weight.detach(), labels), [weight, bias])
    assert loss.dtype == FP32 and saved == 10 * 2 * 7 + 4
    grads = torch.autograd.grad(loss, (hidden, weight, bias))
    assert {grad.dtype for grad in grads} == {FP32}
    expected = loss_of(hidden, weight, labels, bias)
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles_to_one_graph(backend, reduction):
    tensors, labels = leaves_of(contract.source(FP32))

    def function(hidden, weight, bias):
        return ops.linear_cross_entropy(hidden.tanh(), weight, labels, bias, 0.1, reduction=reduction)

    with ops.use(backend):
        contract.assert_compiles(function, *tensors.values(), tolerance=1e-5)


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_refuses_labels_outside_the_vocabulary(backend):
    hidden, weight = torch.ones(2, 3, 4), torch.ones(6, 4)
    for wrong in (6, -1):
        labels = torch.tensor([[0, -100, 5], [2, wrong, 1]])
        with (
            ops.use(backend),
            pytest.raises(InputError, match=rf"labels\[1, 1\] is {wrong}: expected 0 to 5, or ignore_index -100"),
        ):
            ops.linear_cross_entropy(hidden, weight, labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.tensor(1.0)}, "hidden has rank 0"),
        ({"hidden": torch.ones(3, 8, dtype=torch.int64)}, "hidden has dtype torch.int64"),
        (
            {"hidden": torch.ones(3, 7)},
            r"weight has shape \(6, 8\): expected \(words, 7\) for hidden of shape \(3, 7\)",
        ),
        ({"weight": torch.ones(8)}, r"weight has shape \(8,\)"),
        ({"weight": torch.ones(0, 8), "bias": None}, r"weight has shape \(0, 8\)"),
        ({"weight": torch.ones(6, 8, dtype=torch.int8)}, "weight has dtype torch.int8"),
        ({"weight": torch.ones(6, 8, device="meta")}, "weight is on meta: expected the device of x, cpu"),
        ({"bias": torch.ones(5)}, r"bias has shape \(5,\): expected \(6,\)"),
        ({"bias": torch.ones(6, 1)}, r"bias has shape \(6, 1\): expected \(6,\)"),
        ({"bias": torch.ones(6, device="meta")}, "bias is on meta"),
        ({"labels": torch.zeros(3, 1, dtype=torch.int64)}, r"labels has shape \(3, 1\): expected \(3,\)"),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, "labels has dtype torch.int32: expected torch.int64"),
        ({"labels": torch.zeros(3, dtype=torch.int64, device="meta")}, "labels is on meta"),
        ({"counted": -2}, "counted is -2: expected how many labels count, a whole number"),
        ({"counted": 3.0}, "counted is 3.0: expected how many labels count"),
        ({"counted": True}, "counted is True: expected how many labels count"),
        ({"counted": 2}, "counted is 2: expected at least the 3 labels that count"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5: expected 0 <= label_smoothing <= 1"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"label_smoothing": float("nan")}, "label_smoothing is nan"),
        ({"reduction": "max"}, "reduction is 'max': expected one of mean, sum, none"),
        ({"smoothing": "google"}, "smoothing is 'google': expected one of uniform, fairseq"),
        (
            {"weight": torch.ones(1, 8), "bias": None, "smoothing": "fairseq", "label_smoothing": 0.1},
            "smoothing is 'fairseq' and weight has 1 word",
        ),
    ],
)
def test_refuses(change, message):
    arguments = {"hidden": torch.ones(3, 8), "weight": torch.ones(6, 8), "bias": torch.ones(6)}
    arguments |= {"labels": torch.zeros(3, dtype=torch.int64)} | change
    with pytest.raises(InputError, match=message) as error:
        ops.linear_cross_entropy(**arguments)
    assert "\n" not in str(error.value)
