"""The Triton kernels on a CUDA device, in every dtype, at the interpreter's sizes and at those that take each tile.

Each call compiles some five kernels, so what says less is marked slow: fp16 takes bf16's paths, and fp32 passes the
interpreter and the check of each op (test_parity_gpu.py).
"""

from __future__ import annotations

import pytest
import torch
import triton_cases

from petl_kernels import dispatch, parity

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CASES = triton_cases.CASES | triton_cases.LARGE


CALLS = [
    pytest.param(name, dtype, marks=() if dtype == "bf16" else pytest.mark.slow) for name in CASES for dtype in DTYPES
]


@pytest.mark.parametrize(("name", "dtype"), CALLS)
def test_values_and_gradients(name, dtype):
    op, case = CASES[name]
    assert parity.compare(op, "triton", case(parity.Source(torch.device("cuda"), DTYPES[dtype]))) is None


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_the_relu_of_a_product_passes_on_what_is_not_a_number(backend):
    """As F.relu does: a library whose ReLU is max(0, z) may make a zero of it."""
    if (kernel := dispatch.kernel_of("frozen_ffn", backend)) is None:
        pytest.skip("the extension was built without CUDA or cuBLASLt's headers")
    given = parity.frozen_ffn_arguments(parity.Source(torch.device("cuda"), torch.bfloat16), rows=(130,), d=64, f=256)
    given["x"][7, 3] = torch.nan
    y, *_ = kernel(given["x"], [given["w1"]], given["c1"], [given["w2"]], given["c2"], [], "relu", "bits")
    assert y[7].isnan().all() and y[:7].isfinite().all() and y[8:].isfinite().all()


@pytest.mark.parametrize("name", ["lora_linear-rank-16-dropout-0.1", "bottleneck_adapter-64-relu"])
def test_two_runs_agree_bitwise(name):
    op, case = triton_cases.LARGE[name]
    given = case(parity.Source(torch.device("cuda"), torch.bfloat16))
    first, second = (parity.run(op, "triton", given) for _ in range(2))
    for value in first:
        assert torch.equal(first[value], second[value]), value
