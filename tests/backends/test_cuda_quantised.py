"""The CUDA C++ kernels that make and read int8 and NF4 weights, to the bit.

The reference runs on the CPU: on a CUDA device PyTorch multiplies by the inverse of 127 instead of dividing by it.
"""

from __future__ import annotations

import pytest
import torch

from petl_kernels import backends
from petl_kernels.ops.quantised import reference_dequantise, reference_quantise_int8, reference_quantise_nf4

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(backends.load_error("cuda") is not None, reason="the extension was built without CUDA"),
]

REFERENCE = {"int8": reference_quantise_int8, "nf4": reference_quantise_nf4}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Rows that 8 values fill and that they do not, several scales of absmaxes, parts of a block, a single value.
SHAPES = [(1024, 1024), (129, 75), (33, 130), (3, 65536), (1, 64), (5, 1), (2, 1)]


def weight_of(n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 3, n)[:, None]
    weight[n // 2, : k // 2] = 0
    weight[n // 3] = 0
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", ["int8", "nf4"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_quantise_and_dequantise(shape, storage, dtype):
    weight = weight_of(*shape, DTYPES[dtype])
    found = backends.kernel_of(f"quantise_{storage}", "cuda")(weight.cuda())
    expected = REFERENCE[storage](weight)
    for part, value in zip(found, expected, strict=True):
        assert torch.equal(part.cpu(), value)
    rows, columns = shape
    for out_dtype in DTYPES.values():
        for first, some in ((0, rows), (rows // 2, rows - rows // 2), (rows - 1, 1), (0, 0)):
            computed = backends.kernel_of("dequantise", "cuda")(found, first, some, columns, out_dtype)
            assert torch.equal(computed.cpu(), reference_dequantise(expected, first, some, columns, out_dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_numbers_that_are_not_finite_stay_visible(storage, value):
    weight = weight_of(40, 96, torch.float32)
    weight[7, 3] = value
    parts = backends.kernel_of(f"quantise_{storage}", "cuda")(weight.cuda())
    assert not all(part.isfinite().all() for part in parts if part.is_floating_point())
