"""linear_cross_entropy with a frozen weight beside its two products alone (the limit), eager PyTorch on full logits,
and chunked losses: PyTorch's own, Liger's, cut-cross-entropy. Time, and the most memory that a step takes beside its
inputs.

PyTorch's chunks and cut-cross-entropy have no label smoothing; ours is beside them without it too. Cut-cross-entropy's
gradients are exact where it filters none of them (``filter_eps=None``); its release 25.1.1 has no ``impl="cce_exact"``.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.predict import cases, counts
from bench.run.check import check
from bench.run.measure import copies, record, rotation
from bench.run.memory import peak_memory
from bench.run.peers import installed, peer, require
from bench.run.work import Case, Work, differentiated, step
from bench.shapes import distinct, shape
from petl_kernels import ops

MIB = 1 << 20
CHECKED_WORDS = {"cpu": 5000, "cuda": 256206}


def inputs(d: int, words: int, dtype: torch.dtype, device: str, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, d, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(words, d, device=device, dtype=dtype).div_(d**0.5)
    return hidden, weight, torch.randint(0, words, (tokens,), device=device)


def ours(hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float, chunk_bytes: int = 32 * MIB) -> Tensor:
    return ops.linear_cross_entropy(hidden, weight, labels, label_smoothing=smoothing, chunk_bytes=chunk_bytes)


def eager(hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), labels, label_smoothing=smoothing)


def torch_chunked(hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, labels, options=torch.nn.LinearCrossEntropyOptions())


def products(hidden: Tensor, weight: Tensor, labels: Tensor) -> Work:
    return Work(lambda: (hidden @ weight.T) @ weight)


def of_torch(device: str):
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("PyTorch has no F.linear_cross_entropy before 2.13")
    return torch_chunked


def of_liger(device: str):
    functional = installed("liger_kernel.transformers.functional", "Liger", device)
    return lambda hidden, weight, labels, smoothing: functional.liger_fused_linear_cross_entropy(
        hidden, weight, labels, label_smoothing=smoothing
    )


def of_cut_cross_entropy(device: str):
    library = installed("cut_cross_entropy", "cut-cross-entropy", device)
    return lambda hidden, weight, labels, smoothing: library.linear_cross_entropy(
        hidden, weight, labels, impl="cce", filter_eps=None
    )


LOSSES = {
    "ours": lambda device: ours,
    "ours, 300 MiB of logits": lambda device: functools.partial(ours, chunk_bytes=300 * MIB),
    "eager": lambda device: eager,
    "PyTorch": of_torch,
    "Liger": of_liger,
    "cut-cross-entropy": of_cut_cross_entropy,
}
SMOOTHINGS = {
    0.1: ["limit", "ours", "ours, 300 MiB of logits", "eager", peer("Liger")],
    0.0: ["limit", "ours", peer("PyTorch"), peer("cut-cross-entropy")],
}
CASES = [
    pytest.param(smoothing, *getattr(name, "values", (name,)), marks=getattr(name, "marks", ()))
    for smoothing, names in SMOOTHINGS.items()
    for name in names
]


@pytest.mark.parametrize(("smoothing", "implementation"), CASES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["m2m-418m", *distinct("d", "words")])
def test_linear_cross_entropy(benchmark, name, dtype, smoothing, implementation, device):
    if device == "cpu" and name != "m2m-418m":
        pytest.skip("twice the words of m2m-418m take a CPU twice the time, and show nothing else")
    if device == "cpu" and implementation.endswith("logits"):
        pytest.skip("a CPU's blocks take a few MiB, whatever they may")
    if dtype == "float32" and (device != "cpu" or not smoothing):
        pytest.skip("fp32 is for CPUs, and shows there what bf16 does")
    require(name, device, implementation)
    s, size = shape(name, device), getattr(torch, dtype).itemsize
    make = functools.partial(inputs, s.d, s.words, getattr(torch, dtype), device)
    head = counts.linear_cross_entropy(
        s.tokens, s.d, s.words, size, (300 if implementation.endswith("logits") else 32) * MIB
    )
    if implementation == "limit":
        prepare, head = products, cases.products_of_head(s.tokens, s.d, s.words, size)
    else:
        loss = functools.partial(LOSSES[implementation](device), smoothing=smoothing)
        prepare = differentiated(loss)
        few = inputs(s.d, min(s.words, CHECKED_WORDS[device]), getattr(torch, dtype), device, 64)
        check(prepare, functools.partial(eager, smoothing=smoothing), few)
    runs = [step(prepare(*each)) for each in copies(lambda: make(s.tokens), device)]
    peak = peak_memory(runs[0], device)
    # PyTorch's own takes a CPU ten times as long as the others.
    rounds = 7 if device == "cuda" else 1 if implementation == "PyTorch" else 3
    case = Case("linear_cross_entropy", name, s.tokens, dtype, device, f"smoothing {smoothing:g}", rounds)
    record(benchmark, case, implementation, rotation(runs), head, peak)
