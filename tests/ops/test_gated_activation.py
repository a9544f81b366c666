from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from petl_kernels import ops, parity
from petl_kernels.dispatch import kernel_of
from petl_kernels.errors import InputError
from petl_kernels.ops import philox
from petl_kernels.ops.activation import ACTIVATIONS

from . import contract

FP32, FP64 = torch.float32, torch.float64
KINDS = tuple(ACTIVATIONS)


def arguments_of(dtype, seed=0, **options) -> dict:
    return parity.activation_arguments(contract.source(dtype, seed), gated=True, **options)


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(1,), (3,), (17,), (129,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_values_and_gradients(backend, dtype, rows, kind, dropout):
    arguments = arguments_of(dtype, rows=rows, features=61, kind=kind, dropout=dropout)
    contract.assert_parity("gated_activation", backend, arguments)


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize(("rows", "features"), [(3, 1), (9, 8), (33, 1024), (3, 5001), (700, 24)])
def test_widths(backend, rows, features):
    arguments = arguments_of(FP32, rows=(rows,), features=features, kind="silu", dropout=0.3)
    contract.assert_parity("gated_activation", backend, arguments)


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_propagates(backend, kind):
    nan, ones = torch.full((3, 9), float("nan")), torch.ones(3, 9)
    with ops.use(backend):
        assert ops.gated_activation(nan, ones, kind).isnan().all()
        assert ops.gated_activation(ones, nan, kind).isnan().all()


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_dropped_elements_are_zero_whatever_they_were(backend):
    nan, seed = torch.full((3, 9), float("nan")), torch.tensor([3])
    with ops.use(backend):
        y = ops.gated_activation(nan, nan, "silu", 0.5, seed)
    assert torch.equal(y.isnan(), philox.keep_mask(seed, (3, 9), 0.5))


@pytest.mark.parametrize("backend", contract.HELD)
def test_non_contiguous_and_expanded(backend):
    draw = contract.source(FP32)
    both = draw(6, 5, 144)
    arguments = arguments_of(FP32, rows=(6, 5), kind="silu", dropout=0.3)
    arguments["z"], arguments["g"] = both.chunk(2, -1)
    arguments["dy"] = draw(72).expand(6, 5, 72)
    contract.assert_parity("gated_activation", backend, arguments)


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_zero_rows(backend, dropout):
    values = parity.run("gated_activation", backend, arguments_of(FP32, rows=(2, 0), dropout=dropout))
    assert values["y"].shape == values["dz"].shape == values["dg"].shape == (2, 0, 72)


def leaves_of(draw) -> dict:
    return {"z": draw(2, 3, 7, std=3.0), "g": draw(2, 3, 7)}


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_autograd_equals_the_formula(backend, kind, dropout):
    draw = contract.source(FP64)
    leaves, dy, seed = leaves_of(draw), draw(2, 3, 7), draw.seed()

    def plain(z, g):
        act = F.gelu(z, approximate="tanh") if kind == "gelu_tanh" else getattr(F, kind)(z)
        return philox.dropout((act * g).view(6, 7), dropout, seed).view(z.shape)

    with ops.use(backend):
        computed = contract.gradients(lambda z, g: ops.gated_activation(z, g, kind, dropout, seed), leaves, dy)
    contract.assert_close_by_name(computed, contract.gradients(plain, leaves, dy), 1e-13)


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(backend, kind, dropout):
    draw = contract.source(FP64)
    leaves, seed = [leaf.requires_grad_() for leaf in leaves_of(draw).values()], draw.seed()
    with ops.use(backend):
        assert torch.autograd.gradcheck(lambda z, g: ops.gated_activation(z, g, kind, dropout, seed), leaves)


def test_the_reference_is_differentiable():
    draw = contract.source(FP64)
    leaves, dy, seed = leaves_of(draw), draw(2, 3, 7), draw.seed()
    computed = contract.gradients(lambda z, g: ops.gated_activation(z, g, "silu", 0.4, seed), leaves, dy)
    reference = kernel_of("gated_activation", "reference")
    plain = contract.gradients(lambda z, g: reference(z, g, "silu", 0.4, seed), leaves, dy)
    contract.assert_close_by_name(computed, plain, 1e-13)


@pytest.mark.parametrize("wanted", ["z", "g"])
def test_only_one_gradient(wanted):
    leaves = leaves_of(contract.source(FP64))
    leaves[wanted].requires_grad_()
    (grad,) = torch.autograd.grad(ops.gated_activation(**leaves, kind="silu").sum(), leaves[wanted])
    expected = torch.autograd.grad((F.silu(leaves["z"]) * leaves["g"]).sum(), leaves[wanted])[0]
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.repeat), 0.3])
def test_opcheck(dropout):
    draw = contract.source(FP32)
    z, g = draw(3, 4, 9).requires_grad_(), draw(3, 4, 9).requires_grad_()
    options = ("gelu_tanh", dropout, draw.seed() if dropout else None)
    contract.opcheck(torch.ops.petl.gated_activation.default, (z, g, *options))
    given = (draw(3, 4, 9), z.detach(), g.detach(), *options)
    contract.opcheck(torch.ops.petl.gated_activation_backward.default, given)


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
def test_same_bits_in_two_runs(backend, dtype):
    arguments = arguments_of(dtype, rows=(600,), features=65, kind="silu", dropout=0.3)
    # PyTorch's own SiLU rounds otherwise at the end of a thread's share, on a CPU without AVX-512.
    threads = (2, 2) if backend == "reference" else (1, 2)
    contract.assert_deterministic("gated_activation", backend, arguments, threads=threads)


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_saves_both_inputs_and_the_seed(backend, dropout, kind):
    draw = contract.source(torch.bfloat16)
    z, g = draw(17, 77).requires_grad_(), draw(17, 77).requires_grad_()
    with ops.use(backend):
        saved = contract.bytes_saved(lambda: ops.gated_activation(z, g, kind, dropout), [])
    assert saved == 17 * 4 * 77 + (8 if dropout else 0)


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_to_one_graph(backend, dropout):
    draw = contract.source(FP32)
    z, g, seed = draw(9, 72), draw(9, 72), draw.seed()
    with ops.use(backend):
        contract.assert_compiles(
            lambda z, g: ops.gated_activation(z, g, "silu", dropout, seed) * 2, z, g, tolerance=1e-5
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.tensor(1.0)}, "gated_activation: z has rank 0"),
        ({"z": torch.ones(3, 8, dtype=torch.int64)}, "z has dtype torch.int64: expected a floating-point tensor"),
        (
            {"g": torch.ones(3, 7)},
            r"g is torch.float32 of shape \(3, 7\): expected that of z, torch.float32 of \(3, 8\)",
        ),
        ({"g": torch.ones(3, 8).half()}, "g is torch.float16"),
        ({"g": torch.ones(3, 8, device="meta")}, "g is on meta: expected the device of x, cpu"),
        ({"kind": "tanh"}, "activation is 'tanh': expected one of relu, gelu, silu, gelu_tanh"),
        ({"dropout": -0.1}, r"dropout is -0.1: expected a number in \[0, 1\)"),
        ({"dropout": 0.1, "seed": torch.ones(2, dtype=torch.int64)}, r"seed is torch.int64 of shape \(2,\)"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(InputError, match=message) as error:
        ops.gated_activation(**({"z": torch.ones(3, 8), "g": torch.ones(3, 8), "kind": "silu"} | change))
    assert "\n" not in str(error.value)
