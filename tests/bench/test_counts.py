"""bench/predict/counts against the code: PyTorch's count of products, the ops' arguments, the wrappers' launches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from bench.predict import counts
from petl_kernels import ops
from petl_kernels.ops.parallel_ffn import with_room
from petl_kernels.ops.quantized import parts_of

ROOT = Path(__file__).parents[2]

T, D, N, M, WORDS = 24, 32, 48, 16, 80
BF16 = torch.bfloat16


def new(*shape, dtype=torch.float32, grad=False):
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


# ---- operations -----------------------------------------------------------------------------------------------------


def adapter(x, down, up):
    return x + F.relu(F.layer_norm(x, x.shape[-1:]) @ down.T) @ up.T


def lora(x, weights, a, b):
    return [x @ w.T + (x @ a_g.T) @ b_g.T for w, a_g, b_g in zip(weights, a, b, strict=True)]


def ffn(x, w1, w2, gate=None):
    h = F.relu(x @ w1.T)
    return (h if gate is None else h * (x @ gate.T)) @ w2.T


def attention(q, k, v):
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


OPERATIONS = {
    "frozen_linear": (lambda x: x @ new(N, D).T, [(T, D)], counts.frozen_linear(T, N, D, 4)),
    "lora_linear": (
        lambda x, *p: lora(x, [new(N, D), new(D, D)], p[:2], p[2:]),
        [(T, D), (8, D), (4, D), (N, 8), (D, 4)],
        counts.lora_linear(T, D, [N, D], [8, 4], 4),
    ),
    "bottleneck_adapter": (adapter, [(T, D), (M, D), (D, M)], counts.bottleneck_adapter(T, D, M, 4)),
    "frozen_ffn": (lambda x: ffn(x, new(N, D), new(D, N)), [(T, D)], counts.frozen_ffn(T, D, N, "relu", False, 4)),
    "gated frozen_ffn": (
        lambda x: ffn(x, new(N, D), new(D, N), new(N, D)),
        [(T, D)],
        counts.frozen_ffn(T, D, N, "gelu_tanh", True, 4),
    ),
    "parallel_ffn": (
        lambda x, *p: ffn(x, new(N, D), new(D, N)) + ffn(x, *p),
        [(T, D), (M, D), (D, M)],
        counts.parallel_ffn(T, D, N, M, "relu", 4),
    ),
    "linear_cross_entropy": (
        lambda x: F.cross_entropy(x @ new(WORDS, D).T, torch.arange(T)),
        [(T, D)],
        counts.linear_cross_entropy(T, D, WORDS, 4),
    ),
    "attention": (attention, [(2, 4, 7, 8), (2, 4, 9, 8), (2, 4, 9, 8)], counts.attention(2, 4, 7, 9, 8, 4)),
    "quantized_project": (lambda x: x @ new(N, D).T, [(T, D)], counts.quantized_project(T, N, D, "int8", 4)),
}


@pytest.mark.parametrize("op", OPERATIONS)
def test_operations_are_those_of_the_formula(op):
    forward, shapes, expected = OPERATIONS[op]
    leaves = [new(*shape, grad=True) for shape in shapes]
    with FlopCounterMode(display=False) as counted:
        ys = forward(*leaves)
        ys = ys if isinstance(ys, list) else [ys]
        torch.autograd.grad(ys, leaves, [torch.ones_like(y) for y in ys])
    assert counted.get_total_flops() == expected.flops


def test_operations_of_an_adapter_forward():
    with FlopCounterMode(display=False) as counted:
        adapter(new(T, D), new(M, D), new(D, M))
    assert counted.get_total_flops() == counts.bottleneck_adapter(T, D, M, 4, backward=False).flops


# ---- bytes ----------------------------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Bytes of all tensors that petl's own ops read and write, each once a call; seeds are left out."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "petl":
            self.bytes += _bytes((args, kwargs)) + _bytes(result)
        return result


def _bytes(values) -> int:
    tensors = {id(leaf): leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}
    return sum(t.nbytes for t in tensors.values() if not (t.dtype == torch.int64 and t.shape == (1,)))


def traffic(forward, *leaves) -> int:
    with Traffic() as counted:
        y = forward()
        ys = y if isinstance(y, list) else [y]
        torch.autograd.grad(ys, leaves, [torch.ones_like(y) for y in ys])
    return counted.bytes


def linear_bytes():
    x, w = new(T, D, dtype=BF16, grad=True), new(N, D, dtype=BF16)
    bias = new(N, dtype=BF16)
    yield traffic(lambda: ops.frozen_linear(x, w, bias), x), counts.frozen_linear(T, N, D, 2)
    bias = bias.requires_grad_()
    yield traffic(lambda: ops.frozen_linear(x, w, bias), x, bias), counts.frozen_linear(T, N, D, 2, dbias=True)


def lora_bytes():
    x, ws, cs = new(T, D, dtype=BF16, grad=True), [new(N, D, dtype=BF16), new(D, D, dtype=BF16)], (N, D)
    a, b = [new(r, D, grad=True) for r in (8, 4)], [new(n, r, grad=True) for n, r in ((N, 8), (D, 4))]
    biases = [new(n, dtype=BF16) for n in cs]
    run = traffic(lambda: ops.lora_linear_grouped(x, ws, biases, a, b, [1.0, 1.0]), x, *a, *b)
    yield run, counts.lora_linear(T, D, [N, D], [8, 4], 2)


def adapter_bytes():
    x = new(T, D, dtype=BF16, grad=True)
    parameters = [new(*shape, grad=True) for shape in ((M, D), (M,), (D, M), (D,), (D,), (D,))]
    run = traffic(lambda: ops.bottleneck_adapter(x, *parameters), x, *parameters)
    yield run, counts.bottleneck_adapter(T, D, M, 2)


def ffn_bytes():
    x = new(T, D, dtype=BF16, grad=True)
    w1, gate, w2 = (new(*shape, dtype=BF16) for shape in ((N, D), (N, D), (D, N)))
    c1, c2 = new(N, dtype=BF16), new(D, dtype=BF16)
    yield traffic(lambda: ops.frozen_ffn(x, w1, c1, w2, c2), x), counts.frozen_ffn(T, D, N, "relu", False, 2)
    for kind in ("gelu", "relu"):
        run = traffic(lambda kind=kind: ops.frozen_ffn(x, w1, c1, w2, c2, None, kind, True), x)
        yield run, counts.frozen_ffn(T, D, N, kind, False, 2, recompute=True)
    run = traffic(lambda: ops.frozen_ffn(x, w1, None, w2, None, gate, "gelu_tanh"), x)
    yield run, counts.frozen_ffn(T, D, N, "gelu_tanh", True, 2)


def parallel_ffn_bytes():
    x, c2 = new(T, D, dtype=BF16, grad=True), new(D, dtype=BF16)
    network = (new(*shape, dtype=BF16) for shape in ((N, D), (N,), (D, N)))
    trained = [new(*shape, grad=True) for shape in ((M, D), (M,), (D, M), (D,))]
    w1, c1, w2 = with_room(*network, M)
    run = traffic(lambda: ops.parallel_ffn(x, w1, c1, w2, c2, *trained), x, *trained)
    yield run, counts.parallel_ffn(T, D, N, M, "relu", 2)


def loss_bytes():
    hidden, w, labels = new(T, D, dtype=BF16, grad=True), new(WORDS, D, dtype=BF16), torch.arange(T)
    run = traffic(lambda: ops.linear_cross_entropy(hidden, w, labels), hidden)
    scalars = 3 * 4  # the rows that count, dloss and the factor made of it
    yield run, counts.linear_cross_entropy(T, D, WORDS, 2).bytes + scalars - 4


def elementwise_bytes():
    z, g = (new(T, N, dtype=BF16, grad=True) for _ in range(2))
    for kind in ("relu", "gelu", "silu"):
        yield traffic(lambda kind=kind: ops.activation(z, kind, 0.1), z), counts.activation(T, N, kind, 2)
    yield traffic(lambda: ops.gated_activation(z, g, "silu"), z, g), counts.gated_activation(T, N, 2)
    yield traffic(lambda: ops.dropout_add(z, g, 0.1), z, g), counts.dropout_add(T, N, 2)


def norm_bytes():
    x = new(T, D, dtype=BF16, grad=True)
    for trained in (False, True):
        w, v = (new(D, dtype=BF16, grad=trained) for _ in range(2))
        own = [w, v] if trained else []
        yield traffic(lambda w=w, v=v: ops.layer_norm(x, w, v), x, *own), counts.layer_norm(T, D, 2, trained)
        yield traffic(lambda w=w: ops.rms_norm(x, w), x, *own[:1]), counts.rms_norm(T, D, 2, trained)
        y = new(T, D, dtype=BF16, grad=True)
        run = traffic(lambda w=w, v=v, y=y: list(ops.dropout_add_norm(y, x, w, v, 0.1)), y, x, *own)
        yield run, counts.dropout_add_norm(T, D, 2, trained)
        run = traffic(lambda w=w, y=y: list(ops.dropout_add_norm(y, x, w, p=0.1, centred=False)), y, x, *own[:1])
        yield run, counts.dropout_add_norm(T, D, 2, trained, centred=False)


def attention_bytes():
    q, k, v = (new(2, 4, length, 8, dtype=BF16, grad=True) for length in (7, 9, 9))
    yield traffic(lambda: ops.attention(q, k, v), q, k, v), counts.attention(2, 4, 7, 9, 8, 2)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    yield traffic(lambda: ops.attention(q, k, v, mask), q, k, v), counts.attention(2, 4, 7, 9, 8, 2, mask=18)
    q, k, v = (new(1, 4, length, 8, dtype=BF16, grad=True) for length in (7, 9, 9))
    cu = [torch.tensor(numbers, dtype=torch.int32) for numbers in ([0, 3, 7], [0, 4, 9])]
    run = traffic(lambda: ops.attention(q, k, v, cu_seqlens_q=cu[0], cu_seqlens_k=cu[1]), q, k, v)
    yield run, counts.attention(1, 4, 7, 9, 8, 2, mask=2 * 3 * 4, pairs=3 * 4 + 4 * 5)


def quantized_bytes():
    for storage in ("int8", "nf4"):
        x, w = new(T, 64, dtype=BF16, grad=True), ops.quantize(new(N, 64, dtype=BF16), storage)
        run = traffic(lambda x=x, w=w: ops.frozen_linear(x, w), x)
        yield run, counts.quantized_project(T, N, 64, storage, 2)
        parts = sum(part.nbytes for part in parts_of(w))
        for conversion in (counts.quantize, counts.dequantize):
            yield 2 * N * 64 + parts, conversion(N, 64, storage, 2)


BYTES = (linear_bytes, lora_bytes, adapter_bytes, ffn_bytes, parallel_ffn_bytes, loss_bytes, elementwise_bytes)


@pytest.mark.parametrize(
    "cases", [*BYTES, norm_bytes, attention_bytes, quantized_bytes], ids=lambda cases: cases.__name__
)
def test_bytes_are_the_ops_inputs_and_outputs(cases):
    for moved, expected in cases():
        assert moved == (expected if isinstance(expected, int) else expected.bytes)


# ---- launches -------------------------------------------------------------------------------------------------------

# Calls of tests/backends/triton_aot.py at sizes where the tables' tiles are full, and the counts of the same.
LAUNCHES = {
    "frozen(BF16, 8192)": counts.frozen_linear(8192, 1024, 1024, 2, dbias=True),
    "lora(BF16, 1, 16, 0.0)": counts.lora_linear(8192, 1024, [1024], [16], 2),
    "border(BF16, (16, 0, 16))": counts.lora_border(8192, 1024, [1024] * 3, [16, 0, 16], 2),
    "border(BF16, (0, 0))": counts.lora_border(8192, 1024, [1024] * 2, [0, 0], 2),
    "lora(BF16, 3, 64, 0.0)": counts.lora_linear(8192, 1024, [1024] * 3, [64] * 3, 2),
    "lora(BF16, 3, 64, 0.1)": counts.lora_linear(8192, 1024, [1024] * 3, [64] * 3, 2, dropout=True),
    **{f"adapter(BF16, {m})": counts.bottleneck_adapter(8192, 1024, m, 2) for m in (64, 128, 192, 256, 512, 1024)},
    "norms(BF16, 1024, BF16)": counts.layer_norm(8192, 1024, 2, True) + counts.rms_norm(8192, 1024, 2, True),
    "ffn(BF16, 'relu', False, 'bits', 8192)": counts.frozen_ffn(8192, 1024, 4096, "relu", False, 2),
    "ffn(BF16, 'gelu_tanh', True, 'z', 5000)": counts.frozen_ffn(5000, 1024, 4096, "gelu_tanh", True, 2),
    "ffn(BF16, 'gelu', False, 'x', 700)": counts.frozen_ffn(700, 1024, 4096, "gelu", False, 2, recompute=True),
    **{f"parallel(BF16, {m})": counts.parallel_ffn(8192, 1024, 4096, m, "relu", 2) for m in (64, 417)},
    **{
        f"whole_loss(BF16, {chunk_bytes})": counts.linear_cross_entropy(8192, 1024, 256206, 2, chunk_bytes)
        for chunk_bytes in (32 << 20, 300 << 20)
    },
    "activate(BF16, 'relu', 0.1)": counts.activation(8192, 4096, "relu", 2) + counts.gated_activation(8192, 4096, 2),
    "residual(BF16, BF16)": counts.dropout_add(8192, 1024, 2),
    "residual_norm(BF16, BF16, 1024, False)": counts.dropout_add_norm(8192, 1024, 2),
    "residual_norm(BF16, BF16, 1024, True)": counts.dropout_add_norm(8192, 1024, 2, True),
    "attend(BF16, 64, ('padding',))": counts.attention(16, 16, 512, 512, 64, 2),
    "attend(BF16, 64, ('packed',))": counts.attention(1, 16, 8192, 8192, 64, 2, sentences=128),
    "attend(BF16, 128, ('packed',))": counts.attention(1, 16, 8192, 8192, 128, 2, sentences=128),
    "attend(BF16, 128, ('dropout',), 128)": counts.attention(16, 16, 128, 128, 128, 2, dropout=True),
    "attend(BF16, 64, ('dropout',), 129)": counts.attention(16, 16, 129, 129, 64, 2, dropout=True),
    "attend(FP32, 64, ('dropout',), 128)": counts.attention(16, 16, 128, 128, 64, 4, dropout=True),
    **{
        f"quantized_weight(BF16, '{storage}')": counts.quantize(4096, 1024, storage, 2)
        + counts.dequantize(4096, 1024, storage, 2)
        for storage in ("int8", "nf4")
    },
    **{
        f"quantized_products(BF16, '{storage}', {t}, {n}, {k})": counts.quantized_project(t, n, k, storage, 2)
        for storage in ("int8", "nf4")
        for t, n, k in (
            (1, 1024, 1024),
            (16, 1024, 1024),
            (200, 4096, 1024),
            (512, 1024, 4096),
            (8192, 8192, 2048),
            (8192, 16384, 2048),
        )
    },
}
# What triton_aot asks for beside the counted work: outputs made again, and gradients of a feed-forward block's biases.
BESIDE = {"norms": {"_norm_again_kernel"}, "ffn": {"_sum_kernel", "_column_sums_kernel"}}


@pytest.fixture(scope="module")
def recorded() -> dict[str, list[str]]:
    """Kernels that each call launches on meta tensors; in a process of its own, where no interpreter is chosen."""
    pytest.importorskip("triton")
    script = (
        "import json, torch\nimport triton_aot as aot\nBF16, FP32 = torch.bfloat16, torch.float32\n"
        "print(json.dumps({call: [launch[0].__name__ for launch in aot.record('sm90', "
        f"lambda: eval('aot.' + call))] for call in {[*LAUNCHES]!r}}}))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "tests/backends"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow  # the process of the fixture
@pytest.mark.parametrize("call", LAUNCHES)
def test_launches_are_the_wrappers(recorded, call):
    beside = BESIDE.get(call.partition("(")[0], ())
    found = sorted(name for name in recorded[call] if name not in beside)
    assert found == sorted(kernel.name for kernel in LAUNCHES[call].kernels if not kernel.library)
    assert LAUNCHES[call].launches == len(found)


@pytest.mark.parametrize("words", [256206, 32128, 40])
@pytest.mark.parametrize("chunk_bytes", [2 << 20, 32 << 20, 300 << 20])
def test_blocks_of_the_loss_have_every_product(words, chunk_bytes):
    """Each row meets each word once in either direction, however the op cuts them."""
    for t, d, size in ((8192, 1024, 2), (700, 2048, 4)):
        kernels = counts.linear_cross_entropy(t, d, words, size, chunk_bytes).kernels
        assert sum(kernel.flops for kernel in kernels) == 4 * t * d * words
