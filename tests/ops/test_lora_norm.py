from __future__ import annotations

import importlib

import pytest
import torch

from petl_kernels import ops
from petl_kernels.errors import InputError
from petl_kernels.ops.quantized import STORAGES, quantize
from petl_kernels.planning.scratch import scratch_bytes

from . import contract

op = importlib.import_module("petl_kernels.ops.lora_norm")  # the package shows the function of that name
FP64 = torch.float64


def arguments_of(dtype, n=40, k=72, rank=5, adapter_dtype=torch.float32):
    draw = contract.source(dtype)
    weight = draw(n, k, std=k**-0.5)
    return weight, draw(rank, k, dtype=adapter_dtype), draw(n, rank, dtype=adapter_dtype), 0.7


def plain(weight, a, b, scale):
    """The formula in float64, with the whole matrix."""
    return (weight.double() + scale * b.double() @ a.double()).norm(dim=1)


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("dtype", [*contract.DTYPES, FP64], ids=str)
@pytest.mark.parametrize("most", [1 << 20, 1000])
def test_values(backend, dtype, most, monkeypatch):
    """In one tile and in tiles of some rows, the last of them shorter."""
    monkeypatch.setattr(op, "TILE_BYTES", most)
    given = arguments_of(dtype, adapter_dtype=FP64 if dtype == FP64 else torch.float32)
    with ops.use(backend):
        found = ops.lora_norm(*given)
    assert found.dtype == (FP64 if dtype == FP64 else torch.float32) and not found.requires_grad
    torch.testing.assert_close(found.double(), plain(*given), rtol=1e-14 if dtype == FP64 else 3e-7, atol=0)


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("storage", STORAGES)
def test_a_quantized_weight_is_read_in_tiles(backend, storage, monkeypatch):
    monkeypatch.setattr(op, "TILE_BYTES", 3000)
    weight, a, b, scale = arguments_of(torch.bfloat16, n=41, k=71)
    weight = quantize(weight, storage)
    with ops.use(backend):
        found = ops.lora_norm(weight, a, b, scale)
    torch.testing.assert_close(found.double(), plain(weight.dequantize(FP64), a, b, scale), rtol=3e-7, atol=0)


def test_a_change_that_cancels_the_weight_leaves_no_rounding_of_larger_terms():
    weight, a, b, _ = arguments_of(FP64, rank=3, adapter_dtype=FP64)
    small = 1e-6 * weight
    weight = small - 2.0 * b @ a
    found = ops.lora_norm(weight, a, b, 2.0)
    torch.testing.assert_close(found, small.norm(dim=1), rtol=1e-7, atol=0)


def test_without_a_change_it_is_the_norm_bit_for_bit():
    weight, a, b, scale = arguments_of(torch.float32)
    assert torch.equal(ops.lora_norm(weight, a, torch.zeros_like(b), scale), torch.linalg.vector_norm(weight, dim=1))


def test_opcheck_and_one_graph():
    weight, a, b, scale = arguments_of(torch.float32)
    contract.opcheck(torch.ops.petl.lora_norm.default, ([weight], a, b, scale))
    contract.assert_compiles(lambda m: m / ops.lora_norm(weight, a, b, scale), torch.ones(40))


def test_a_plan_counts_its_tiles():
    weight, a, b = (torch.empty(*size, device="meta") for size in ((4096, 1024), (16, 1024), (4096, 16)))
    given = [weight.bfloat16()], a, b, 1.0, ""
    assert scratch_bytes(torch.ops.petl.lora_norm.default, given) == 2 << 20
    assert scratch_bytes(torch.ops.petl.lora_norm.default, given, "cuda") == 2 * 4096 * 1024 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.ones(2, 7)}, r"lora_norm: a has shape \(2, 7\): expected \(2, 8\)"),
        ({"b": torch.ones(3, 2)}, r"lora_norm: b has shape \(3, 2\): expected \(4, 2\)"),
        ({"a": torch.ones(2, 8, dtype=torch.int64)}, "a has dtype torch.int64"),
    ],
)
def test_refuses(change, message):
    given = {"weight": torch.ones(4, 8), "a": torch.ones(2, 8), "b": torch.ones(4, 2), "scale": 1.0}
    with pytest.raises(InputError, match=message):
        ops.lora_norm(**(given | change))
