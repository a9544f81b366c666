"""layer_norm and rms_norm: what holds for both is tested for both."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from petl_kernels import ops, parity
from petl_kernels.errors import InputError

from . import contract

FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16
NORMS = ("layer_norm", "rms_norm")
ARGUMENTS = {"layer_norm": parity.layer_norm_arguments, "rms_norm": parity.rms_norm_arguments}
backends = pytest.mark.parametrize("backend", contract.BACKENDS)
held = pytest.mark.parametrize("backend", contract.HELD)
norms = pytest.mark.parametrize("norm", NORMS)


def arguments_of(norm, dtype, seed=0, **options) -> dict:
    return ARGUMENTS[norm](contract.source(dtype, seed), **options)


def leaves_of(norm, dtype, **options) -> dict:
    given = arguments_of(norm, dtype, **options)
    return {name: given[name] for name in ("x", "weight", "bias") if given.get(name) is not None}


@norms
@held
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(), (1,), (3,), (17,), (129,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize(("d", "parameters"), [(72, None), (131, FP32), (7, torch.float16)], ids=str)
def test_values_and_gradients(norm, backend, dtype, rows, d, parameters):
    contract.assert_parity(norm, backend, arguments_of(norm, dtype, rows=rows, d=d, parameter_dtype=parameters))


@held
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
def test_without_a_bias(backend, dtype):
    contract.assert_parity("layer_norm", backend, arguments_of("layer_norm", dtype, rows=(33,), bias=False))


@norms
@held
@pytest.mark.parametrize("rows", [511, 1100, 5000])
def test_long_column_sums_stay_exact(norm, backend, rows):
    arguments = arguments_of(norm, FP32, rows=(rows,), d=16)
    arguments["dy"] += 100
    contract.assert_parity(norm, backend, arguments)


@norms
@held
@pytest.mark.parametrize("offset", [1000, -30])
def test_rows_far_from_zero(norm, backend, offset):
    arguments = arguments_of(norm, FP32)
    arguments["x"] += offset
    contract.assert_parity(norm, backend, arguments)


@norms
@backends
def test_gains_of_zero(norm, backend):
    arguments = arguments_of(norm, FP32)
    arguments["weight"][::2] = 0
    contract.assert_parity(norm, backend, arguments)
    assert parity.run(norm, backend, arguments)["dweight"][::2].abs().min() > 0


@norms
@held
def test_a_row_of_equal_values(norm, backend):
    arguments = arguments_of(norm, FP32)
    arguments["x"][3] = 2.5
    arguments["x"][4] = 0
    contract.assert_parity(norm, backend, arguments)


@norms
@held
def test_non_contiguous_and_expanded(norm, backend):
    draw = contract.source(FP32)
    arguments = arguments_of(norm, FP32, rows=(6, 5))
    arguments["x"] = draw(5, 6, 144)[..., ::2].transpose(0, 1)
    arguments["weight"] = draw(144)[::2]
    arguments["dy"] = draw(72).expand(6, 5, 72)
    contract.assert_parity(norm, backend, arguments)


@norms
@backends
def test_zero_rows(norm, backend):
    values = parity.run(norm, backend, arguments_of(norm, FP32, rows=(2, 0)))
    assert values["y"].shape == values["dx"].shape == (2, 0, 72)
    assert torch.equal(values["dweight"], torch.zeros(72))


@norms
@backends
@pytest.mark.parametrize("dtype", [*contract.DTYPES, FP64], ids=str)
def test_statistics(norm, backend, dtype):
    given = arguments_of(norm, dtype, rows=(3, 43), d=131)
    x = given["x"].double()
    with ops.use(backend):
        _, *mean, rstd = getattr(ops, f"{norm}_with_statistics")(given["x"], given["weight"], eps=1e-3)
    tolerance = {"rtol": 1e-6, "atol": 1e-7}
    for computed in mean:
        torch.testing.assert_close(computed.double(), x.mean(-1), **tolerance)
    square = x.var(-1, correction=0) if mean else x.square().mean(-1)
    torch.testing.assert_close(rstd.double(), (square + 1e-3).rsqrt(), **tolerance)


@norms
@backends
@pytest.mark.parametrize("dtype", [*contract.DTYPES, FP64], ids=str)
@pytest.mark.parametrize("parameters", [None, FP32], ids=["same", "fp32"])
def test_the_output_again_is_the_output_to_the_bit(norm, backend, dtype, parameters):
    arguments = arguments_of(norm, dtype, rows=(3, 43), d=131, parameter_dtype=parameters)
    values = parity.run(norm, backend, arguments)
    assert torch.equal(values["y"], values["again"])


@norms
@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("x_dtype", [*contract.DTYPES, FP64], ids=str)
@pytest.mark.parametrize("weight_dtype", [*contract.DTYPES, FP64], ids=str)
def test_dtypes(norm, backend, x_dtype, weight_dtype):
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves_of(norm, x_dtype).items()}
    leaves["weight"] = leaves["weight"].detach().to(weight_dtype).requires_grad_()
    with ops.use(backend):
        y, *statistics = getattr(ops, f"{norm}_with_statistics")(**leaves)
        grads = torch.autograd.grad(y.sum(), list(leaves.values()))
    assert y.dtype == torch.promote_types(x_dtype, weight_dtype)
    assert {s.dtype for s in statistics} == {FP64 if x_dtype == FP64 else FP32}
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves.values()]


def plain(norm):
    if norm == "layer_norm":
        return lambda x, weight, bias=None: F.layer_norm(x, x.shape[-1:], weight, bias)
    return lambda x, weight: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


@norms
@backends
def test_autograd_equals_the_formula(norm, backend):
    leaves = leaves_of(norm, FP64, rows=(2, 3), d=7)
    dy = contract.source(FP64, 1)(2, 3, 7)
    with ops.use(backend):
        computed = contract.gradients(getattr(ops, norm), leaves, dy)
    contract.assert_close_by_name(computed, contract.gradients(plain(norm), leaves, dy), 1e-13)


@norms
@backends
def test_gradcheck(norm, backend):
    leaves = leaves_of(norm, FP64, rows=(2, 3), d=7)
    with ops.use(backend):
        assert torch.autograd.gradcheck(getattr(ops, norm), [leaf.requires_grad_() for leaf in leaves.values()])


@norms
def test_the_reference_is_differentiable(norm):
    from petl_kernels.dispatch import kernel_of

    leaves = leaves_of(norm, FP64, rows=(2, 3), d=7)
    dy = contract.source(FP64, 1)(2, 3, 7)
    eps = {"layer_norm": 1e-5, "rms_norm": 1e-6}[norm]
    computed = contract.gradients(lambda **leaves: kernel_of(norm, "reference")(*leaves.values(), eps)[0], leaves, dy)
    contract.assert_close_by_name(computed, contract.gradients(plain(norm), leaves, dy), 1e-13)


def test_rms_norm_is_t5s():
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    draw = contract.source(FP32)
    x, weight, dy = draw(3, 17, 72), draw(72), draw(3, 17, 72)
    theirs = modeling.T5LayerNorm(72, eps=1e-6)

    def t5(x, weight):
        return torch.func.functional_call(theirs, {"weight": weight}, (x,))

    computed = contract.gradients(ops.rms_norm, {"x": x, "weight": weight}, dy)
    contract.assert_close_by_name(computed, contract.gradients(t5, {"x": x, "weight": weight}, dy), 1e-6)
    x, weight = x.bfloat16(), weight.bfloat16()
    exact = plain("rms_norm")(x.double(), weight.double())
    errors = [(y.double() - exact).abs().max() for y in (ops.rms_norm(x, weight), t5(x, weight))]
    assert errors[0] <= errors[1]


def test_opcheck_layer_norm():
    draw = contract.source(FP32)
    leaves = [draw(2, 3, 7).requires_grad_(), draw(7).requires_grad_(), draw(7).requires_grad_()]
    contract.opcheck(torch.ops.petl.layer_norm.default, (*leaves, 1e-5))
    contract.opcheck(torch.ops.petl.layer_norm.default, (leaves[0], draw(7, dtype=FP64), None, 1e-5))
    x, mean, rstd, weight = draw(2, 3, 7), draw(2, 3), draw(2, 3), draw(7)
    contract.opcheck(torch.ops.petl.layer_norm_from_statistics.default, (x, mean, rstd, weight, draw(7)))
    backward = torch.ops.petl.layer_norm_backward.default
    contract.opcheck(backward, (draw(2, 3, 7), x, mean, rstd, weight, True, True, True))
    contract.opcheck(backward, (draw(2, 3, 7), x, mean, rstd, weight, False, False, True))


def test_opcheck_rms_norm():
    draw = contract.source(BF16)
    contract.opcheck(torch.ops.petl.rms_norm.default, (draw(2, 7).requires_grad_(), draw(7).requires_grad_(), 1e-6))
    x, rstd, weight = draw(2, 3, 7), draw(2, 3, dtype=FP32), draw(7, dtype=FP32)
    contract.opcheck(torch.ops.petl.rms_norm_from_statistics.default, (x, rstd, weight))
    backward = torch.ops.petl.rms_norm_backward.default
    contract.opcheck(backward, (draw(2, 3, 7, dtype=FP32), x, rstd, weight, True, True))
    contract.opcheck(backward, (draw(2, 3, 7, dtype=FP32), x, rstd, weight, True, False))


@norms
@backends
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_same_bits_in_two_runs_and_for_any_number_of_threads(norm, backend, dtype):
    arguments = arguments_of(norm, dtype, rows=(1100,), d=64)
    contract.assert_deterministic(norm, backend, arguments)
    if backend == "cpu":
        contract.assert_deterministic(norm, backend, arguments, threads=(1, 2))


@norms
@backends
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
def test_saves_its_input_and_its_statistics(norm, backend, dtype):
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves_of(norm, dtype, parameter_dtype=FP32).items()}
    statistics = {"layer_norm": 2, "rms_norm": 1}[norm] * (8 if dtype == FP64 else 4)
    x, *parameters = leaves.values()
    with ops.use(backend):
        saved = contract.bytes_saved(lambda: getattr(ops, norm)(**leaves), parameters)
        beside_x = contract.bytes_saved(lambda: getattr(ops, norm)(**leaves), [x, *parameters])
    assert beside_x == 17 * statistics
    assert saved == 17 * (72 * dtype.itemsize + statistics)


@norms
def test_autocast_keeps_x_as_it_is(norm):
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves_of(norm, FP32).items()}
    x, *parameters = leaves.values()
    with torch.autocast("cpu", BF16):
        y = getattr(ops, norm)(**leaves)
        saved = contract.bytes_saved(lambda: getattr(ops, norm)(**leaves), [x, *parameters])
    assert y.dtype == FP32 and torch.equal(y, getattr(ops, norm)(**leaves)) and saved <= 17 * 8


@norms
@backends
@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_only_the_gradients_that_are_needed(norm, backend, wanted):
    leaves = leaves_of(norm, FP32)
    if wanted not in leaves:
        return
    leaves[wanted].requires_grad_()
    with ops.use(backend):
        (grad,) = torch.autograd.grad(getattr(ops, norm)(**leaves).square().sum(), leaves[wanted])
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        everything = torch.autograd.grad(getattr(ops, norm)(**leaves).square().sum(), list(leaves.values()))
    assert torch.equal(grad, dict(zip(leaves, everything, strict=True))[wanted])


@norms
def test_no_gradient_through_the_statistics(norm):
    leaves = leaves_of(norm, FP32)
    leaves["x"].requires_grad_()
    y, *statistics = getattr(ops, f"{norm}_with_statistics")(**leaves)
    assert y.requires_grad and not any(statistic.requires_grad for statistic in statistics)


@norms
@backends
def test_compiles_to_one_graph(norm, backend):
    leaves = leaves_of(norm, FP32)

    def function(x, *parameters):
        y, *statistics = getattr(ops, f"{norm}_with_statistics")(x, *parameters)
        again = getattr(ops, f"{norm}_from_statistics")(x.detach(), *statistics, *(p.detach() for p in parameters))
        return getattr(ops, norm)(x, *parameters).relu() + again

    with ops.use(backend):
        contract.assert_compiles(function, *leaves.values(), tolerance=1e-5)


@norms
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.tensor(1.0)}, "x has rank 0"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, "x has dtype torch.int64"),
        ({"x": torch.ones(3, 7)}, r"weight has shape \(8,\): expected \(7,\)"),
        ({"weight": torch.ones(3, 8)}, r"weight has shape \(3, 8\): expected \(8,\)"),
        ({"weight": torch.ones(8, dtype=torch.int32)}, "weight has dtype torch.int32"),
        ({"weight": torch.ones(8, device="meta")}, "weight is on meta: expected the device of x, cpu"),
        ({"bias": torch.ones(7)}, r"bias has shape \(7,\): expected \(8,\)"),
    ],
)
def test_refuses(norm, change, message):
    if norm == "rms_norm" and "bias" in change:
        return
    with pytest.raises(InputError, match=f"{norm}: {message}") as error:
        getattr(ops, norm)(**({"x": torch.ones(3, 8), "weight": torch.ones(8)} | change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rstd", "message"),
    [
        (torch.ones(4), r"rstd is torch.float32 of shape \(4,\): expected torch.float32 of \(3,\)"),
        (torch.ones(3).half(), "rstd is torch.float16"),
        (torch.ones(3, device="meta"), "rstd is on meta"),
    ],
)
def test_refuses_statistics_of_something_else(rstd, message):
    x, weight = torch.ones(3, 8), torch.ones(8)
    with pytest.raises(InputError, match=f"rms_norm: {message}"):
        ops.rms_norm_from_statistics(x, rstd, weight)
    with pytest.raises(InputError, match=f"layer_norm: {message}"):
        ops.layer_norm_from_statistics(x, torch.ones(3), rstd, weight)
