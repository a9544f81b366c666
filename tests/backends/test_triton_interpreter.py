"""The Triton kernels in Triton's interpreter, in fp32 and fp16: values and every gradient against float64."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import types

import pytest
import torch
import triton_cases
from ops.test_dropout_add_norm import one_after_the_other
from ops.test_parallel_ffn import arguments_of, assert_right

from petl_kernels import dispatch, ops, parity
from petl_kernels.backends.products import CuBLASLtProducts, PyTorchProducts
from petl_kernels.ops import philox
from petl_kernels.ops.bits import pack_bits
from petl_kernels.ops.cases import frozen_ffn

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a CUDA device runs the kernels")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def triton():
    """The backend is there: nothing may have imported Triton before the interpreter was chosen."""
    assert dispatch.load_error("triton") is None
    return importlib.import_module("petl_kernels.backends.triton")


# Each case in fp32, and the first of each op in fp16.
FIRST = {op: name for name, (op, _) in reversed(triton_cases.CASES.items())}.values()
TWICE = (
    "lora_linear-129-rows-3-groups-dropout",
    "bottleneck_adapter-129-rows-relu",
    "layer_norm-35-rows",
    "dropout_add_norm-19-rows",
    "frozen_ffn-129-rows-relu",
    "activation-relu-dropout",
)


# A second of the interpreter or more each, of what others show in part.
SLOW = (
    "frozen_ffn-quantized",
    "lora_linear-quantized",
    "gated_activation-silu-dropout",
    "dropout_add-3x11-rows",
    "attention-packed",
    "lora_linear-strided",
    "bottleneck_adapter-129-rows-gelu-offset",
    "frozen_ffn-gelu-recomputed",
    "frozen_ffn-gelu-tanh-gated-recomputed",
    "activation-gelu-tanh-dropout",
    "activation-silu-dropout",
    "gated_activation-relu-dropout",
    "attention-distance",
    "attention-packed-everything",
)


def _mark(name: str, dtype: str):
    if dtype == "fp32":
        return pytest.mark.slow if name in SLOW else ()
    return () if name in FIRST else pytest.mark.repeat


@functools.cache
def first_run(name: str) -> tuple[dict, dict]:
    """(arguments, values and gradients) of a case in fp32."""
    op, case = triton_cases.CASES[name]
    given = case(parity.Source(CPU, torch.float32))
    return given, parity.run(op, "triton", given)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [pytest.param(name, dtype, marks=_mark(name, dtype)) for name in triton_cases.CASES for dtype in DTYPES],
)
def test_values_and_gradients(name, dtype, monkeypatch):
    op, case = triton_cases.CASES[name]
    given = case(parity.Source(CPU, DTYPES[dtype]))
    if name in TWICE and dtype == "fp32":
        given, values = first_run(name)
        run = parity.run
        monkeypatch.setattr(parity.runner, "run", lambda *call: values if call[1] == "triton" else run(*call))
    assert parity.compare(op, "triton", given) is None


# The interpreter's programs run one after the other: a case shows what a kernel leaves unwritten, a card the rest.
@pytest.mark.parametrize(
    "name", [name if name == TWICE[3] else pytest.param(name, marks=pytest.mark.repeat) for name in TWICE]
)
def test_two_runs_agree_bitwise(name):
    given, first = first_run(name)
    second = parity.run(triton_cases.CASES[name][0], "triton", given)
    for value in first:
        assert torch.equal(first[value], second[value]), value


SEEDS, RATES, WIDTHS = (0, 7, 2**62 + 12345), (0.1, 0.5, 0.9), (20, 64, 19)


@pytest.mark.parametrize(
    ("seed", "p", "features"),
    [
        pytest.param(seed, p, features, marks=() if (i + j + k) % 3 == 0 else pytest.mark.repeat)  # all pairs
        for i, seed in enumerate(SEEDS)
        for j, p in enumerate(RATES)
        for k, features in enumerate(WIDTHS)
    ],
)
def test_dropout_mask_is_the_reference_stream(seed, p, features):
    """With A the identity, s is drop(x) itself; rows that 8 does not divide end within a counter."""
    x, eye, seed = torch.ones(33, features), torch.eye(features), torch.tensor([seed])
    weight, b = torch.zeros(4, features), torch.zeros(4, features)
    _, s = dispatch.kernel_of("lora_linear", "triton")(x, [weight], [None], [eye], [b], [1.0], p, seed)
    torch.testing.assert_close(s, philox.dropout(x, p, seed), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [1, 13, 64, 77])
def test_packed_bits_and_special_numbers(dtype, features):
    z = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0]).repeat(features)
    z = z.view(7, features).to(DTYPES[dtype])
    (y, bits), (exact, exact_bits) = (
        dispatch.kernel_of("activation", backend)(z, "relu", 0.0, None) for backend in ("triton", "reference")
    )
    torch.testing.assert_close(y, exact, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(bits, exact_bits)


def test_group_equals_its_members():
    given = parity.lora_linear_arguments(
        parity.Source(CPU, torch.float32), (17,), ns=(40, 33), k=45, ranks=(4, 5), dropout=0.3
    )
    forward = dispatch.kernel_of("lora_linear", "triton")
    lists = [given[name] for name in ("weights", "biases", "a", "b", "scales")]
    together, _ = forward(given["x"], *lists, given["dropout"], given["seed"])
    for g, y in enumerate(together):
        (alone,), _ = forward(given["x"], *(members[g : g + 1] for members in lists), given["dropout"], given["seed"])
        torch.testing.assert_close(y, alone)


@pytest.mark.parametrize("name", ["layer_norm-offset", "layer_norm-fp32-parameters", "rms_norm-fp32-weight"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norms_output_again_is_its_output_to_the_bit(name, dtype):
    op, case = triton_cases.CASES[name]
    values = parity.run(op, "triton", case(parity.Source(CPU, DTYPES[dtype])))
    assert torch.equal(values["y"], values["again"])


@pytest.mark.parametrize("name", ["19-rows", "too-long", "rms-fp32-stream"])
@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.repeat), "fp16"])  # which rounds in between
def test_a_sum_and_its_norm_have_the_bits_of_the_two_ops(name, dtype):
    given = triton_cases.DROPOUT_ADD_NORM[name](parity.Source(CPU, DTYPES[dtype]))
    computed, expected = parity.run("dropout_add_norm", "triton", given), one_after_the_other("triton", given)
    sums = ("dweight", "dbias")  # in another order
    for value in expected:
        assert value in sums or torch.equal(computed[value], expected[value]), value


def test_only_the_gradients_of_a_sum_and_its_norm_asked_for():
    given = parity.dropout_add_norm_arguments(parity.Source(CPU, torch.float32), (5,), d=12)
    h, weight, backward = given["y"], given["weight"], dispatch.kernel_of("dropout_add_norm_backward", "triton")
    arguments = (given["du"], None, h, h.mean(-1), h.var(-1, correction=0).rsqrt(), weight)
    dropout = torch.float32, given["p"], given["seed"]
    assert [own.numel() for own in backward(*arguments, None, 0.0, None, True, False)] == [60, 0, 12, 0]
    found = backward(*arguments, *dropout, False, True)
    assert [own.numel() for own in found] == [60, 60, 0, 12]
    torch.testing.assert_close(found[3], given["du"].sum(0))


@pytest.mark.parametrize(("rows", "f", "aligned"), [((33,), 128, True), ((33,), 64, False), ((3, 7), 43, False)])
@pytest.mark.parametrize("keeps", ["bits", "x"])
def test_cublaslt_s_products_between_the_kernels(monkeypatch, rows, f, aligned, keeps):
    """PyTorch's products take the place of cuBLASLt's: the calls are recorded, and the bits are taken from them."""
    asked = []

    def multiply(out, left, right, transposed, bias, bits, add):
        asked.append("bits" if bits is not None else "transposed" if transposed else "plain")
        product = left.float() @ (right.float().t() if transposed else right.float())
        product += out.float() if add else 0 if bias is None else bias.float()
        if bits is not None:
            bits.copy_(pack_bits(product > 0))
            product = product.relu()
        out.copy_(product)

    monkeypatch.setattr(torch.ops, "petl_cuda", types.SimpleNamespace(multiply=multiply))
    given = parity.frozen_ffn_arguments(parity.Source(CPU, torch.float16), rows, d=24, f=f, recompute=keeps == "x")
    network = importlib.import_module("petl_kernels.backends.triton.frozen_ffn")
    kernels = {
        name: functools.partial(getattr(network, name), products=CuBLASLtProducts)
        for name in ("frozen_ffn", "frozen_ffn_backward")
    }
    computed = frozen_ffn.run(kernels.__getitem__, given)
    reference, exact = (parity.run("frozen_ffn", "reference", g) for g in (given, parity.in_float64(given)))
    for name in exact:
        assert parity.compare_tensors(name, computed[name], reference[name], exact[name], 200) is None
    made = ["bits" if aligned and keeps == "bits" else None, "transposed", "plain"]
    made += ["bits" if aligned and keeps == "x" else None, "plain"]
    assert asked == ([kind for kind in made if kind] if f % 8 == 0 else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_products_that_are_added_up_in_fp32(dtype):
    left, right = torch.randn(5, 8).to(dtype), torch.randn(8, 16).to(dtype)
    expected = left.double() @ right.double()
    out = torch.ones(5, 16)
    for products in (PyTorchProducts, CuBLASLtProducts if dtype == torch.float32 else PyTorchProducts):
        assert products.multiply(left, right, out.clone()).dtype == torch.float32
        added = products.multiply(left, right, out.clone(), add=True)
        torch.testing.assert_close(added.double(), 1 + expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("f", [5, pytest.param(40, marks=pytest.mark.repeat), 75])
def test_bits_are_packed_as_the_reference_packs_them(f):
    given = parity.frozen_ffn_arguments(parity.Source(CPU, torch.float32), (65,), d=24, f=f)
    arguments = [given["x"], [given["w1"]], given["c1"], [given["w2"]], given["c2"], [], given["activation"]]
    bits = [dispatch.kernel_of("frozen_ffn", name)(*arguments, "bits")[1] for name in ("triton", "reference")]
    assert torch.equal(*bits)


def test_only_the_gradients_of_a_norm_and_a_network_asked_for():
    given = parity.layer_norm_arguments(parity.Source(CPU, torch.float32), (5,), d=12)
    x, weight = given["x"], given["weight"]
    backward = dispatch.kernel_of("layer_norm_backward", "triton")
    arguments = (given["dy"], x, x.mean(-1), x.var(-1, correction=0).rsqrt(), weight)
    assert [grad.numel() for grad in backward(*arguments, False, True, False)] == [0, 12, 0]
    assert [grad.numel() for grad in backward(*arguments, True, False, True)] == [60, 0, 12]
    torch.testing.assert_close(backward(*arguments, False, False, True)[2], given["dy"].sum(0))
    given = parity.frozen_ffn_arguments(parity.Source(CPU, torch.float32), (5,), d=12, f=16, activation="silu")
    saved = [given[name] for name in ("dy", "x")] + [torch.empty(0)] * 2
    weights = [[given["w1"]], given["c1"], [given["w2"]], []]
    backward = dispatch.kernel_of("frozen_ffn_backward", "triton")
    grads = backward(*saved, *weights, "silu", "x", False, True, False)
    assert [grad.numel() for grad in grads] == [0, 16, 0]


@pytest.mark.parametrize("m", [16, 40])
@pytest.mark.parametrize("norm", [True, False])
def test_an_adapter_s_parameters_alone(m, norm):
    """The gradients that a block needs whose input has none, and those of a parallel adapter inside its network."""
    given = parity.bottleneck_adapter_arguments(parity.Source(CPU, torch.float32), (5,), d=12, m=m, norm=norm)
    names = ("dy", "x", "ln_weight", "ln_bias", "down", "down_bias", "up")
    dy, x, *parameters = (given[name] for name in names)
    backward, options = dispatch.kernel_of("bottleneck_adapter_backward", "triton"), (1e-5, "relu", 0.7)
    every, own = (backward(dy, x, False, *parameters, *options, need, True) for need in (True, False))
    assert own[0].numel() == 0 and every[0].shape == x.shape
    assert all(map(torch.equal, own[1:], every[1:]))
    assert [grad.numel() for grad in own[1:]] == [12 * norm, 12 * norm, 12 * m, m, 12 * m, 12]


def test_padded_rows_of_logits():
    """A CUDA device gets rows that begin at multiples of 16 numbers; what lies between them counts for nothing."""
    padded, labels = torch.randn(5, 48), torch.tensor([0, 39, 7, 31, 32])
    padded[:, 40:] = torch.nan
    results = []
    for backend in ("triton", "reference"):
        logits = padded.clone()[:, :40]
        losses = dispatch.kernel_of("linear_cross_entropy", backend)(logits, labels, None, 0.8, 0.005, 1.0, None, True)
        results.append((losses, logits))
    torch.testing.assert_close(*results)


def test_only_the_gradients_asked_for():
    given = parity.frozen_linear_arguments(parity.Source(CPU, torch.float32), (5,), n=8, k=12)
    backward = dispatch.kernel_of("frozen_linear_backward", "triton")
    assert [g.numel() for g in backward(given["dy"], given["weight"], False, False)] == [0, 0]
    given = parity.lora_linear_arguments(parity.Source(CPU, torch.float32), (5,), (8, 12), 16, (2, 3))
    _, s = dispatch.kernel_of("lora_linear", "triton")(
        *(given[n] for n in ("x", "weights", "biases", "a", "b", "scales", "dropout", "seed"))
    )
    rest = [given[n] for n in ("weights", "a", "b", "scales", "dropout", "seed")]
    dx, _, _, dbias = dispatch.kernel_of("lora_linear_backward", "triton")(
        given["dys"], given["x"], s, *rest, False, [False, True]
    )
    assert dx.numel() == 0
    assert [g.numel() for g in dbias] == [0, 12]
    torch.testing.assert_close(dbias[1], given["dys"][1].sum(0))


def test_autograd_through_the_public_op():
    torch.manual_seed(0)
    x = torch.randn(3, 11, 24, requires_grad=True)
    a, b = torch.randn(4, 24, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    weight, bias = torch.randn(16, 24), torch.randn(16)
    grads = {}
    for backend in ("triton", "reference"):
        with ops.use(backend):
            y = ops.lora_linear(x, weight, bias, a, b, 2.0, dropout=0.2, seed=torch.tensor([3]))
            assert ops.backend_of("lora_linear", "cpu") == backend
        grads[backend] = [y, *torch.autograd.grad(y.square().sum(), (x, a, b))]
    for name, got, want in zip(("y", "x", "a", "b"), *grads.values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("queries", [33, pytest.param(65, marks=pytest.mark.slow)])  # in one program and in blocks
def test_gradients_of_attention_are_written_side_by_side(triton, queries):
    """In rows of q, k and v that hold more beside them, from q, k and v that lie so, too."""
    given = parity.attention_arguments(
        parity.Source(CPU, torch.float32), batch=1, heads=2, queries=queries, keys=queries, d=16, dropout=0.2
    )
    expected = parity.run("attention", "triton", given)
    beside = torch.stack([given[name].transpose(1, 2) for name in "qkv"], 2)
    q, k, v = (beside[:, :, i].transpose(1, 2) for i in range(3))
    wide = torch.full((1, queries, 3 * 32 + 7), 5.0)
    outs = [wide[..., 32 * i : 32 * i + 32].unflatten(-1, (2, 16)).transpose(1, 2) for i in range(3)]
    rest = [None] * 4 + [False, given["scale"], 0.2, given["seed"]]
    kernels = triton.attention
    o, lse = kernels.attention(q, k, v, *rest, None, None, None)
    kernels.attention_backward(given["do"], q, k, v, o, lse, *rest, False, None, None, None, False, outs=outs)
    for name, out in zip(("dq", "dk", "dv"), outs, strict=True):
        assert torch.equal(out, expected[name]), name
    assert (wide[..., 96:] == 5).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_the_kernels_do_not_take_go_to_the_reference(dtype):
    """float64, and bf16 in the interpreter, whose bf16 products are wrong."""
    given = parity.frozen_linear_arguments(parity.Source(CPU, dtype), (5,), n=8, k=12)
    values = [parity.run("frozen_linear", backend, given)["y"] for backend in ("triton", "reference")]
    assert torch.equal(*values)


def test_package_works_without_triton(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("petl_kernels.backends.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(dispatch, "_load_errors", {})
    assert "triton" in dispatch.load_error("triton")
    assert "triton" not in dispatch.available_backends()


@pytest.mark.parametrize(
    ("dtype", "activation", "recompute"),
    [
        ("fp32", "relu", False),
        ("fp16", "silu", True),
        *(pytest.param(*case, marks=pytest.mark.repeat) for case in (("fp16", "relu", False), ("fp32", "silu", True))),
    ],
)
def test_a_parallel_adapter_inside_its_network(dtype, activation, recompute):
    given = arguments_of(DTYPES[dtype], rows=(33,), activation=activation, adapter_dtype=torch.float32)
    assert_right("triton", given, activation, 4.0, recompute=recompute)
