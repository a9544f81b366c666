"""int8 and NF4 weights made by Triton, to the bit: on a CUDA device, else in the interpreter.

The reference runs on the CPU: on a CUDA device PyTorch multiplies by the inverse of 127 instead of dividing by it.
"""

from __future__ import annotations

import pytest
import torch

from petl_kernels import dispatch
from petl_kernels.ops.quantized import NF4_THRESHOLDS, reference_quantize_int8, reference_quantize_nf4

pytestmark = pytest.mark.skipif(dispatch.load_error("triton") is not None, reason="Triton cannot run here")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REFERENCE = {"int8": reference_quantize_int8, "nf4": reference_quantize_nf4}
STORAGES = pytest.mark.parametrize("storage", REFERENCE)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
# Rows of several blocks and of a part of one, several scales of absmaxes, parts of a block, a single value.
SHAPES = [(6, 72), (3, 130), (2, 8200), (1, 64), (5, 1), (2, 1)]
if DEVICE.type == "cuda":
    DTYPES["bf16"] = torch.bfloat16
    SHAPES += [(1024, 1024), (129, 75), (3, 65536)]


def weight_of(n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 3, n)[:, None]
    weight[n // 2, : k // 2] = 0
    weight[n // 3] = 0
    return weight.to(dtype)


def made(storage: str, weight: torch.Tensor) -> list[torch.Tensor]:
    return [part.cpu() for part in dispatch.kernel_of(f"quantize_{storage}", "triton")(weight.to(DEVICE))]


def assert_same(storage: str, weight: torch.Tensor) -> None:
    for part, value in zip(made(storage, weight), REFERENCE[storage](weight), strict=True):
        assert part.dtype == value.dtype and torch.equal(part, value)


@pytest.mark.parametrize("dtype", DTYPES)
@STORAGES
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_bits_are_the_reference_s(shape, storage, dtype):
    assert_same(storage, weight_of(*shape, DTYPES[dtype]))


def test_ties_and_their_neighbours():
    """NF4 values at a threshold and just beside it, and halves of an int8 step; the largest value of a block is 1."""
    at = torch.tensor(NF4_THRESHOLDS)
    beside = [torch.nextafter(at, torch.full_like(at, end)) for end in (-2.0, 2.0)]
    assert_same("nf4", torch.cat([at, *beside, torch.ones(19)])[None])
    assert_same("int8", torch.arange(-127, 127.5, 0.5)[None])


@STORAGES
def test_strided_weights(storage):
    assert_same(storage, weight_of(70, 12, torch.float32).t())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@STORAGES
def test_numbers_that_are_not_finite_stay_visible(storage, value):
    """In the part that ``ops.quantize`` looks at."""
    weight = weight_of(4, 96, torch.float32)
    weight[2, 3] = value
    assert not made(storage, weight)[-1].isfinite().all()
