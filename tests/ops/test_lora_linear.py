from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from petl_kernels import dispatch, ops, parity
from petl_kernels.errors import InputError
from petl_kernels.ops import philox

from . import contract

FP32 = torch.float32


def arguments_of(dtype, seed=0, **options) -> dict:
    return parity.lora_linear_arguments(contract.source(dtype, seed), **options)


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(1,), (3,), (17,), (129,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("adapters", ["same", "fp32"])
def test_values_and_gradients(backend, dtype, rows, dropout, adapters):
    arguments = arguments_of(
        dtype,
        rows=rows,
        ns=(40, 33, 56),
        k=131,
        ranks=(4, 1, 7),
        dropout=dropout,
        adapter_dtype=FP32 if adapters == "fp32" else None,
    )
    contract.assert_parity("lora_linear", backend, arguments)


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_layer_without_bias(backend, dropout):
    contract.assert_parity("lora_linear", backend, arguments_of(FP32, bias=False, dropout=dropout))


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_several_blocks_of_rows(backend, dropout):
    contract.assert_parity("lora_linear", backend, arguments_of(FP32, rows=(1100,), k=16, dropout=dropout))


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_non_contiguous_and_expanded(backend, dropout):
    draw = contract.source(FP32)
    arguments = arguments_of(FP32, rows=(6, 5), ns=(40, 24), ranks=(4, 2), dropout=dropout)
    arguments["x"] = draw(5, 6, 144)[..., ::2].transpose(0, 1)
    arguments["weights"][0] = draw(72, 40).T
    arguments["a"][1] = draw(72, 2).T
    arguments["b"][0] = draw(4, 40).T
    arguments["dys"] = [draw(40).expand(6, 5, 40), draw(5, 6, 24).transpose(0, 1)]
    contract.assert_parity("lora_linear", backend, arguments)


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_zero_rows(backend, dropout):
    values = parity.run("lora_linear", backend, arguments_of(FP32, rows=(2, 0), dropout=dropout))
    assert values["y0"].shape == (2, 0, 40) and values["dx"].shape == (2, 0, 72) and values["s"].shape == (0, 4)
    assert not values["da0"].any() and not values["db0"].any() and not values["dbias0"].any()
    assert values["da0"].shape == (4, 72) and values["db0"].shape == (40, 4)


def leaves_of(draw, ranks=(2, 3), n=5, k=7) -> dict:
    leaves = {"x": draw(2, 3, k)}
    for g, r in enumerate(ranks):
        leaves |= {f"bias{g}": draw(n), f"a{g}": draw(r, k), f"b{g}": draw(n, r)}
    return leaves


def grouped(weights, dropout, seed):
    def function(x, bias0, a0, b0, bias1, a1, b1):
        ys = ops.lora_linear_grouped(x, weights, [bias0, bias1], [a0, a1], [b0, b1], [2.0, 0.5], dropout, seed)
        return torch.cat(ys, -1)

    return function


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_autograd_equals_the_formula(backend, dropout):
    """Every gradient by name against autograd through plain PyTorch."""
    draw = contract.source(torch.float64)
    weights, seed = [draw(5, 7), draw(5, 7)], draw.seed()
    leaves, dy = leaves_of(draw), draw(2, 3, 10)

    def plain(x, bias0, a0, b0, bias1, a1, b1):
        kept = philox.keep_mask(seed, (6, 7), dropout).view_as(x) if dropout else torch.ones_like(x)
        dropped = x * kept * philox.keep_scale(dropout)
        y0 = F.linear(x, weights[0], bias0) + 2.0 * F.linear(F.linear(dropped, a0), b0)
        return torch.cat([y0, F.linear(x, weights[1], bias1) + 0.5 * F.linear(F.linear(dropped, a1), b1)], -1)

    with ops.use(backend):
        computed = contract.gradients(grouped(weights, dropout, seed), leaves, dy)
    contract.assert_close_by_name(computed, contract.gradients(plain, leaves, dy), 1e-13)


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(backend, dropout):
    draw = contract.source(torch.float64)
    weights, seed = [draw(5, 7), draw(5, 7)], draw.seed()
    leaves = [leaf.requires_grad_() for leaf in leaves_of(draw).values()]
    with ops.use(backend):
        assert torch.autograd.gradcheck(grouped(weights, dropout, seed), leaves)


def test_the_reference_is_differentiable():
    from petl_kernels.ops.lora_linear import reference

    draw = contract.source(torch.float64)
    weights, seed = [draw(5, 7), draw(5, 7)], draw.seed()
    leaves, dy = leaves_of(draw), draw(2, 3, 10)

    def plain(x, bias0, a0, b0, bias1, a1, b1):
        return torch.cat(reference(x, weights, [bias0, bias1], [a0, a1], [b0, b1], [2.0, 0.5], 0.4, seed)[0], -1)

    computed = contract.gradients(grouped(weights, 0.4, seed), leaves, dy)
    contract.assert_close_by_name(computed, contract.gradients(plain, leaves, dy), 1e-13)


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.repeat), 0.3])
def test_opcheck(dropout):
    draw = contract.source(FP32)
    x, weights = draw(3, 4, 8).requires_grad_(), [draw(6, 8), draw(5, 8)]
    biases = [draw(6).requires_grad_(), x.new_empty(0).detach()]
    a = [draw(2, 8).requires_grad_(), draw(3, 8).requires_grad_()]
    b = [draw(6, 2).requires_grad_(), draw(5, 3).requires_grad_()]
    seed = draw.seed() if dropout else None
    contract.opcheck(torch.ops.petl.lora_linear.default, (x, weights, biases, a, b, [2.0, 0.5], dropout, seed))
    dys, s = [draw(3, 4, 6), draw(3, 4, 5)], draw(12, 5)
    plain = [[p.detach() for p in group] for group in (weights, a, b)]
    for need_dx, need_dbias in ((True, [True, False]), (False, [False, False])):
        contract.opcheck(
            torch.ops.petl.lora_linear_backward.default,
            (dys, x.detach(), s, *plain, [2.0, 0.5], dropout, seed, need_dx, need_dbias),
        )


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_same_bits_in_two_runs(backend, dtype, dropout):
    arguments = arguments_of(dtype, rows=(600,), ns=(96, 64), k=64, ranks=(8, 4), dropout=dropout)
    contract.assert_deterministic("lora_linear", backend, arguments)


@pytest.mark.skipif("cpu" not in contract.BACKENDS, reason="the extension is not built")
def test_the_gradient_under_dropout_does_not_depend_on_threads():
    arguments = arguments_of(FP32, rows=(1100,), ns=(48,), k=64, ranks=(8,), dropout=0.3)
    contract.assert_deterministic("lora_linear", "cpu", arguments, threads=(1, 2))


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_saves_x_s_and_the_seed(backend, dropout):
    arguments = arguments_of(torch.bfloat16, rows=(17,), ns=(40, 56), ranks=(4, 8), adapter_dtype=FP32)
    x = arguments["x"].requires_grad_()
    a, b = ([p.requires_grad_() for p in arguments[name]] for name in ("a", "b"))
    weights, biases = arguments["weights"], arguments["biases"]

    def call():
        return ops.lora_linear_grouped(x, weights, biases, a, b, [2.0, 2.0], dropout)

    with ops.use(backend):
        saved = contract.bytes_saved(call, [*weights, *biases, *a, *b])
    assert saved == 17 * (2 * 72 + 2 * 12) + (8 if dropout else 0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_group_equals_its_members(dropout):
    draw = contract.source(torch.float64)
    weights, seed = [draw(5, 7), draw(5, 7)], draw.seed()
    leaves, dy = leaves_of(draw), draw(2, 3, 10)

    def one_by_one(x, bias0, a0, b0, bias1, a1, b1):
        first = ops.lora_linear(x, weights[0], bias0, a0, b0, 2.0, dropout, seed)
        return torch.cat([first, ops.lora_linear(x, weights[1], bias1, a1, b1, 0.5, dropout, seed)], -1)

    together = contract.gradients(grouped(weights, dropout, seed), leaves, dy)
    contract.assert_close_by_name(contract.gradients(one_by_one, leaves, dy), together, 1e-13)


def test_manual_seed_reproduces_dropout():
    draw = contract.source(FP32)
    arguments = [draw(9, 72), draw(40, 72), None, draw(4, 72), draw(40, 4), 1.0, 0.5]
    torch.manual_seed(1)
    first, second = ops.lora_linear(*arguments), ops.lora_linear(*arguments)
    torch.manual_seed(1)
    assert torch.equal(ops.lora_linear(*arguments), first)
    assert not torch.equal(first, second)


def test_without_dropout_the_generator_is_left_alone():
    draw = contract.source(FP32)
    state = torch.get_rng_state()
    ops.lora_linear(draw(9, 72), draw(40, 72), None, draw(4, 72), draw(40, 4), 1.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_output_that_is_not_used():
    draw = contract.source(torch.float64)
    weights, leaves = [draw(5, 7), draw(5, 7)], leaves_of(draw)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    y = grouped(weights, 0.0, None)(**leaves)[..., :5]
    grads = dict(zip(leaves, torch.autograd.grad(y.sum(), list(leaves.values())), strict=True))
    assert grads["a0"].any() and grads["bias0"].any()
    assert not grads["a1"].any() and not grads["b1"].any() and not grads["bias1"].any()


def test_frozen_adapters_pass_the_gradient_on():
    draw = contract.source(torch.float64)
    x, weight, a, b = draw(3, 7).requires_grad_(), draw(5, 7), draw(2, 7), draw(5, 2)
    (dx,) = torch.autograd.grad(ops.lora_linear(x, weight, None, a, b, 2.0).sum(), x)
    torch.testing.assert_close(dx, torch.ones(3, 5, dtype=torch.float64) @ (weight + 2.0 * b @ a))


def test_autocast_follows_linear():
    draw = contract.source(FP32)
    x, weight = draw(9, 72).requires_grad_(), draw(40, 72)
    a, b = draw(4, 72).requires_grad_(), draw(40, 4).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.lora_linear(x, weight, None, a, b, 0.5)
        plain = F.linear(x, weight) + 0.5 * F.linear(F.linear(x, a), b)
    assert y.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(y, plain, rtol=0.05, atol=0.3)
    assert [grad.dtype for grad in torch.autograd.grad(y.float().sum(), (x, a, b))] == [FP32] * 3


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_to_one_graph(backend, dropout):
    draw = contract.source(FP32)
    weight, seed = draw(40, 72), draw.seed()

    def function(x, a, b):
        return ops.lora_linear(x, weight, None, a, b, 2.0, dropout, seed).relu()

    with ops.use(backend):
        contract.assert_compiles(function, draw(9, 72), draw(4, 72), draw(40, 4), tolerance=1e-5)


def test_drawing_the_seed_compiles_too():
    draw = contract.source(FP32)
    tensors = [draw(9, 72), draw(40, 72), None, draw(4, 72), draw(40, 4)]
    compiled = torch.compile(lambda: ops.lora_linear(*tensors, 2.0, 0.5), fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(), compiled())


@pytest.mark.skipif("cpu" not in contract.BACKENDS, reason="the extension is not built")
def test_reads_x_in_one_product_for_the_whole_group():
    """q, k and v: one product with the stacked A, three with W, three with B."""
    arguments = arguments_of(FP32, rows=(32,), ns=(40, 40, 40), ranks=(4, 4, 4))
    with torch.no_grad(), torch.profiler.profile() as profile:
        dispatch.kernel_of("lora_linear", "cpu")(
            *[arguments[name] for name in ("x", "weights", "biases", "a", "b", "scales", "dropout", "seed")]
        )
    counts = {event.key: event.count for event in profile.key_averages()}
    # a linear with a bias is an addmm, and so is what adds a product
    assert counts["aten::linear"] == 3 and counts["aten::mm"] == 1 and counts["aten::addmm"] == 3 + 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.tensor(1.0)}, "x has rank 0"),
        ({"weights": [torch.ones(6, 7)]}, r"weight has shape \(6, 7\): expected \(out, 8\)"),
        ({"weights": [torch.ones(6, 8, requires_grad=True)]}, "weight requires grad"),
        ({"weights": [torch.ones(6, 8).half()]}, "weight has dtype torch.float16: expected that of x, torch.float32"),
        ({"weights": []}, r"\[0, 1, 1, 1, 1\] weights, biases, a, b and scales: expected the same number"),
        ({"a": [torch.ones(8)]}, r"a has shape \(8,\): expected \(rank, 8\)"),
        ({"a": [torch.ones(2, 7)]}, r"a has shape \(2, 7\): expected \(2, 8\)"),
        ({"b": [torch.ones(6, 3)]}, r"b has shape \(6, 3\): expected \(6, 2\)"),
        ({"b": [torch.ones(6, 2, device="meta")]}, "b is on meta: expected the device of x, cpu"),
        ({"biases": [torch.ones(8)]}, r"bias has shape \(8,\): expected \(6,\)"),
        ({"dropout": 1.0}, r"dropout is 1.0: expected a number in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"dropout": 0.1, "seed": torch.ones(1)}, r"seed is torch.float32 of shape \(1,\): expected int64"),
        ({"dropout": 0.1, "seed": torch.ones(2, dtype=torch.int64)}, r"seed is torch.int64 of shape \(2,\)"),
        (
            {"x": torch.ones(1, 8).expand(2**29, 8), "dropout": 0.1},
            r"x has 4294967296 elements: expected fewer than 2\^32 with dropout",
        ),
    ],
)
def test_refuses(change, message):
    arguments = {
        "x": torch.ones(3, 8),
        "weights": [torch.ones(6, 8)],
        "biases": [None],
        "a": [torch.ones(2, 8)],
        "b": [torch.ones(6, 2)],
        "scales": [1.0],
    }
    with pytest.raises(InputError, match=message) as error:
        ops.lora_linear_grouped(**(arguments | change))
    assert "\n" not in str(error.value)
