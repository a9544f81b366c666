"""The check that lets a kernel serve on a card, for every op, backend and dtype: what `petl-mt doctor` prints.

It comes before tests that run whole layers, whose first call of an op makes this check and would compile its kernels.
"""

from __future__ import annotations

import pytest
import torch

from petl_kernels import dispatch, ops, parity

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
# fp16 takes bf16's paths
CHECKS = [
    pytest.param(op, dtype, marks=pytest.mark.slow if dtype == "fp16" else ()) for op in ops.OPS for dtype in DTYPES
]


@pytest.mark.parametrize(("op", "dtype"), CHECKS)
def test_backends_agree_with_the_reference(op, dtype):
    device = torch.device("cuda", torch.cuda.current_device())
    errors = {name: parity.check(op, name, device, DTYPES[dtype]) for name in dispatch.serving(op, device)}
    assert not any(errors.values()), errors


@pytest.mark.parametrize("op", ops.OPS)
def test_who_serves(op):
    """cuBLAS where it is at the hardware's speed, Triton for the rest."""
    others = {"frozen_linear": "reference", "quantized_embedding": "reference"}
    assert ops.backend_of(op, "cuda", torch.bfloat16) == others.get(op, "triton")
