"""Frozen linears over int8 and NF4 weights beside the dense one, and quantising and dequantising beside a copy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import record, step
from shapes import WIDTHS, shape

from petl_kernels import ops
from petl_kernels.ops.quantised import STORAGES, dequantise, storage_bytes

MATRICES = ("d x d", "ffn x d", "d x ffn")


def weight_of(name: str, matrix: str, device: str, dtype: torch.dtype) -> torch.Tensor:
    s = shape(name, device)
    n, k = {"d x d": (s.d, s.d), "ffn x d": (s.ffn, s.d), "d x ffn": (s.d, s.ffn)}[matrix]
    return torch.randn(n, k, device=device, dtype=dtype) / k**0.5


@pytest.mark.parametrize("storage", ["limit", *STORAGES])
@pytest.mark.parametrize("tokens", ["batch", "1"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("name", ["nllb-600m", "nllb-3.3b"])
def test_product(benchmark, name, matrix, dtype, tokens, storage, device):
    """Forward and dx; "limit" is the dense weight. One token is a step of generation."""
    dtype = getattr(torch, dtype)
    weight = weight_of(name, matrix, device, dtype)
    n, k = weight.shape
    rows = shape(name, device).tokens if tokens == "batch" else 1
    x = torch.randn(rows, k, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(rows, n, device=device, dtype=dtype)
    held = weight if storage == "limit" else ops.quantise(weight, storage)
    size = storage_bytes((n, k), None if storage == "limit" else storage, dtype)
    benchmark.group = f"quantised {name} {rows}x{k}x{n} {dtype} fwd+bwd"
    record(
        benchmark,
        step(lambda: F.linear(x, held), dy, (x,)),
        op="quantised_project",
        implementation=storage,
        flops=4 * rows * n * k,
        bytes_moved=2 * size + 2 * (x.nbytes + dy.nbytes),
    )


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("direction", ["quantise", "dequantise"])
@pytest.mark.parametrize("implementation", ["limit", "ours"])
@pytest.mark.parametrize("name", WIDTHS)
def test_conversion(benchmark, name, implementation, direction, storage, device):
    """bf16 to the storage or back; "limit" is a copy in bf16, which moves more bytes than either."""
    weight = weight_of(name, "ffn x d", device, torch.bfloat16)
    parts = ops.quantise(weight, storage).parts()

    def run():
        if implementation == "limit":
            weight.clone()
        elif direction == "quantise":
            ops.quantise(weight, storage)
        else:
            dequantise(parts, 0, *weight.shape, weight.dtype)
        if weight.is_cuda:
            torch.cuda.synchronize()

    benchmark.group = f"{direction} {storage} {name} {tuple(weight.shape)}"
    moved = weight.nbytes + (weight.nbytes if implementation == "limit" else sum(part.nbytes for part in parts))
    record(benchmark, run, op=direction, implementation=implementation, flops=weight.numel(), bytes_moved=moved)
