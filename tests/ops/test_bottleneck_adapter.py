from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from petl_kernels import ops, parity
from petl_kernels.errors import InputError

from . import contract

FP32 = torch.float32
ACTIVATIONS = ("relu", "gelu", "silu")


def arguments_of(dtype, seed=0, **options) -> dict:
    return parity.bottleneck_adapter_arguments(contract.source(dtype, seed), **options)


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(1,), (3,), (17,), (129,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("adapters", ["same", "fp32"])
def test_values_and_gradients(backend, dtype, rows, activation, adapters):
    arguments = arguments_of(
        dtype, rows=rows, d=131, m=19, activation=activation, adapter_dtype=FP32 if adapters == "fp32" else None
    )
    contract.assert_parity("bottleneck_adapter", backend, arguments)


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "after"])
def test_every_form(backend, dtype, bias, norm, parallel):
    arguments = arguments_of(dtype, rows=(33,), bias=bias, norm=norm, parallel=parallel, activation="gelu", scale=4.0)
    contract.assert_parity("bottleneck_adapter", backend, arguments)


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize(("d", "m"), [(1, 1), (7, 64), (40, 3)])
def test_odd_widths(backend, d, m):
    norm = d > 1  # the LayerNorm of one number is its bias, whatever the number
    contract.assert_parity("bottleneck_adapter", backend, arguments_of(FP32, d=d, m=m, norm=norm))


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize("rows", [511, 1100, 5000])
def test_several_blocks_of_rows(backend, rows):
    contract.assert_parity("bottleneck_adapter", backend, arguments_of(FP32, rows=(rows,), d=16, m=8))


@pytest.mark.parametrize("backend", contract.HELD)
def test_rows_far_from_zero(backend):
    """LayerNorm subtracts a mean that is a thousand times the spread."""
    arguments = arguments_of(FP32, rows=(17,))
    arguments["x"] += 1000
    contract.assert_parity("bottleneck_adapter", backend, arguments)


@pytest.mark.parametrize("backend", contract.HELD)
def test_a_norm_weight_of_zero(backend):
    arguments = arguments_of(FP32, rows=(17,))
    arguments["ln_weight"][::2] = 0
    contract.assert_parity("bottleneck_adapter", backend, arguments)


@pytest.mark.parametrize("backend", contract.HELD)
def test_non_contiguous_and_expanded(backend):
    draw = contract.source(FP32)
    arguments = arguments_of(FP32, rows=(6, 5), parallel=True)
    arguments["x"] = draw(5, 6, 144)[..., ::2].transpose(0, 1)
    arguments["residual"] = draw(5, 6, 72).transpose(0, 1)
    arguments["down"], arguments["up"] = draw(72, 24).T, draw(24, 72).T
    arguments["ln_weight"] = draw(144)[::2]
    arguments["dy"] = draw(72).expand(6, 5, 72)
    contract.assert_parity("bottleneck_adapter", backend, arguments)


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_zero_rows(backend):
    values = parity.run("bottleneck_adapter", backend, arguments_of(FP32, rows=(2, 0)))
    assert values["y"].shape == values["dx"].shape == (2, 0, 72)
    for name in ("dln_weight", "dln_bias", "ddown", "ddown_bias", "dup", "dup_bias"):
        assert not values[name].any(), name
    assert values["ddown"].shape == (24, 72) and values["dup"].shape == (72, 24)


NAMES = ("x", "ln_weight", "ln_bias", "down", "down_bias", "up", "up_bias")


def leaves_of(draw, parallel: bool) -> dict:
    arguments = parity.bottleneck_adapter_arguments(draw, rows=(2, 3), d=7, m=3, parallel=parallel)
    return {name: arguments[name] for name in (*NAMES, "residual") if arguments[name] is not None}


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "after"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autograd_equals_the_formula(backend, parallel, activation):
    draw = contract.source(torch.float64)
    leaves, dy = leaves_of(draw, parallel), draw(2, 3, 7)

    def plain(x, ln_weight, ln_bias, down, down_bias, up, up_bias, residual=None):
        h = F.layer_norm(x, (7,), ln_weight, ln_bias)
        z = getattr(F, activation)(F.linear(h, down, down_bias))
        return (x if residual is None else residual) + 0.7 * F.linear(z, up, up_bias)

    def ours(**leaves):
        return ops.bottleneck_adapter(**leaves, activation=activation, scale=0.7)

    with ops.use(backend):
        computed = contract.gradients(ours, leaves, dy)
    contract.assert_close_by_name(computed, contract.gradients(plain, leaves, dy), 1e-13)


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(backend, activation):
    leaves = leaves_of(contract.source(torch.float64), parallel=True)

    def function(*tensors):
        return ops.bottleneck_adapter(**dict(zip(leaves, tensors, strict=True)), activation=activation, scale=0.7)

    with ops.use(backend):
        assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in leaves.values()])


def test_the_reference_is_differentiable():
    from petl_kernels.ops.bottleneck_adapter import reference

    draw = contract.source(torch.float64)
    leaves, dy = leaves_of(draw, parallel=True), draw(2, 3, 7)

    def plain(x, ln_weight, ln_bias, down, down_bias, up, up_bias, residual):
        return reference(x, residual, ln_weight, ln_bias, down, down_bias, up, up_bias, 1e-5, "gelu", 0.7)

    computed = contract.gradients(
        lambda **leaves: ops.bottleneck_adapter(**leaves, activation="gelu", scale=0.7), leaves, dy
    )
    contract.assert_close_by_name(computed, contract.gradients(plain, leaves, dy), 1e-13)


def test_opcheck():
    draw = contract.source(FP32)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves_of(draw, parallel=True).items()}
    x, residual = leaves["x"], leaves["residual"]
    parameters = [leaves[name] for name in NAMES[1:]]
    options = (1e-5, "gelu", 0.7)
    contract.opcheck(torch.ops.petl.bottleneck_adapter.default, (x, residual, *parameters, *options))
    bare = (x, None, None, None, leaves["down"], None, leaves["up"], None, *options)
    contract.opcheck(torch.ops.petl.bottleneck_adapter.default, bare)
    ln_weight, ln_bias, down, down_bias, up, _ = [p.detach() for p in parameters]
    backward = torch.ops.petl.bottleneck_adapter_backward.default
    dy, x = draw(2, 3, 7), x.detach()
    contract.opcheck(backward, (dy, x, True, ln_weight, ln_bias, down, down_bias, up, *options, True, True))
    contract.opcheck(backward, (dy, x, False, None, None, down, None, up, *options, False, False))


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
def test_same_bits_in_two_runs(backend, dtype):
    contract.assert_deterministic("bottleneck_adapter", backend, arguments_of(dtype, rows=(1100,), d=64, m=24))


@pytest.mark.skipif("cpu" not in contract.BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
def test_gradients_do_not_depend_on_threads(dtype):
    arguments = arguments_of(dtype, rows=(1100,), d=64, m=24)
    contract.assert_deterministic("bottleneck_adapter", "cpu", arguments, threads=(1, 2))


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "after"])
def test_saves_its_input_only(backend, parallel):
    arguments = arguments_of(torch.bfloat16, rows=(17,), parallel=parallel, adapter_dtype=FP32)
    leaves = {name: arguments[name].requires_grad_() for name in (*NAMES, *(["residual"] if parallel else []))}
    parameters = [leaves[name] for name in NAMES[1:]]
    with ops.use(backend):
        saved = contract.bytes_saved(lambda: ops.bottleneck_adapter(**leaves), parameters)
    assert saved == 17 * 2 * 72


def test_autocast_keeps_one_cast_copy_of_x():
    arguments = arguments_of(FP32, rows=(17,))
    leaves = {name: arguments[name].requires_grad_() for name in NAMES}
    parameters = [leaves[name] for name in NAMES[1:]]
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.bottleneck_adapter(**leaves)
        saved = contract.bytes_saved(lambda: ops.bottleneck_adapter(**leaves), parameters)
    assert y.dtype == torch.bfloat16 and saved == 17 * 2 * 72
    grads = torch.autograd.grad(y.float().sum(), list(leaves.values()))
    assert {grad.dtype for grad in grads} == {FP32}
    torch.testing.assert_close(y.float(), ops.bottleneck_adapter(**leaves), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_only_the_gradients_that_are_needed(backend):
    draw = contract.source(FP32)
    leaves = leaves_of(draw, parallel=False)
    leaves["down"].requires_grad_()
    with ops.use(backend):
        y = ops.bottleneck_adapter(**leaves)
        (ddown,) = torch.autograd.grad(y.sum(), leaves["down"])
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        everything = torch.autograd.grad(ops.bottleneck_adapter(**leaves).sum(), list(leaves.values()))
    assert torch.equal(ddown, dict(zip(leaves, everything, strict=True))["down"])


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_compiles_to_one_graph(backend):
    leaves = leaves_of(contract.source(FP32), parallel=True)

    def function(*tensors):
        return ops.bottleneck_adapter(**dict(zip(leaves, tensors, strict=True)), activation="gelu").relu()

    with ops.use(backend):
        contract.assert_compiles(function, *leaves.values(), tolerance=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.tensor(1.0)}, "x has rank 0"),
        ({"x": torch.ones(3, 7)}, r"down has shape \(2, 8\): expected \(2, 7\)"),
        ({"down": torch.ones(8)}, r"down has shape \(8,\): expected \(bottleneck, 8\)"),
        ({"up": torch.ones(2, 8)}, r"up has shape \(2, 8\): expected \(8, 2\)"),
        ({"up": torch.ones(8, 2, device="meta")}, "up is on meta: expected the device of x, cpu"),
        ({"down_bias": torch.ones(8)}, r"down_bias has shape \(8,\): expected \(2,\)"),
        ({"up_bias": torch.ones(2)}, r"up_bias has shape \(2,\): expected \(8,\)"),
        ({"ln_weight": torch.ones(2)}, r"ln_weight has shape \(2,\): expected \(8,\)"),
        ({"ln_bias": torch.ones(8)}, "ln_bias is given and ln_weight is None"),
        ({"activation": "tanh"}, "activation is 'tanh': expected one of relu, gelu, silu"),
        ({"residual": torch.ones(2, 8)}, r"residual is torch.float32 of shape \(2, 8\): expected torch.float32 of \(3"),
        ({"residual": torch.ones(3, 8).half()}, "residual is torch.float16"),
    ],
)
def test_refuses(change, message):
    arguments = {
        "x": torch.ones(3, 8),
        "down": torch.ones(2, 8),
        "down_bias": None,
        "up": torch.ones(8, 2),
        "up_bias": None,
    }
    with pytest.raises(InputError, match=message) as error:
        ops.bottleneck_adapter(**(arguments | change))
    assert "\n" not in str(error.value)
