"""The check itself: it passes right kernels and fails wrong ones, by the name of what is wrong."""

from __future__ import annotations

import pytest
import torch

from petl_kernels import dispatch, ops, parity
from petl_kernels.ops import philox
from petl_kernels.ops.cases import CASES
from petl_kernels.ops.cases.case import no_additions

from . import contract


@pytest.mark.check
@pytest.mark.parametrize("op", ops.OPS)
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_backends_pass(op, backend, dtype):
    assert parity.check(op, backend, "cpu", dtype) is None


def test_table(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rows = parity.table("cpu")
    assert {row[:3] for row in rows} == {
        (op, backend, dtype)
        for op in ops.OPS
        for backend in contract.BACKENDS
        for dtype in ("float32", "bfloat16", "float16")
        if backend == "reference" or op not in contract.FOR_CARDS
    }
    assert {row[3] for row in rows} == {"pass"}
    assert {row[1] for row in rows if row[4] and row[0] not in contract.FOR_CARDS} == {contract.BACKENDS[-1]}


@pytest.fixture
def broken(monkeypatch):
    """Break one output of one of the reference's kernels, for a backend named cpu."""

    def break_output(op: str, position: int, spoil):
        kernel = dispatch.kernel_of(op, "reference")

        def spoiled(*args):
            results = list(kernel(*args)) if isinstance(kernel(*args), tuple) else [kernel(*args)]
            results[position] = spoil(results[position])
            return tuple(results) if len(results) > 1 else results[0]

        monkeypatch.setattr(dispatch, "_kernels", dispatch._kernels | {(op, "cpu"): spoiled})
        monkeypatch.setitem(dispatch._load_errors, "cpu", None)

    return break_output


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("op", "position", "name"),
    [
        ("frozen_linear", 0, "y"),
        ("frozen_linear_backward", 0, "dx"),
        ("frozen_linear_backward", 1, "dbias"),
        ("lora_linear", 1, "s"),
        ("lora_linear_backward", 0, "dx"),
        ("bottleneck_adapter", 0, "y"),
        ("bottleneck_adapter_backward", 0, "dx"),
        ("bottleneck_adapter_backward", 1, "dln_weight"),
        ("bottleneck_adapter_backward", 2, "dln_bias"),
        ("bottleneck_adapter_backward", 3, "ddown"),
        ("bottleneck_adapter_backward", 4, "ddown_bias"),
        ("bottleneck_adapter_backward", 5, "dup"),
        ("bottleneck_adapter_backward", 6, "dup_bias"),
        ("activation", 0, "y"),
        ("activation_backward", 0, "dz"),
        ("gated_activation", 0, "y"),
        ("gated_activation_backward", 0, "dz"),
        ("gated_activation_backward", 1, "dg"),
        ("dropout_add", 0, "y"),
        ("dropout_add_backward", 0, "dx"),
        ("dropout_add_norm", 0, "h"),
        ("dropout_add_norm", 1, "u"),
        *(("dropout_add_norm_backward", i, name) for i, name in enumerate(("dresidual", "dy", "dweight", "dbias"))),
        ("layer_norm", 0, "y"),
        ("layer_norm_from_statistics", 0, "again"),
        ("layer_norm_backward", 0, "dx"),
        ("layer_norm_backward", 1, "dweight"),
        ("layer_norm_backward", 2, "dbias"),
        ("rms_norm", 0, "y"),
        ("rms_norm_from_statistics", 0, "again"),
        ("rms_norm_backward", 0, "dx"),
        ("rms_norm_backward", 1, "dweight"),
        ("frozen_ffn", 0, "y"),
        ("frozen_ffn_backward", 0, "dx"),
        ("frozen_ffn_backward", 1, "dc1"),
        ("frozen_ffn_backward", 2, "dc2"),
    ],
)
def test_a_value_that_is_off_is_found(broken, op, position, name, dtype):
    broken(op, position, lambda value: value * 1.05)
    op = op.removesuffix("_backward").removesuffix("_from_statistics")
    error = parity.check(op, "cpu", "cpu", dtype)
    assert error is not None and f": {name} is off by " in error


@pytest.mark.parametrize(("position", "name"), [(1, "da"), (2, "db"), (3, "dbias")])
def test_one_wrong_gradient_of_a_group_is_found(broken, position, name):
    broken("lora_linear_backward", position, lambda grads: [*grads[:-1], grads[-1] * 1.05])
    error = parity.check("lora_linear", "cpu", "cpu", torch.float32)
    assert error is not None and f": {name}" in error


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda y: torch.full_like(y, float("nan")), "y is off by nan"),
        (lambda y: y[:-1], "y is torch.float32 of shape"),
        (lambda y: y.double(), "y is torch.float64 of shape"),
        (lambda y: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_what_else_can_be_wrong(broken, spoil, message):
    broken("frozen_linear", 0, spoil)
    assert message in parity.check("frozen_linear", "cpu", "cpu", torch.float32)


def test_the_check_leaves_the_generator_alone():
    state = torch.get_rng_state()
    parity.check("lora_linear", "reference", "cpu", torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


# ---- how much a kernel may be off -----------------------------------------------------------------------------------


def in_order(left: torch.Tensor, right: torch.Tensor, start: torch.Tensor | float = 0.0) -> torch.Tensor:
    """left @ right in fp32, one product after the other added to ``start``, as a loop of fused multiply-adds does."""
    total = torch.zeros(left.shape[0], right.shape[1]) + start
    for i in range(left.shape[1]):
        total = (total.double() + left[:, i, None].double() * right[i].double()).float()
    return total


def lora_in_order(x, weights, biases, a, b, scales, dropout, seed):
    """Adds in the order of the Triton kernels: the part of the rank first, then the frozen product on top of it."""
    rows = x.flatten(0, -2)
    s = in_order(philox.dropout(rows, dropout, seed) if dropout else rows, torch.cat(a).T)
    ys = []
    for s_g, weight, bias, b_g, scale in zip(
        s.split([m.shape[0] for m in a], 1), weights, biases, b, scales, strict=True
    ):
        y = in_order(rows, weight.T, in_order(s_g, b_g.T) * scale)
        ys.append((y if bias is None else y + bias).view(*x.shape[:-1], -1))
    return ys, s


def lora_backward_in_order(dys, x, s, weights, a, b, scales, dropout, seed, need_dx, need_dbias):
    dys, ranks = [dy.flatten(0, -2) for dy in dys], [m.shape[0] for m in a]
    rows = x.flatten(0, -2)
    ds = torch.cat([in_order(dy, b_g) * scale for dy, b_g, scale in zip(dys, b, scales, strict=True)], 1)
    dx = in_order(ds, torch.cat(a))
    if dropout:
        dx, rows = philox.dropout(dx, dropout, seed), philox.dropout(rows, dropout, seed)
    for dy, weight in zip(dys, weights, strict=True):
        dx = in_order(dy, weight, dx)
    da = in_order(ds.T, rows).split(ranks)
    db = [in_order(dy.T, s_g) * scale for dy, s_g, scale in zip(dys, s.split(ranks, 1), scales, strict=True)]
    dbias = [
        in_order(torch.ones(1, dy.shape[0]), dy)[0] if need else dy.new_empty(0)
        for dy, need in zip(dys, need_dbias, strict=True)
    ]
    return dx.view(x.shape), list(da), db, dbias


LORA = (
    {"rows": (33,), "bias": False},
    {"rows": (3, 43), "ns": (40, 56), "ranks": (4, 8), "dropout": 0.3, "adapter_dtype": torch.float32},
)


@pytest.mark.parametrize("options", LORA, ids=["one", "group"])
def test_a_kernel_may_add_up_in_another_order(monkeypatch, options):
    """The order of the Triton kernels. On a card it was off by 1.63e-5 in dx of seed 0, and so it was here with the
    dropout mask of then; with today's it is 1.683e-5."""
    kernels = {("lora_linear", "cpu"): lora_in_order, ("lora_linear_backward", "cpu"): lora_backward_in_order}
    monkeypatch.setattr(dispatch, "_kernels", dispatch._kernels | kernels)
    monkeypatch.setitem(dispatch._load_errors, "cpu", None)
    refused = 0
    for seed in range(20):
        arguments = parity.lora_linear_arguments(contract.source(torch.float32, seed), **options)
        assert parity.compare("lora_linear", "cpu", arguments) is None, seed
        exact = parity.run("lora_linear", "reference", parity.in_float64(arguments))
        computed, reference = (parity.run("lora_linear", name, arguments) for name in ("cpu", "reference"))
        if seed == 0 and options["rows"] == (3, 43):
            assert (computed["dx"] - exact["dx"]).abs().max().item() == pytest.approx(1.683e-5, rel=1e-3)
        two_units = [parity.compare_tensors(name, computed[name], reference[name], exact[name]) for name in exact]
        refused += any(two_units)
    assert refused  # two units are too few for an order that is as good as any


WITH_SUMS = [op for op in ops.OPS if CASES[op].additions is not no_additions]
FAULTS = {
    "tf32": lambda t: ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32),  # 10 bits of 23, to nearest
    "a feature left out": lambda t: t * (torch.arange(t.shape[-1]) > 0),
    "a token left out": lambda t: t * (torch.arange(t.shape[-2]) < t.shape[-2] - 1)[:, None],
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("op", WITH_SUMS)
def test_products_in_tf32_and_sums_without_a_term_are_found_in_fp32(op, fault):
    """Even with ten times what the order of a sum is allowed."""
    for case in parity.CASES[op]:
        arguments = case(torch.device("cpu"), torch.float32)
        exact = parity.run(op, "reference", parity.in_float64(arguments))
        reference = parity.run(op, "reference", arguments)
        most = {name: parity.most_additions(op, name, arguments) for name in exact}
        # over all queries and keys of a head for the bias by distance, over one row or column for all else
        small = [most[name] for name in most if name != "ddistance_bias"]
        assert 16 < min(small) and max(small) < 50**2
        first = next(iter(set(arguments) & {"x", "q", "hidden", "y"}))
        wrong = parity.run(op, "reference", arguments | {first: FAULTS[fault](arguments[first])})
        errors = [
            parity.compare_tensors(name, wrong[name], reference[name], exact[name], 100 * most[name]) for name in exact
        ]
        assert any(errors), (case.__name__, fault)


@pytest.mark.parametrize("op", ops.OPS)
def test_sixteen_bits_and_ops_that_add_nothing_up_have_two_units(op):
    one = torch.ones(4, 4)
    for case in parity.CASES[op]:
        most = parity.most_additions(op, "y", case(torch.device("cpu"), torch.float32))
        assert (most > 0) == (op in WITH_SUMS)
    for dtype, additions in ((torch.bfloat16, 10_000), (torch.float16, 10_000), (torch.float32, 0), (torch.float32, 4)):
        step = torch.finfo(dtype).eps
        reference = one.to(dtype)
        assert parity.compare_tensors("y", reference * (1 + 2 * step), reference, one.double(), additions) is None
        error = parity.compare_tensors("y", reference * (1 + 3 * step), reference, one.double(), additions)
        assert error is not None and "y is off by" in error


def test_what_is_computed_for_each_token_adds_nothing_up_over_tokens():
    draw = parity.Source(torch.device("cpu"), torch.float32)
    given = parity.lora_linear_arguments(draw, rows=(3, 43), ns=(40,), k=72, ranks=(4,))
    found = {name: parity.most_additions("lora_linear", name, given) for name in ("y0", "s", "dx", "da0", "dbias0")}
    features = 40 + 72 + 4
    assert found == {"y0": features, "s": features, "dx": features, "da0": features + 129, "dbias0": features + 129}


def test_one_token_alone_has_its_features():
    given = {"x": torch.zeros(72), "weight": torch.ones(72), "bias": torch.zeros(72), "eps": 1e-5}
    assert parity.most_additions("layer_norm", "y", given) == 72
