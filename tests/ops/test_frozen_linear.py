from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from petl_kernels import ops, parity
from petl_kernels.errors import InputError

from . import contract


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(1,), (3,), (17,), (129,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize(("n", "k", "bias"), [(40, 72, True), (1, 7, True), (131, 129, False)])
def test_values_and_gradients(backend, dtype, rows, n, k, bias):
    arguments = parity.frozen_linear_arguments(contract.source(dtype), rows, n, k, bias)
    contract.assert_parity("frozen_linear", backend, arguments)


@pytest.mark.parametrize("backend", contract.HELD)
def test_long_column_sums_stay_exact(backend):
    arguments = parity.frozen_linear_arguments(contract.source(torch.float32), (5000,), 3, 2)
    arguments["dy"] += 100
    contract.assert_parity("frozen_linear", backend, arguments)


@pytest.mark.parametrize("backend", contract.HELD)
def test_non_contiguous_and_expanded(backend):
    draw = contract.source(torch.float32)
    arguments = parity.frozen_linear_arguments(draw, (6, 5))
    arguments["x"] = draw(5, 6, 144)[..., ::2].transpose(0, 1)
    arguments["weight"] = draw(72, 40).T
    arguments["dy"] = draw(40).expand(6, 5, 40)
    contract.assert_parity("frozen_linear", backend, arguments)


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_zero_rows(backend):
    values = parity.run(
        "frozen_linear", backend, parity.frozen_linear_arguments(contract.source(torch.float32), (2, 0))
    )
    assert values["y"].shape == (2, 0, 40) and values["dx"].shape == (2, 0, 72)
    assert torch.equal(values["dbias"], torch.zeros(40))


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_autograd_equals_linear(backend):
    draw = contract.source(torch.float64)
    weight = draw(5, 7)
    leaves = {"x": draw(2, 3, 7), "bias": draw(5)}
    dy = draw(2, 3, 5)
    with ops.use(backend):
        computed = contract.gradients(lambda x, bias: ops.frozen_linear(x, weight, bias), leaves, dy)
    expected = contract.gradients(lambda x, bias: F.linear(x, weight, bias), leaves, dy)
    contract.assert_close_by_name(computed, expected, 1e-13)


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_gradcheck(backend):
    draw = contract.source(torch.float64)
    x, weight, bias = draw(2, 3, 4).requires_grad_(), draw(5, 4), draw(5).requires_grad_()
    with ops.use(backend):
        assert torch.autograd.gradcheck(lambda x, bias: ops.frozen_linear(x, weight, bias), (x, bias))


def test_opcheck():
    draw = contract.source(torch.float32)
    x, bias = draw(3, 4, 8).requires_grad_(), draw(6).requires_grad_()
    contract.opcheck(torch.ops.petl.frozen_linear.default, (x, [draw(6, 8)], bias))
    contract.opcheck(torch.ops.petl.frozen_linear.default, (x, [draw(6, 8)], None))
    contract.opcheck(torch.ops.petl.frozen_linear_backward.default, (draw(3, 4, 6), [draw(6, 8)], True, True))
    contract.opcheck(torch.ops.petl.frozen_linear_backward.default, (draw(3, 4, 6), [draw(6, 8)], False, False))


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_same_bits_in_two_runs(backend):
    arguments = parity.frozen_linear_arguments(contract.source(torch.bfloat16), (300,), 96, 64)
    contract.assert_deterministic("frozen_linear", backend, arguments)


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_saves_nothing(backend):
    draw = contract.source(torch.float32)
    x, weight, bias = draw(9, 72).requires_grad_(), draw(40, 72), draw(40).requires_grad_()
    with ops.use(backend):
        saved = contract.bytes_saved(lambda: ops.frozen_linear(x, weight, bias), [weight, bias])
    assert saved == 0


def test_saves_nothing_under_autocast():
    draw = contract.source(torch.float32)
    x, weight = draw(9, 72).requires_grad_(), draw(40, 72)
    with torch.autocast("cpu", torch.bfloat16):
        assert contract.bytes_saved(lambda: ops.frozen_linear(x, weight), [weight]) == 0


def test_autocast_follows_linear():
    draw = contract.source(torch.float32)
    x, weight, bias = draw(9, 72).requires_grad_(), draw(40, 72), draw(40).requires_grad_()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            ours, theirs = ops.frozen_linear(x, weight, bias), F.linear(x, weight, bias)
        assert ours.dtype == theirs.dtype == dtype
        torch.testing.assert_close(ours, theirs)
        dx, dbias = torch.autograd.grad(ours.float().sum(), (x, bias))
        assert dx.dtype == dbias.dtype == torch.float32


def test_bias_may_be_wider_than_the_weight():
    draw = contract.source(torch.bfloat16)
    x, weight, bias = draw(300, 16), draw(8, 16), draw(8, dtype=torch.float32).requires_grad_()
    dy = draw(300, 8)
    ops.frozen_linear(x, weight, bias).backward(dy)
    torch.testing.assert_close(bias.grad, dy.double().sum(0).float(), rtol=1e-6, atol=1e-6)


def test_no_gradient_is_computed_that_is_not_needed():
    draw = contract.source(torch.float32)
    x, weight = draw(3, 8), draw(6, 8)
    dx, dbias = torch.ops.petl.frozen_linear_backward(draw(3, 6), [weight], False, True, "")
    assert dx.shape == (0,) and dbias.shape == (6,)
    assert not ops.frozen_linear(x, weight, draw(6)).requires_grad


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_compiles_to_one_graph(backend):
    draw = contract.source(torch.float32)
    weight = draw(40, 72)
    with ops.use(backend):
        contract.assert_compiles(lambda x, bias: ops.frozen_linear(x, weight, bias).relu(), draw(9, 72), draw(40))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.tensor(1.0)}, "x has rank 0"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, "x has dtype torch.int64"),
        ({"x": torch.ones(3, 7)}, r"weight has shape \(6, 8\): expected \(out, 7\) for x of shape \(3, 7\)"),
        ({"weight": torch.ones(8)}, r"weight has shape \(8,\)"),
        ({"weight": torch.ones(6, 8, dtype=torch.bfloat16)}, "weight has dtype torch.bfloat16: expected that of x"),
        ({"weight": torch.ones(6, 8, requires_grad=True)}, "weight requires grad"),
        ({"weight": torch.ones(6, 8, device="meta")}, "weight is on meta: expected the device of x, cpu"),
        ({"bias": torch.ones(5)}, r"bias has shape \(5,\): expected \(6,\)"),
        ({"bias": torch.ones(6, dtype=torch.int32)}, "bias has dtype torch.int32"),
    ],
)
def test_refuses(change, message):
    arguments = {"x": torch.ones(3, 8), "weight": torch.ones(6, 8), "bias": torch.ones(6)} | change
    with pytest.raises(InputError, match=message) as error:
        ops.frozen_linear(**arguments)
    assert "\n" not in str(error.value)
