from __future__ import annotations

import importlib

import pytest
import torch
from torch.nn import functional as F

from petl_kernels import ops, parity
from petl_kernels.accounting.work import linear_flops
from petl_kernels.errors import InputError
from petl_kernels.ops.activation import ACTIVATIONS

from . import contract

op = importlib.import_module("petl_kernels.ops.parallel_ffn")  # the package shows the function of that name
FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16
TRAINED = ("x", "down", "down_bias", "up", "up_bias")
backends = pytest.mark.parametrize("backend", contract.BACKENDS)
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
recomputes = pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])


def arguments_of(
    dtype, rows=(17,), d=40, f=72, m=13, device="cpu", adapter_dtype=None, activation="relu", **options
) -> dict:
    """Returns the arguments of the function, without the room, and dy for its result."""
    draw = parity.Source(torch.device(device), dtype)
    network = parity.frozen_ffn_arguments(draw, rows, d, f, activation=activation, **options)
    adapter = parity.bottleneck_adapter_arguments(
        draw, rows, d, m, norm=False, activation=activation, adapter_dtype=adapter_dtype, **options
    )
    if activation == "relu" and dtype.itemsize == 2 and network["c1"] is not None:
        network["c1"] = (
            torch.tensor([5.0, -5.0]).repeat(f)[:f].to(network["c1"])
        )  # away from the kink, where rounding decides
    named = {name: network[name] for name in ("x", "w1", "c1", "w2", "c2", "dy")}
    return named | {name: adapter[name] for name in TRAINED[1:]}


def leaves_of(given: dict) -> dict:
    return {name: given[name] for name in TRAINED if given[name] is not None}


def ours(given: dict, weights=None, **options):
    """(leaves, a function of them)"""
    leaves = leaves_of(given)
    w1, c1, w2 = weights or op.with_room(given["w1"], given["c1"], given["w2"], given["down"].shape[0])
    fixed = {"w1": w1, "c1": c1, "w2": w2, "c2": given["c2"]} | dict.fromkeys(set(TRAINED) - set(leaves))
    return leaves, lambda **leaves: ops.parallel_ffn(**leaves, **fixed, **options)


def plain(given: dict, activation: str, scale: float):
    act = ACTIVATIONS[activation]

    def function(x, down, up, down_bias=None, up_bias=None):
        w1, w2 = given["w1"].to(x.dtype), given["w2"].to(x.dtype)
        c1, c2 = (None if given[name] is None else given[name].to(x.dtype) for name in ("c1", "c2"))
        trained = (None if tensor is None else tensor.to(x.dtype) for tensor in (down, down_bias, up, up_bias))
        down, down_bias, up, up_bias = trained
        network = F.linear(act(F.linear(x, w1, c1)), w2, c2)
        return network + scale * F.linear(act(F.linear(x, down, down_bias)), up, up_bias)

    return function


def assert_right(backend: str, given: dict, activation: str, scale: float, **options) -> None:
    """Each value and gradient to the criterion of the ops: at most twice the error of the plain formula."""
    leaves, function = ours(given, activation=activation, scale=scale, **options)
    with ops.use(backend):
        computed = contract.gradients(function, leaves, given["dy"])
    reference = contract.gradients(plain(given, activation, scale), leaves, given["dy"])
    wide = {name: value if value is None else value.double() for name, value in given.items()}
    exact = contract.gradients(plain(wide, activation, scale), leaves_of(wide), wide["dy"])
    for name, value in exact.items():
        error = parity.compare_tensors(name, computed[name], reference[name], value)
        assert error is None, error


@backends
@activations
@recomputes
def test_autograd_equals_the_formula(backend, activation, recompute):
    given = arguments_of(FP64, rows=(2, 3), d=7, f=11, m=5)
    leaves, function = ours(given, activation=activation, scale=4.0, recompute=recompute)
    with ops.use(backend):
        computed = contract.gradients(function, leaves, given["dy"])
    expected = contract.gradients(plain(given, activation, 4.0), leaves, given["dy"])
    contract.assert_close_by_name(computed, expected, 1e-12)


@backends
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(1,), (2, 3, 5), (129,)], ids=str)
@pytest.mark.parametrize(("activation", "recompute"), [("relu", False), ("gelu", False), ("silu", True)])
def test_values_and_gradients(backend, dtype, rows, activation, recompute):
    given = arguments_of(dtype, rows=rows, activation=activation)
    assert_right(backend, given, activation, 4.0, recompute=recompute)


@backends
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize(("d", "f", "m"), [(1, 1, 1), (7, 64, 8), (24, 3, 20)])
def test_odd_widths_no_biases_and_another_scale(backend, dtype, d, f, m):
    given = arguments_of(dtype, rows=(33,), d=d, f=f, m=m, bias=False, activation="silu")
    assert_right(backend, given, "silu", 0.3)


@backends
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_an_adapter_wider_than_the_weights(backend, dtype):
    given = arguments_of(dtype, rows=(300,), adapter_dtype=FP32)
    leaves, function = ours(given, scale=4.0)
    with ops.use(backend):
        computed = contract.gradients(function, leaves, given["dy"])
    assert [computed[f"d{name}"].dtype for name in TRAINED] == [dtype, FP32, FP32, FP32, FP32]
    assert_right(backend, given, "relu", 4.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize(("d", "f", "m"), [(40, 72, 13), (1024, 4096, 64)])
def test_on_a_card(dtype, d, f, m):
    given = arguments_of(dtype, rows=(300,), d=d, f=f, m=m, device="cuda", adapter_dtype=FP32)
    assert_right("triton", given, "relu", 4.0)


@pytest.mark.parametrize("absent", [("c1", "c2"), ("down_bias",), ("up_bias",), ("c1", "up_bias"), ("c2", "down_bias")])
def test_any_bias_may_be_absent(absent):
    given = arguments_of(FP32) | dict.fromkeys(absent)
    assert_right("reference", given, "relu", 4.0)


@backends
def test_gradcheck(backend):
    leaves, function = ours(arguments_of(FP64, rows=(2, 3), d=4, f=5, m=3), activation="gelu", scale=1.5)
    names = tuple(leaves)
    with ops.use(backend):
        values = [leaf.clone().requires_grad_() for leaf in leaves.values()]
        assert torch.autograd.gradcheck(lambda *given: function(**dict(zip(names, given, strict=True))), values)


@pytest.mark.parametrize(
    ("activation", "keeps"),
    [
        *(("relu", "bits"), ("silu", "x")),
        *(pytest.param(*case, marks=pytest.mark.repeat) for case in (("gelu", "z"), ("relu", "nothing"))),
    ],
)
def test_opcheck(activation, keeps):
    given = arguments_of(FP32, rows=(2, 3), d=7, f=11, m=5)
    w1, c1, w2 = op.with_room(given["w1"], given["c1"], given["w2"], 5)
    trained = [given[name].requires_grad_() for name in TRAINED[1:]]
    x = given["x"].requires_grad_(keeps != "nothing")
    options = (activation, 4.0, keeps)
    contract.opcheck(torch.ops.petl.parallel_ffn.default, (x, w1, c1, w2, given["c2"], *trained, *options))
    frozen = [tensor.detach() for tensor in (x, *trained)]
    _, kept = torch.ops.petl.parallel_ffn(frozen[0], w1, c1, w2, given["c2"], *frozen[1:], *options, "reference")
    saved = (given["dy"], frozen[0], kept, w1, c1, w2, *frozen[1:4], *options)
    for needs in (keeps != "nothing", True, True), (keeps != "nothing", False, False):
        contract.opcheck(torch.ops.petl.parallel_ffn_backward.default, (*saved, *needs))


@backends
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@activations
def test_saved_bytes(backend, dtype, activation):
    d, f, m = 40, 131, 13
    given = arguments_of(dtype, d=d, f=f, m=m, activation=activation)
    weights = op.with_room(given["w1"], given["c1"], given["w2"], m)
    trained = {name: leaf.requires_grad_() for name, leaf in leaves_of(given).items()}
    parameters = [leaf for name, leaf in trained.items() if name != "x"]

    def saved(leaves, **options):
        _, function = ours(given, weights, activation=activation, **options)
        with ops.use(backend):
            return contract.bytes_saved(lambda: function(**leaves), [*weights, *parameters])

    wide = f + op.room(m)
    kept = -(-wide // 8) if activation == "relu" else wide * dtype.itemsize
    x = d * dtype.itemsize
    assert saved(trained) == 17 * (x + kept)
    assert saved(trained, recompute=True) == 17 * x
    assert saved(trained | {"x": given["x"].detach()}) == 17 * x
    frozen = {name: leaf.detach() for name, leaf in trained.items()}
    assert saved(frozen | {"x": trained["x"]}) == 17 * kept
    assert saved(frozen) == 0


@pytest.mark.parametrize("wanted", TRAINED)
@backends
def test_only_the_gradients_that_are_needed(backend, wanted):
    leaves, function = ours(arguments_of(FP32), scale=4.0)
    with ops.use(backend):
        leaves[wanted].requires_grad_()
        (grad,) = torch.autograd.grad(function(**leaves).square().sum(), leaves[wanted])
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        everything = torch.autograd.grad(function(**leaves).square().sum(), list(leaves.values()))
    assert torch.equal(grad, dict(zip(leaves, everything, strict=True))[wanted])


def test_matrix_work():
    """dx and y for m more hidden units; the adapter's own sums and what they are made of beside that."""
    rows, d, f, m = 33, 24, 40, 16
    given = arguments_of(FP32, rows=(rows,), d=d, f=f, m=m)
    leaves, function = ours(given)
    with ops.use("reference"):
        work = linear_flops(lambda: contract.gradients(function, leaves, given["dy"]))
    assert work == 2 * rows * d * (4 * (f + m) + 4 * m)


@backends
def test_same_bits_in_two_runs(backend):
    given = arguments_of(BF16, rows=(300,), d=32, f=64)
    leaves, function = ours(given)
    with ops.use(backend):
        runs = [contract.gradients(function, leaves, given["dy"]) for _ in range(2)]
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_a_second_forward_before_the_first_backward():
    given = arguments_of(FP32)
    leaves, function = ours(given)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    first = function(**leaves)
    function(**leaves)
    grads = torch.autograd.grad(first, list(leaves.values()), given["dy"])
    expected = contract.gradients(function, leaves, given["dy"])
    assert all(torch.equal(grad, expected[f"d{name}"]) for name, grad in zip(leaves, grads, strict=True))


def test_the_room_follows_the_adapter():
    """An optimizer's change that PyTorch does not count is in the next call."""
    given = arguments_of(FP32, m=5)
    leaves, function = ours(given, scale=4.0)
    function(**leaves)
    leaves["down"].data.add_(1)
    leaves["up"].data.add_(1)
    torch.testing.assert_close(function(**leaves), plain(given, "relu", 4.0)(**leaves), rtol=1e-4, atol=1e-4)


def test_a_smaller_adapter_in_the_same_room():
    larger, smaller = arguments_of(FP32, m=7), arguments_of(FP32, m=5) | {"down_bias": None}
    weights = op.with_room(larger["w1"], larger["c1"], larger["w2"], 7)
    leaves, function = ours(larger, weights)
    function(**leaves)
    given = larger | {name: smaller[name] for name in TRAINED[1:]}
    leaves, function = ours(given, weights)
    torch.testing.assert_close(function(**leaves), plain(given, "relu", 1.0)(**leaves), rtol=1e-5, atol=1e-5)
    for part in weights[:2]:  # of a larger one that has diverged
        part[-1] = torch.inf
    torch.testing.assert_close(function(**leaves), plain(given, "relu", 1.0)(**leaves), rtol=1e-5, atol=1e-5)


def test_autocast_follows_linear():
    given = arguments_of(FP32, activation="gelu")
    leaves, function = ours(given, activation="gelu", scale=4.0)
    with torch.autocast("cpu", BF16):
        computed = contract.gradients(function, leaves, given["dy"].to(BF16))
        theirs = plain(given, "gelu", 4.0)(**leaves)
    assert computed["y"].dtype == theirs.dtype == BF16
    assert {value.dtype for name, value in computed.items() if name != "y"} == {FP32}
    torch.testing.assert_close(computed["y"], theirs, rtol=0.05, atol=0.2)


def test_zero_rows():
    given = arguments_of(FP32, rows=(2, 0))
    leaves, function = ours(given)
    computed = contract.gradients(function, leaves, given["dy"])
    assert computed["y"].shape == computed["dx"].shape == (2, 0, 40)
    assert not any(computed[f"d{name}"].any() for name in TRAINED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.tensor(1.0)}, "x has rank 0"),
        ({"w1": torch.ones(16, 7)}, r"w1 has shape \(16, 7\): expected \(out, 8\)"),
        ({"w2": torch.ones(16, 8)}, r"w2 has shape \(16, 8\): expected \(8, 16\)"),
        ({"w2": torch.ones(8, 16).half()}, "w2 has dtype torch.float16: expected that of x, torch.float32"),
        ({"w1": torch.ones(16, 8, requires_grad=True)}, "w1 requires grad: expected a frozen weight"),
        ({"w1": ops.quantize(torch.ones(16, 8), "int8")}, r"w1 is quantized \(int8\): expected a dense weight"),
        ({"down": torch.ones(17, 8)}, r"down has shape \(17, 8\): expected \(m, 8\) with room for m in w1 \(16, 8\)"),
        ({"down": torch.ones(3, 7)}, r"down has shape \(3, 7\): expected \(3, 8\)"),
        ({"up": torch.ones(8, 4)}, r"up has shape \(8, 4\): expected \(8, 3\)"),
        ({"c1": torch.ones(8)}, r"c1 has shape \(8,\): expected \(16,\)"),
        ({"c2": torch.ones(8, requires_grad=True)}, "c2 requires grad: expected a frozen bias"),
        ({"down_bias": torch.ones(3, device="meta")}, "down_bias is on meta: expected the device of x, cpu"),
        ({"activation": "tanh"}, "activation is 'tanh': expected one of relu, gelu, silu, gelu_tanh"),
    ],
)
def test_refuses(change, message):
    arguments = {
        "x": torch.ones(3, 8),
        "w1": torch.ones(16, 8),
        "c1": torch.ones(16),
        "w2": torch.ones(8, 16),
        "c2": None,
    }
    arguments |= {"down": torch.ones(3, 8), "down_bias": None, "up": torch.ones(8, 3), "up_bias": None}
    with pytest.raises(InputError, match=f"parallel_ffn: {message}") as error:
        ops.parallel_ffn(**(arguments | change))
    assert "\n" not in str(error.value)
