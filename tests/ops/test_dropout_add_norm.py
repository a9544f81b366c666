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
OP = "dropout_add_norm"
backends = pytest.mark.parametrize("backend", contract.BACKENDS)
norms = pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])


def arguments_of(dtype, seed=0, **options) -> dict:
    return parity.dropout_add_norm_arguments(contract.source(dtype, seed), **options)


@norms
@backends
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(), (1,), (129,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize(("d", "p"), [(61, 0.3), (64, 0.0)], ids=str)
def test_values_and_gradients(backend, dtype, rows, d, p, centred):
    contract.assert_parity(OP, backend, arguments_of(dtype, rows=rows, d=d, p=p, centred=centred))


@norms
@backends
@pytest.mark.parametrize("options", [{"more": False}, {"bias": False, "parameter_dtype": FP32}], ids=str)
def test_what_may_be_absent(backend, options, centred):
    contract.assert_parity(OP, backend, arguments_of(BF16, rows=(33,), centred=centred, **options))


@backends
@pytest.mark.parametrize(("rows", "d"), [(3, 7), (9, 8), (33, 1024), (3, 5001), (700, 24)])
def test_widths(backend, rows, d):
    contract.assert_parity(OP, backend, arguments_of(FP32, rows=(rows,), d=d))


# Dtypes of y, the residual stream and the parameters.
DTYPES = [
    *((dtype, dtype, dtype) for dtype in (FP32, BF16, FP16, FP64)),
    *((BF16, FP32, FP32), (FP16, FP32, BF16), (BF16, BF16, FP32), (FP32, BF16, FP32), (FP16, BF16, FP32)),
]


@norms
@backends
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("more", [True, False], ids=["more", "alone"])
def test_the_bits_of_the_ops_one_after_the_other(backend, dtypes, p, more, centred):
    """Values and gradients, by name: a layer may take the one op or the two, and its numbers do not change."""
    dtype, stream, parameters = dtypes
    options = {"rows": (9, 5), "d": 77, "p": p, "more": more, "centred": centred}
    given = arguments_of(dtype, stream=stream, parameter_dtype=parameters, **options)
    computed, expected = parity.run(OP, backend, given), one_after_the_other(backend, given)
    for name, value in expected.items():
        assert computed[name].dtype == value.dtype and torch.equal(computed[name], value), name


def one_after_the_other(backend: str, given: dict) -> dict:
    y, p, seed, weight, bias = (given[name] for name in ("y", "p", "seed", "weight", "bias"))
    norm = ("layer_norm", (weight, bias)) if given["centred"] else ("rms_norm", (weight,))
    h = kernel_of("dropout_add", backend)(y, given["residual"], p, seed) if p else given["residual"] + y
    u, *statistics = kernel_of(norm[0], backend)(h, *norm[1], given["eps"])
    needs = (True, True, bias is not None)[: 1 + len(norm[1])]
    dh, *sums = kernel_of(f"{norm[0]}_backward", backend)(given["du"], h, *statistics, weight, *needs)
    dh = dh if given["dh"] is None else dh + given["dh"]
    dy = kernel_of("dropout_add_backward", backend)(dh, y.dtype, p, seed) if p else dh.to(y.dtype)
    return {"h": h, "u": u, "dresidual": dh, "dy": dy, "dweight": sums[0]} | dict(
        zip(["dbias"], sums[1:], strict=False)
    )


@backends
def test_dropped_elements_are_zero_whatever_they_were(backend):
    seed = torch.tensor([3])
    with ops.use(backend):
        h, _ = ops.dropout_add_norm(torch.full((3, 9), float("nan")), torch.ones(3, 9), torch.ones(9), p=0.5, seed=seed)
    assert torch.equal(h.isnan(), philox.keep_mask(seed, (3, 9), 0.5))


@backends
@pytest.mark.parametrize("rows", [511, 5000])
def test_long_column_sums_stay_exact(backend, rows):
    given = arguments_of(FP32, rows=(rows,), d=16)
    given["du"] += 100
    contract.assert_parity(OP, backend, given)


@norms
@backends
def test_non_contiguous_and_expanded(backend, centred):
    draw, given = contract.source(FP32), arguments_of(FP32, rows=(6, 5), centred=centred)
    given["y"], given["residual"] = draw(5, 6, 144)[..., ::2].transpose(0, 1), draw(5, 6, 72).transpose(0, 1)
    given["du"], given["dh"] = draw(72).expand(6, 5, 72), draw(6, 5, 144)[..., ::2]
    given["weight"] = draw(144)[::2]
    contract.assert_parity(OP, backend, given)


@norms
@backends
def test_zero_rows(backend, centred):
    values = parity.run(OP, backend, arguments_of(FP32, rows=(2, 0), centred=centred))
    assert values["h"].shape == values["u"].shape == values["dy"].shape == (2, 0, 72)
    assert torch.equal(values["dweight"], torch.zeros(72))
    assert values["dbias"].shape == (72 if centred else 0,)


def leaves_of(draw, centred) -> dict:
    leaves = {"y": draw(2, 3, 7), "residual": draw(2, 3, 7), "weight": draw(7)}
    return leaves | {"bias": draw(7)} if centred else leaves


def plain(y, residual, weight, bias=None, *, kept, eps, centred):
    h = residual + y * kept * philox.keep_scale(0.4)
    n = F.layer_norm(h, (7,), weight, bias, eps) if centred else F.rms_norm(h, (7,), weight, eps)
    return torch.cat([h.sin(), n])


def ours(y, residual, weight, bias=None, *, seed, centred, eps=1e-5):
    h, u = ops.dropout_add_norm(y, residual, weight, bias, 0.4, seed, eps, centred)
    return torch.cat([h.sin(), u])


@norms
@backends
def test_autograd_equals_the_formula(backend, centred):
    draw = contract.source(FP64)
    leaves, dy, seed = leaves_of(draw, centred), draw(4, 3, 7), draw.seed()
    kept = philox.keep_mask(seed, (6, 7), 0.4).view(2, 3, 7)
    with ops.use(backend):
        computed = contract.gradients(lambda **own: ours(**own, seed=seed, centred=centred), leaves, dy)
    expected = contract.gradients(lambda **own: plain(**own, kept=kept, eps=1e-5, centred=centred), leaves, dy)
    contract.assert_close_by_name(computed, expected, 1e-13)


@backends
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("read", ["h", "u"])
def test_one_output_alone(backend, p, read):
    """Each of h and u may be the one that has a gradient, and parameters that h does not read get none."""
    draw = contract.source(FP64)
    leaves, seed = {name: leaf.requires_grad_() for name, leaf in leaves_of(draw, True).items()}, draw.seed()
    kept = philox.keep_mask(seed, (6, 7), p).view(2, 3, 7)
    with ops.use(backend):
        h, u = ops.dropout_add_norm(**leaves, p=p, seed=seed)
    plain_h = leaves["residual"] + leaves["y"] * kept * philox.keep_scale(p)
    plain_u = F.layer_norm(plain_h, (7,), leaves["weight"], leaves["bias"])
    y, expected = (h, plain_h) if read == "h" else (u, plain_u)
    computed, expected = (
        torch.autograd.grad(own.sin().sum(), list(leaves.values()), allow_unused=True) for own in (y, expected)
    )
    for name, one, other in zip(leaves, computed, expected, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_reference_is_differentiable():
    draw = contract.source(FP64)
    leaves, dy, seed = leaves_of(draw, True), draw(4, 3, 7), draw.seed()
    computed = contract.gradients(lambda **own: ours(**own, seed=seed, centred=True), leaves, dy)
    reference = kernel_of(OP, "reference")

    def by_reference(y, residual, weight, bias):
        h, u, *_ = reference(y, residual, weight, bias, 1e-5, 0.4, seed, True)
        return torch.cat([h.sin(), u])

    contract.assert_close_by_name(computed, contract.gradients(by_reference, leaves, dy), 1e-13)


@norms
def test_opcheck(centred):
    draw = contract.source(FP32)
    y, residual = draw(3, 4, 9, dtype=BF16).requires_grad_(), draw(3, 4, 9).requires_grad_()
    weight, bias, seed = draw(9).requires_grad_(), draw(9) if centred else None, draw.seed()
    contract.opcheck(torch.ops.petl.dropout_add_norm.default, (y, residual, weight, bias, 1e-5, 0.3, seed, centred))
    h, mean, rstd = draw(3, 4, 9), draw(3, 4) if centred else None, draw(3, 4)
    own = (draw(3, 4, 9), draw(3, 4, 9), h, mean, rstd, draw(9))
    contract.opcheck(torch.ops.petl.dropout_add_norm_backward.default, (*own, BF16, 0.3, seed, True, False))
    contract.opcheck(torch.ops.petl.dropout_add_norm_backward.default, (*own, None, 0.0, None, False, centred))


@backends
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_same_bits_in_two_runs(backend, dtype):
    contract.assert_deterministic(OP, backend, arguments_of(dtype, rows=(600,), d=65), threads=(1, 2))


@norms
@backends
def test_saves_the_sum_and_its_statistics_only(backend, centred):
    draw = contract.source(BF16)
    y, residual, weight = (draw(*size).requires_grad_() for size in ((17, 72), (17, 72), (72,)))

    def run() -> tuple:
        return ops.dropout_add_norm(y, residual, weight, None, 0.3, None, 1e-5, centred)

    with ops.use(backend):
        saved = contract.bytes_saved(run, [weight])
    assert saved == 17 * 72 * 2 + 17 * (8 if centred else 4) + 8


def test_under_autocast_the_stream_keeps_its_dtype():
    y, residual = torch.ones(3, 8, dtype=BF16, requires_grad=True), torch.ones(3, 8, requires_grad=True)
    with torch.autocast("cpu", BF16):
        h, u = ops.dropout_add_norm(y, residual, torch.ones(8), p=0.5)
    assert h.dtype == u.dtype == FP32
    assert [grad.dtype for grad in torch.autograd.grad((h + u).sum(), (y, residual))] == [BF16, FP32]


def test_without_dropout_no_seed_is_drawn():
    draw, state = contract.source(BF16), torch.get_rng_state()
    y, residual = draw(3, 8), draw(3, 8, dtype=FP32)
    h, _ = ops.dropout_add_norm(y, residual, draw(8))
    assert torch.equal(h, residual + y) and torch.equal(torch.get_rng_state(), state)


def test_recorded_seeds_are_replayed():
    given = torch.ones(9, 72), torch.zeros(9, 72), torch.ones(72)
    with philox.recording() as seeds:
        first, second = (ops.dropout_add_norm(*given, p=0.5)[1] for _ in range(2))
    with philox.replaying(seeds):
        assert torch.equal(ops.dropout_add_norm(*given, p=0.5)[1], first)
        assert torch.equal(ops.dropout_add_norm(*given, p=0.5)[1], second)
    assert not torch.equal(first, second)


@backends
def test_compiles_to_one_graph(backend):
    draw = contract.source(FP32)
    seed, weight = draw.seed(), draw(72)

    def function(y, residual):
        h, u = ops.dropout_add_norm(y, residual, weight, p=0.3, seed=seed)
        return F.relu(h) + u

    with ops.use(backend):
        contract.assert_compiles(function, draw(9, 72), draw(9, 72))


def test_second_derivatives_are_refused():
    y = torch.ones(3, 8, requires_grad=True)
    _, u = ops.dropout_add_norm(y, torch.ones(3, 8), torch.ones(8))
    with pytest.raises(InputError, match="dropout_add_norm: its gradient cannot be differentiated again"):
        torch.autograd.grad(u.sum(), y, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.tensor(1.0)}, "dropout_add_norm: y has rank 0"),
        ({"y": torch.ones(3, 8, dtype=torch.int64)}, "y has dtype torch.int64: expected a floating-point tensor"),
        (
            {"residual": torch.ones(8)},
            r"residual is torch.float32 of shape \(8,\): expected a floating-point tensor of \(3, 8\)",
        ),
        ({"residual": torch.ones(3, 8, device="meta")}, "residual is on meta: expected the device of x, cpu"),
        ({"weight": torch.ones(7)}, r"weight has shape \(7,\): expected \(8,\)"),
        ({"bias": torch.ones(8, dtype=torch.int32)}, "bias has dtype torch.int32"),
        ({"bias": torch.ones(8), "centred": False}, "bias is given with centred=False: expected None"),
        ({"p": 1.0}, r"dropout is 1.0: expected a number in \[0, 1\)"),
        ({"seed": torch.ones(1)}, r"seed is torch.float32 of shape \(1,\): expected int64"),
    ],
)
def test_refuses(change, message):
    given = {"y": torch.ones(3, 8), "residual": torch.ones(3, 8), "weight": torch.ones(8), "p": 0.1}
    with pytest.raises(InputError, match=message) as error:
        ops.dropout_add_norm(**(given | change))
    assert "\n" not in str(error.value)
