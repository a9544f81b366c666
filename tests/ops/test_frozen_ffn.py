from __future__ import annotations

import importlib

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from petl_kernels import ops, parity
from petl_kernels.dispatch import kernel_of
from petl_kernels.errors import InputError
from petl_kernels.ops.bits import unpack_bits
from petl_kernels.ops.product import product_bytes
from petl_kernels.planning.scratch import scratch_bytes

from . import contract

op = importlib.import_module("petl_kernels.ops.frozen_ffn")  # the package shows the function of that name
FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16
ACTIVATIONS = tuple(op.ACTIVATIONS)
FORMS = [(activation, gated) for activation in ACTIVATIONS for gated in (False, True)]
backends = pytest.mark.parametrize("backend", contract.BACKENDS)
held = pytest.mark.parametrize("backend", contract.HELD)
forms = pytest.mark.parametrize(("activation", "gated"), FORMS)
recomputes = pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])


def arguments_of(dtype, seed=0, **options) -> dict:
    return parity.frozen_ffn_arguments(contract.source(dtype, seed), **options)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of at most 50 rows in the reference (the other backends have their own constants)."""
    monkeypatch.setattr(op, "CHUNK_ROWS", 50)
    monkeypatch.setattr(op, "CHUNK_BYTES", 1)


@held
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(1,), (3,), (17,), (129,), (2, 3, 5)], ids=str)
@forms
@recomputes
def test_values_and_gradients(backend, dtype, rows, activation, gated, recompute):
    arguments = arguments_of(dtype, rows=rows, d=24, f=43, gated=gated, activation=activation, recompute=recompute)
    contract.assert_parity("frozen_ffn", backend, arguments)


@held
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_relu_keeps_the_sign_of_the_sum(backend, dtype, recompute):
    """x W1ᵀ + c1 is rounded once: rounded before c1 is added, many a sum near 0 would change its sign."""
    arguments = arguments_of(dtype, rows=(64,), d=128, f=1024, activation="relu", recompute=recompute)
    contract.assert_parity("frozen_ffn", backend, arguments)


@held
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize(("d", "f"), [(1, 1), (7, 64), (40, 3), (131, 129)])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_odd_widths_and_no_biases(backend, dtype, d, f, activation):
    arguments = arguments_of(dtype, rows=(33,), d=d, f=f, bias=False, activation=activation)
    contract.assert_parity("frozen_ffn", backend, arguments)


@held
@pytest.mark.parametrize(("activation", "gated"), [("relu", False), ("gelu", True)])
@recomputes
def test_several_chunks(backend, activation, gated, recompute):
    arguments = arguments_of(FP32, rows=(1100,), d=8, f=8200, gated=gated, activation=activation, recompute=recompute)
    assert len(list(op.chunks_of(arguments["x"], 8200))) == 5
    contract.assert_parity("frozen_ffn", backend, arguments)


def test_chunks_are_even_and_no_smaller_than_they_need_be(small_chunks):
    x = torch.empty(129, 1)
    assert [(part.start, part.stop) for part in op.chunks_of(x, 8)] == [(0, 43), (43, 86), (86, 129)]
    assert list(op.chunks_of(x[:0], 8)) == []
    contract.assert_parity("frozen_ffn", "reference", arguments_of(FP32, rows=(129,)))


def test_a_chunk_takes_eight_megabytes():
    assert op.chunk_rows(1 << 20, 4096, 2) == 1024
    assert op.chunk_rows(1 << 20, 65536, 4) == 256


def test_on_cuda_the_hidden_values_of_a_step_are_whole_and_a_plan_counts_them():
    """64 MiB: 8,192 rows of 4096 in 16 bits; of twice as many, two chunks."""
    assert op.chunk_rows(8192, 4096, 2, "cuda") == op.chunk_rows(16384, 4096, 2, "cuda") == 8192
    x, w1, w2 = (torch.empty(*shape, dtype=BF16, device="meta") for shape in ((16384, 8), (4096, 8), (8, 4096)))
    call = torch.ops.petl.frozen_ffn.default, (x, [w1], None, [w2], None, [], "relu", "bits", "")
    blocks = product_bytes(8192, 8, 4096, BF16), product_bytes(1024, 8, 4096, BF16)
    assert scratch_bytes(*call, "cuda") == (64 << 20) + max(blocks[0], product_bytes(8192, 4096, 8, BF16))
    assert scratch_bytes(*call) == (8 << 20) + max(blocks[1], product_bytes(1024, 4096, 8, BF16))


@held
@forms
def test_non_contiguous_and_expanded(backend, activation, gated):
    draw = contract.source(FP32)
    arguments = arguments_of(FP32, rows=(6, 5), gated=gated, activation=activation)
    arguments["x"] = draw(5, 6, 80)[..., ::2].transpose(0, 1)
    arguments["w1"], arguments["w2"] = draw(40, 72).T, draw(72, 40).T
    arguments["c1"] = draw(144)[::2]
    arguments["dy"] = draw(40).expand(6, 5, 40)
    contract.assert_parity("frozen_ffn", backend, arguments)


@backends
@forms
@recomputes
def test_zero_rows(backend, activation, gated, recompute):
    arguments = arguments_of(FP32, rows=(2, 0), gated=gated, activation=activation, recompute=recompute)
    values = parity.run("frozen_ffn", backend, arguments)
    assert values["y"].shape == values["dx"].shape == (2, 0, 40)
    assert torch.equal(values["dc1"], torch.zeros(72)) and torch.equal(values["dc2"], torch.zeros(40))


@backends
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("f", [1, 8, 43, 131])
def test_the_bits_are_those_of_positive_z(backend, dtype, f):
    given = arguments_of(dtype, rows=(33,), f=f)
    weights = [[given["w1"]], given["c1"], [given["w2"]], given["c2"], []]
    _, bits, _ = kernel_of("frozen_ffn", backend)(given["x"], *weights, "relu", "bits")
    assert bits.dtype == torch.uint8 and bits.shape == (33, (f + 7) // 8)
    z = F.linear(given["x"].double(), given["w1"].double(), given["c1"].double())
    certain = z.abs() > 1e-2
    assert torch.equal(unpack_bits(bits, f)[certain], (z > 0)[certain])
    assert not (unpack_bits(bits, 8 * bits.shape[1])[:, f:]).any()  # the padding


NAMES = ("x", "c1", "c2")


def parts_of(weight) -> list:
    return [] if weight is None else [weight]


def split(given: dict) -> tuple[dict, dict]:
    """(leaves, frozen weights) of the public function's arguments."""
    leaves = {name: given[name] for name in NAMES if given[name] is not None}
    fixed = {name: given[name] for name in ("w1", "w2", "gate")} | dict.fromkeys(set(NAMES) - set(leaves))
    return leaves, fixed


def plain(x, w1, c1, w2, c2, gate, activation):
    h = op.ACTIVATIONS[activation](F.linear(x, w1, c1))
    return F.linear(h if gate is None else h * F.linear(x, gate), w2, c2)


@backends
@forms
@recomputes
def test_autograd_equals_the_formula(backend, activation, gated, recompute):
    given = arguments_of(FP64, rows=(2, 3), d=7, f=11, gated=gated, activation=activation)
    leaves, fixed = split(given)
    with ops.use(backend):
        computed = contract.gradients(
            lambda **leaves: ops.frozen_ffn(**leaves, **fixed, activation=activation, recompute=recompute),
            leaves,
            given["dy"],
        )
    expected = contract.gradients(lambda **leaves: plain(**leaves, **fixed, activation=activation), leaves, given["dy"])
    contract.assert_close_by_name(computed, expected, 1e-13)


@backends
@forms
def test_gradcheck(backend, activation, gated):
    leaves, fixed = split(arguments_of(FP64, rows=(2, 3), d=4, f=5, gated=gated, activation=activation))

    def function(x, c1, c2):
        return ops.frozen_ffn(x=x, c1=c1, c2=c2, **fixed, activation=activation)

    with ops.use(backend):
        assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in leaves.values()])


@pytest.mark.parametrize(
    ("activation", "gated", "keeps"),
    [
        *(("relu", False, "bits"), ("gelu_tanh", True, "x")),
        *(pytest.param(*case, marks=pytest.mark.repeat) for case in (("gelu", False, "z"), ("silu", True, "z"))),
    ],
)
def test_opcheck(activation, gated, keeps):
    draw = contract.source(FP32)
    given = parity.frozen_ffn_arguments(draw, (2, 3), d=7, f=11, gated=gated)
    x, c1, c2 = (given[name] for name in ("x", "c1", "c2"))
    w1, w2, gate = (parts_of(given[name]) for name in ("w1", "w2", "gate"))
    _, *kept = torch.ops.petl.frozen_ffn(x, w1, c1, w2, c2, gate, activation, keeps, "reference")
    saved = (draw(2, 3, 7), x if keeps == "x" else None, *kept, w1, c1, w2, gate, activation, keeps)
    contract.opcheck(torch.ops.petl.frozen_ffn_backward.default, (*saved, True, True, True))
    contract.opcheck(torch.ops.petl.frozen_ffn_backward.default, (*saved, False, True, False))
    x, c1, c2 = (leaf.detach().requires_grad_() for leaf in (x, c1, c2))
    contract.opcheck(torch.ops.petl.frozen_ffn.default, (x, w1, c1, w2, c2, gate, activation, keeps))


@backends
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@forms
def test_same_bits_in_two_runs_and_for_any_number_of_threads(backend, dtype, activation, gated):
    arguments = arguments_of(dtype, rows=(300,), d=32, f=64, gated=gated, activation=activation)
    contract.assert_deterministic("frozen_ffn", backend, arguments)
    if backend == "cpu":
        contract.assert_deterministic("frozen_ffn", backend, arguments, threads=(1, 2))


@backends
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@forms
def test_saved_bytes(backend, dtype, activation, gated):
    f, d = 131, 40
    given = arguments_of(dtype, rows=(17,), d=d, f=f, gated=gated, activation=activation)
    leaves, fixed = split(given)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    parameters = [leaves["c1"], leaves["c2"], *(weight for weight in fixed.values() if weight is not None)]

    def saved(recompute, exclude=()):
        with ops.use(backend):
            return contract.bytes_saved(
                lambda: ops.frozen_ffn(**leaves, **fixed, activation=activation, recompute=recompute),
                [*parameters, *exclude],
            )

    kept = (f + 7) // 8 if activation == "relu" and not gated else f * dtype.itemsize * (2 if gated else 1)
    assert saved(recompute=False) == 17 * kept
    assert saved(recompute=True) == 17 * d * dtype.itemsize
    assert saved(recompute=True, exclude=[leaves["x"]]) == 0


@pytest.mark.parametrize("recompute", [False, True])
def test_keeps_nothing_that_no_gradient_needs(recompute):
    leaves, fixed = split(arguments_of(FP32))

    def saved():
        exclude = [leaves["c1"], leaves["c2"], fixed["w1"], fixed["w2"]]
        return contract.bytes_saved(
            lambda: ops.frozen_ffn(**leaves, **fixed, activation="gelu", recompute=recompute), exclude
        )

    assert saved() == 0 and not ops.frozen_ffn(**leaves, **fixed).requires_grad
    leaves["c2"].requires_grad_()
    assert saved() == 0
    (dc2,) = torch.autograd.grad(ops.frozen_ffn(**leaves, **fixed, activation="gelu").sum(), leaves["c2"])
    torch.testing.assert_close(dc2, torch.full((40,), 17.0))
    leaves["c1"].requires_grad_()
    assert saved() == 17 * (40 if recompute else 72) * 4


@pytest.mark.parametrize("wanted", NAMES)
@backends
def test_only_the_gradients_that_are_needed(backend, wanted):
    leaves, fixed = split(arguments_of(FP32, activation="silu"))
    leaves[wanted].requires_grad_()
    with ops.use(backend):
        (grad,) = torch.autograd.grad(
            ops.frozen_ffn(**leaves, **fixed, activation="silu").square().sum(), leaves[wanted]
        )
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        y = ops.frozen_ffn(**leaves, **fixed, activation="silu")
        everything = torch.autograd.grad(y.square().sum(), list(leaves.values()))
    assert torch.equal(grad, dict(zip(leaves, everything, strict=True))[wanted])


@forms
@recomputes
def test_matrix_work(activation, gated, recompute):
    """No product beyond eager's forward and dgrad, unless recomputing."""
    rows, d, f = 33, 24, 43
    given = arguments_of(FP32, rows=(rows,), d=d, f=f, gated=gated, activation=activation, recompute=recompute)
    with FlopCounterMode(display=False) as counter:
        parity.run("frozen_ffn", "reference", given)
    product = 2 * rows * d * f
    up = 2 if gated else 1
    assert counter.get_total_flops() == product * (2 * (up + 1) + (up if recompute else 0))


@pytest.mark.skipif("cpu" not in contract.BACKENDS, reason="the extension is not built")
@forms
@recomputes
def test_matrix_work_of_the_extension(activation, gated, recompute):
    rows, d, f = 33, 24, 43
    given = arguments_of(FP32, rows=(rows,), d=d, f=f, gated=gated, activation=activation, recompute=recompute)
    parity.run("frozen_ffn", "cpu", given)
    with torch.profiler.profile(with_flops=True, record_shapes=True) as profile:
        parity.run("frozen_ffn", "cpu", given)
    flops = sum(event.flops or 0 for event in profile.events() if event.name in ("aten::mm", "aten::addmm"))
    up = 2 if gated else 1
    assert flops == 2 * rows * d * f * (2 * (up + 1) + (up if recompute else 0))


class LargestTensor(TorchDispatchMode):
    """The most elements that a tensor of this block has, tensors of uint8 left out."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype != torch.uint8:
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize(("activation", "gated", "recompute"), [("relu", False, False), ("silu", True, True)])
def test_no_hidden_tensor_of_all_tokens(small_chunks, activation, gated, recompute):
    given = arguments_of(FP32, rows=(1000,), d=8, f=640, gated=gated, activation=activation, recompute=recompute)
    with LargestTensor() as largest:
        parity.run("frozen_ffn", "reference", given)
    assert largest.elements <= 50 * 640


@pytest.mark.skipif("cpu" not in contract.BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize(("activation", "gated", "recompute"), [("relu", False, False), ("silu", True, True)])
def test_no_hidden_tensor_of_all_tokens_in_the_extension(activation, gated, recompute):
    given = arguments_of(FP32, rows=(2048,), d=8, f=8200, gated=gated, activation=activation, recompute=recompute)
    _C = pytest.importorskip("petl_kernels._C", reason="the extension was not built")
    _C.install_cpu_allocator()
    before = _C.cpu_bytes()
    _C.reset_cpu_peak()
    parity.run("frozen_ffn", "cpu", given)
    taken, chunk = _C.cpu_peak() - before, 256 * 8200 * 4
    # z and g of a chunk, and what they become; of all tokens each would take eight chunks (kept z and g do)
    kept = 0 if recompute or (activation == "relu" and not gated) else 8 * chunk * (1 + gated)
    assert chunk <= taken - kept < 5 * chunk, (taken / chunk, kept / chunk)


@pytest.mark.parametrize("recompute", [False, True])
def test_autocast_follows_linear(recompute):
    leaves, fixed = split(arguments_of(FP32, rows=(17,), activation="gelu"))
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    weights = [leaves["c1"], leaves["c2"], fixed["w1"], fixed["w2"]]
    with torch.autocast("cpu", BF16):
        y = ops.frozen_ffn(**leaves, **fixed, activation="gelu", recompute=recompute)
        saved = contract.bytes_saved(
            lambda: ops.frozen_ffn(**leaves, **fixed, activation="gelu", recompute=recompute), weights
        )
        theirs = plain(**leaves, **fixed, activation="gelu")
    assert y.dtype == theirs.dtype == BF16 and saved == 17 * 2 * (40 if recompute else 72)
    torch.testing.assert_close(y, theirs, rtol=0.05, atol=0.05)
    grads = torch.autograd.grad(y.float().sum(), list(leaves.values()))
    assert {grad.dtype for grad in grads} == {FP32}


def test_biases_may_be_wider_than_the_weights():
    given = arguments_of(BF16, rows=(300,))
    leaves, fixed = split(given)
    leaves |= {name: leaves[name].float().requires_grad_() for name in ("c1", "c2")}
    ops.frozen_ffn(**leaves, **fixed).backward(given["dy"])
    assert leaves["c1"].grad.dtype == FP32
    torch.testing.assert_close(leaves["c2"].grad, given["dy"].double().sum(0).float(), rtol=1e-6, atol=1e-6)


@backends
@pytest.mark.parametrize(("activation", "gated"), [("relu", False), ("gelu", True)])
@recomputes
def test_compiles_to_one_graph(backend, activation, gated, recompute):
    leaves, fixed = split(arguments_of(FP32, gated=gated, activation=activation))

    def function(x, c1, c2):
        return ops.frozen_ffn(x=x, c1=c1, c2=c2, **fixed, activation=activation, recompute=recompute).relu()

    with ops.use(backend):
        contract.assert_compiles(function, *leaves.values(), tolerance=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.tensor(1.0)}, "x has rank 0"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, "x has dtype torch.int64"),
        ({"x": torch.ones(3, 7)}, r"w1 has shape \(6, 8\): expected \(out, 7\) for x of shape \(3, 7\)"),
        ({"w1": torch.ones(8)}, r"w1 has shape \(8,\)"),
        ({"w2": torch.ones(6, 8)}, r"w2 has shape \(6, 8\): expected \(8, 6\)"),
        ({"gate": torch.ones(8, 6)}, r"gate has shape \(8, 6\): expected \(6, 8\)"),
        ({"w1": torch.ones(6, 8).half()}, "w1 has dtype torch.float16: expected that of x, torch.float32"),
        ({"w2": torch.ones(8, 6).half()}, "w2 has dtype torch.float16: expected that of x, torch.float32"),
        ({"gate": torch.ones(6, 8).half()}, "gate has dtype torch.float16"),
        ({"w1": torch.ones(6, 8, requires_grad=True)}, "w1 requires grad: expected a frozen weight"),
        ({"w2": torch.ones(8, 6, requires_grad=True)}, "w2 requires grad: expected a frozen weight"),
        ({"gate": torch.ones(6, 8, requires_grad=True)}, "gate requires grad: expected a frozen weight"),
        ({"w2": torch.ones(8, 6, device="meta")}, "w2 is on meta: expected the device of x, cpu"),
        ({"c1": torch.ones(8)}, r"c1 has shape \(8,\): expected \(6,\)"),
        ({"c2": torch.ones(6)}, r"c2 has shape \(6,\): expected \(8,\)"),
        ({"c2": torch.ones(8, dtype=torch.int32)}, "c2 has dtype torch.int32"),
        ({"activation": "tanh"}, "activation is 'tanh': expected one of relu, gelu, silu, gelu_tanh"),
    ],
)
def test_refuses(change, message):
    arguments = {"x": torch.ones(3, 8), "w1": torch.ones(6, 8), "c1": None, "w2": torch.ones(8, 6), "c2": None}
    with pytest.raises(InputError, match=f"frozen_ffn: {message}") as error:
        ops.frozen_ffn(**(arguments | change))
    assert "\n" not in str(error.value)
