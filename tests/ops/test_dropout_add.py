from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from petl_kernels import ops, parity
from petl_kernels.dispatch import kernel_of
from petl_kernels.errors import InputError
from petl_kernels.ops import philox

from . import contract

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def arguments_of(dtype, seed=0, **options) -> dict:
    return parity.dropout_add_arguments(contract.source(dtype, seed), **options)


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(1,), (3,), (17,), (129,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("features", [61, 64])
def test_values_and_gradients(backend, dtype, rows, features):
    contract.assert_parity("dropout_add", backend, arguments_of(dtype, rows=rows, features=features))


PAIRS = [(a, b) for a in (FP32, BF16, FP16, FP64) for b in (FP32, BF16, FP16, FP64) if a != b]


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize(("dtype", "stream"), PAIRS, ids=str)
def test_two_dtypes(backend, dtype, stream):
    draw = contract.source(dtype)
    x, residual, seed = draw(9, 13).requires_grad_(), draw(9, 13, dtype=stream).requires_grad_(), draw.seed()
    with ops.use(backend):
        y = ops.dropout_add(x, residual, 0.3, seed)
    wide = torch.promote_types(dtype, stream)
    assert y.dtype == (residual + x).dtype == wide
    exact = residual.double() + philox.dropout(x.double(), 0.3, seed)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=8 * torch.finfo(wide).eps)
    dy = draw(9, 13, dtype=wide)
    dx, dresidual = torch.autograd.grad(y, (x, residual), dy)
    assert dx.dtype == dtype and torch.equal(dresidual, dy.to(stream))
    wide_dx = philox.dropout(dy.double(), 0.3, seed)
    torch.testing.assert_close(dx.double(), wide_dx, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize(("rows", "features"), [(3, 1), (9, 8), (33, 1024), (3, 5001), (700, 24)])
def test_widths(backend, rows, features):
    contract.assert_parity("dropout_add", backend, arguments_of(FP32, rows=(rows,), features=features))


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_dropped_elements_are_zero_whatever_they_were(backend):
    seed = torch.tensor([3])
    with ops.use(backend):
        y = ops.dropout_add(torch.full((3, 9), float("nan")), torch.ones(3, 9), 0.5, seed)
    assert torch.equal(y.isnan(), philox.keep_mask(seed, (3, 9), 0.5))


@pytest.mark.parametrize("backend", contract.HELD)
def test_non_contiguous_and_expanded(backend):
    draw = contract.source(FP32)
    arguments = arguments_of(FP32, rows=(6, 5))
    arguments["x"], arguments["residual"] = draw(5, 6, 144)[..., ::2].transpose(0, 1), draw(5, 6, 72).transpose(0, 1)
    arguments["dy"] = draw(72).expand(6, 5, 72)
    contract.assert_parity("dropout_add", backend, arguments)


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_zero_rows(backend):
    values = parity.run("dropout_add", backend, arguments_of(FP32, rows=(2, 0)))
    assert values["y"].shape == values["dx"].shape == (2, 0, 72)


def leaves_of(draw) -> dict:
    return {"x": draw(2, 3, 7), "residual": draw(2, 3, 7)}


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_autograd_equals_the_formula(backend):
    draw = contract.source(FP64)
    leaves, dy, seed = leaves_of(draw), draw(2, 3, 7), draw.seed()
    kept = philox.keep_mask(seed, (6, 7), 0.4).view(2, 3, 7)
    with ops.use(backend):
        computed = contract.gradients(lambda x, residual: ops.dropout_add(x, residual, 0.4, seed), leaves, dy)
    plain = contract.gradients(lambda x, residual: residual + x * kept * philox.keep_scale(0.4), leaves, dy)
    contract.assert_close_by_name(computed, plain, 1e-14)


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_gradcheck(backend):
    draw = contract.source(FP64)
    leaves, seed = [leaf.requires_grad_() for leaf in leaves_of(draw).values()], draw.seed()
    with ops.use(backend):
        assert torch.autograd.gradcheck(lambda x, residual: ops.dropout_add(x, residual, 0.4, seed), leaves)


def test_the_reference_is_differentiable():
    draw = contract.source(FP64)
    leaves, dy, seed = leaves_of(draw), draw(2, 3, 7), draw.seed()
    computed = contract.gradients(lambda x, residual: ops.dropout_add(x, residual, 0.4, seed), leaves, dy)
    reference = kernel_of("dropout_add", "reference")
    plain = contract.gradients(lambda x, residual: reference(x, residual, 0.4, seed), leaves, dy)
    contract.assert_close_by_name(computed, plain, 1e-14)


def test_opcheck():
    draw = contract.source(FP32)
    x, residual, seed = draw(3, 4, 9, dtype=BF16).requires_grad_(), draw(3, 4, 9).requires_grad_(), draw.seed()
    contract.opcheck(torch.ops.petl.dropout_add.default, (x, residual, 0.3, seed))
    contract.opcheck(torch.ops.petl.dropout_add.default, (residual, residual.detach().clone(), 0.3, seed))
    contract.opcheck(torch.ops.petl.dropout_add_backward.default, (draw(3, 4, 9), BF16, 0.3, seed))


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_same_bits_in_two_runs(backend, dtype):
    arguments = arguments_of(dtype, rows=(600,), features=65)
    contract.assert_deterministic("dropout_add", backend, arguments, threads=(1, 2))


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_saves_the_seed_only(backend, p):
    draw = contract.source(BF16)
    x, residual = draw(17, 72).requires_grad_(), draw(17, 72, dtype=FP32).requires_grad_()
    with ops.use(backend):
        assert contract.bytes_saved(lambda: ops.dropout_add(x, residual, p), []) == (8 if p else 0)


def test_the_residuals_gradient_is_no_copy():
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves_of(contract.source(FP32)).items()}
    dy = torch.ones(2, 3, 7)
    y = ops.dropout_add(**leaves, p=0.3)
    (dresidual,) = torch.autograd.grad(y, leaves["residual"], dy)
    assert dresidual.data_ptr() == dy.data_ptr()


def test_without_dropout_a_plain_addition():
    draw, state = contract.source(BF16), torch.get_rng_state()
    x, residual = draw(3, 8), draw(3, 8, dtype=FP32)
    y = ops.dropout_add(x, residual, 0.0)
    assert torch.equal(y, residual + x) and torch.equal(torch.get_rng_state(), state)


def test_under_autocast_the_stream_keeps_its_dtype():
    x, residual = torch.ones(3, 8, dtype=BF16, requires_grad=True), torch.ones(3, 8, requires_grad=True)
    with torch.autocast("cpu", BF16):
        y = ops.dropout_add(x, residual, 0.5)
    assert y.dtype == FP32
    assert [grad.dtype for grad in torch.autograd.grad(y.sum(), (x, residual))] == [BF16, FP32]


def test_recorded_seeds_are_replayed():
    x, residual = torch.ones(9, 72), torch.zeros(9, 72)
    with philox.recording() as seeds:
        first, second = ops.dropout_add(x, residual, 0.5), ops.dropout_add(x, residual, 0.5)
    with philox.replaying(seeds):
        assert torch.equal(ops.dropout_add(x, residual, 0.5), first)
        assert torch.equal(ops.dropout_add(x, residual, 0.5), second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_compiles_to_one_graph(backend):
    draw = contract.source(FP32)
    seed = draw.seed()
    with ops.use(backend):
        contract.assert_compiles(
            lambda x, residual: F.relu(ops.dropout_add(x, residual, 0.3, seed)), draw(9, 72), draw(9, 72)
        )


def test_drawing_the_seed_compiles_too():
    x, residual = torch.ones(9, 72), torch.zeros(9, 72)
    compiled = torch.compile(lambda: ops.dropout_add(x, residual, 0.5), fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(), compiled())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.tensor(1.0)}, "dropout_add: x has rank 0"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, "x has dtype torch.int64: expected a floating-point tensor"),
        (
            {"residual": torch.ones(8)},
            r"residual is torch.float32 of shape \(8,\): expected a floating-point tensor of \(3, 8\)",
        ),
        ({"residual": torch.ones(3, 8, dtype=torch.int32)}, "residual is torch.int32"),
        ({"residual": torch.ones(3, 8, device="meta")}, "residual is on meta: expected the device of x, cpu"),
        ({"p": 1.0}, r"dropout is 1.0: expected a number in \[0, 1\)"),
        ({"seed": torch.ones(1)}, r"seed is torch.float32 of shape \(1,\): expected int64"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(InputError, match=message) as error:
        ops.dropout_add(**({"x": torch.ones(3, 8), "residual": torch.ones(3, 8), "p": 0.1} | change))
    assert "\n" not in str(error.value)
