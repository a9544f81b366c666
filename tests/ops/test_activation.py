from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from petl_kernels import ops, parity
from petl_kernels.dispatch import kernel_of
from petl_kernels.errors import InputError
from petl_kernels.ops import philox
from petl_kernels.ops.activation import ACTIVATIONS
from petl_kernels.ops.bits import pack_bits, unpack_bits

from . import contract

FP32, FP64 = torch.float32, torch.float64
PLAIN = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
}
NAN, INF = float("nan"), float("inf")


def arguments_of(dtype, seed=0, **options) -> dict:
    return parity.activation_arguments(contract.source(dtype, seed), **options)


def test_every_kind_is_tested():
    assert ACTIVATIONS.keys() == PLAIN.keys()


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(1,), (3,), (17,), (129,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_values_and_gradients(backend, dtype, rows, kind, dropout):
    arguments = arguments_of(dtype, rows=rows, features=61, kind=kind, dropout=dropout)
    contract.assert_parity("activation", backend, arguments)


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize("kind", ["relu", "gelu"])
@pytest.mark.parametrize(("rows", "features"), [(3, 1), (5, 7), (9, 8), (33, 1024), (3, 5001), (700, 24)])
def test_widths(backend, kind, rows, features):
    """Rows that end inside a byte, rows longer than a block, blocks of several rows."""
    for dtype in (FP32, torch.bfloat16):
        arguments = arguments_of(dtype, rows=(rows,), features=features, kind=kind, dropout=0.3)
        contract.assert_parity("activation", backend, arguments)


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("dtype", [*contract.DTYPES, FP64], ids=str)
@pytest.mark.parametrize("features", [1, 8, 13, 64, 1029])
def test_the_bits(backend, dtype, features):
    z = contract.source(dtype)(9, features)
    z.view(-1)[: 9 * features : 5] = 0
    y, bits = kernel_of("activation", backend)(z, "relu", 0.0, None)
    assert torch.equal(bits, pack_bits(z > 0)) and torch.equal(y, F.relu(z))


def test_packing():
    flags = torch.zeros(2, 11, dtype=torch.bool)
    flags[0, 0] = flags[0, 9] = flags[1, 7] = True
    bits = pack_bits(flags)
    assert bits.dtype == torch.uint8 and bits.tolist() == [[1, 2], [128, 0]]
    assert torch.equal(unpack_bits(bits, 11), flags)


SPECIAL = [NAN, -NAN, INF, -INF, 0.0, -0.0, 1e-40, -1e-40, 1.0, -1.0, 3e38, -3e38]


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("dtype", [*contract.DTYPES, FP64], ids=str)
@pytest.mark.parametrize("shape", [(1, 12), (2, 6)], ids=str)
def test_relu_of_special_numbers_is_pytorchs(backend, dtype, shape):
    z, dy = torch.tensor(SPECIAL, dtype=dtype).view(shape), torch.arange(1.0, 13).view(shape).to(dtype)
    results = []
    for function in (F.relu, lambda z: ops.activation(z, "relu")):
        leaf = z.clone().requires_grad_()
        with ops.use(backend):
            y = function(leaf)
            results.append((y.detach(), *torch.autograd.grad(y, leaf, dy)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("kind", PLAIN)
def test_nan_propagates(backend, kind):
    z = torch.full((3, 9), NAN, requires_grad=True)
    with ops.use(backend):
        y = ops.activation(z, kind)
        assert y.isnan().all() and torch.autograd.grad(y.sum() * NAN, z)[0].isnan().all()


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("kind", PLAIN)
def test_dropped_elements_are_zero_whatever_they_were(backend, kind):
    seed = torch.tensor([3])
    kept = philox.keep_mask(seed, (3, 9), 0.5)
    z = torch.full((3, 9), NAN, requires_grad=True)
    with ops.use(backend):
        y = ops.activation(z, kind, 0.5, seed)
        (dz,) = torch.autograd.grad(y, z, torch.full((3, 9), NAN))
    assert torch.equal(y.isnan(), kept)
    assert torch.equal(dz.isnan(), kept) if kind == "relu" else dz.isnan().all()


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize("kind", ["relu", "silu"])
def test_non_contiguous_and_expanded(backend, kind):
    draw = contract.source(FP32)
    arguments = arguments_of(FP32, rows=(6, 5), kind=kind, dropout=0.3)
    arguments["z"], arguments["dy"] = draw(5, 6, 144)[..., ::2].transpose(0, 1), draw(72).expand(6, 5, 72)
    contract.assert_parity("activation", backend, arguments)


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_zero_rows(backend, kind, dropout):
    values = parity.run("activation", backend, arguments_of(FP32, rows=(2, 0), kind=kind, dropout=dropout))
    assert values["y"].shape == values["dz"].shape == (2, 0, 72)


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_autograd_equals_the_formula(backend, kind, dropout):
    draw = contract.source(FP64)
    z, dy, seed = draw(2, 3, 7, std=3.0), draw(2, 3, 7), draw.seed()

    def plain(z):
        return philox.dropout(PLAIN[kind](z).view(6, 7), dropout, seed).view(z.shape)

    with ops.use(backend):
        computed = contract.gradients(lambda z: ops.activation(z, kind, dropout, seed), {"z": z}, dy)
    contract.assert_close_by_name(computed, contract.gradients(plain, {"z": z}, dy), 1e-13)


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(backend, kind, dropout):
    draw = contract.source(FP64)
    z, seed = draw(3, 7).requires_grad_(), draw.seed()
    with ops.use(backend):
        assert torch.autograd.gradcheck(lambda z: ops.activation(z, kind, dropout, seed), z)


@pytest.mark.parametrize("kind", PLAIN)
def test_the_reference_is_differentiable(kind):
    draw = contract.source(FP64)
    z, dy, seed = draw(2, 3, 7), draw(2, 3, 7), draw.seed()
    computed = contract.gradients(lambda z: ops.activation(z, kind, 0.4, seed), {"z": z}, dy)
    reference = kernel_of("activation", "reference")
    plain = contract.gradients(lambda z: reference(z, kind, 0.4, seed)[0], {"z": z}, dy)
    contract.assert_close_by_name(computed, plain, 1e-13)


@pytest.mark.parametrize(
    ("kind", "dropout"),
    [
        *(("relu", 0.3), ("gelu", 0.0)),
        *(pytest.param(*case, marks=pytest.mark.repeat) for case in (("relu", 0.0), ("gelu", 0.3))),
    ],
)
def test_opcheck(kind, dropout):
    draw = contract.source(FP32)
    z, dy, seed = draw(3, 4, 9).requires_grad_(), draw(3, 4, 9), draw.seed() if dropout else None
    contract.opcheck(torch.ops.petl.activation.default, (z, kind, dropout, seed))
    saved = pack_bits(z.detach().view(12, 9) > 0) if kind == "relu" else z.detach()
    contract.opcheck(torch.ops.petl.activation_backward.default, (dy, saved, kind, dropout, seed))


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("kind", ["relu", "silu"])
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
def test_same_bits_in_two_runs(backend, kind, dtype):
    arguments = arguments_of(dtype, rows=(600,), features=65, kind=kind, dropout=0.3)
    # PyTorch's own SiLU rounds otherwise at the end of a thread's share, on a CPU without AVX-512.
    threads = (2, 2) if backend == "reference" else (1, 2)
    contract.assert_deterministic("activation", backend, arguments, threads=threads)


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("kind", "per_row"), [("relu", 10), ("gelu", 2 * 77), ("silu", 2 * 77), ("gelu_tanh", 2 * 77)])
def test_saves_a_bit_or_z_and_the_seed(backend, dropout, kind, per_row):
    z = contract.source(torch.bfloat16)(17, 77).requires_grad_()
    with ops.use(backend):
        saved = contract.bytes_saved(lambda: ops.activation(z, kind, dropout), [])
    assert saved == 17 * per_row + (8 if dropout else 0)


def test_manual_seed_reproduces_dropout():
    z = torch.ones(9, 72)
    torch.manual_seed(1)
    first, second = ops.activation(z, "relu", 0.5), ops.activation(z, "relu", 0.5)
    torch.manual_seed(1)
    assert torch.equal(ops.activation(z, "relu", 0.5), first) and not torch.equal(first, second)


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("kind", ["relu", "gelu"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_to_one_graph(backend, kind, dropout):
    draw = contract.source(FP32)
    z, seed = draw(9, 72), draw.seed()
    with ops.use(backend):
        contract.assert_compiles(lambda z: ops.activation(z, kind, dropout, seed) * 2, z, tolerance=1e-5)


def test_drawing_the_seed_compiles_too():
    z = torch.ones(9, 72)
    compiled = torch.compile(lambda: ops.activation(z, "relu", 0.5), fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(), compiled())


def test_autocast_leaves_the_dtype():
    z = torch.ones(3, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.activation(z, "gelu").dtype == FP32
        assert ops.activation(z.bfloat16(), "gelu").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.tensor(1.0)}, "activation: z has rank 0"),
        ({"z": torch.ones(3, 8, dtype=torch.int64)}, "z has dtype torch.int64: expected a floating-point tensor"),
        ({"kind": "tanh"}, "activation is 'tanh': expected one of relu, gelu, silu, gelu_tanh"),
        ({"dropout": 1.0}, r"dropout is 1.0: expected a number in \[0, 1\)"),
        ({"dropout": 0.1, "seed": torch.ones(1)}, r"seed is torch.float32 of shape \(1,\): expected int64"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(InputError, match=message) as error:
        ops.activation(**({"z": torch.ones(3, 8), "kind": "relu"} | change))
    assert "\n" not in str(error.value)
