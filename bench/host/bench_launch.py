"""The host's time of a launch: the package's kernels as Triton launches them, and as ``launch`` does.

The launches that an op makes on 64 tokens of width 64 in bf16, over and over, each way in turn; a figure is the time of
one launch. On a CPU a played driver takes the place of a card's: kernels are compiled for sm_90 (a minute, once), the
host does all that it does before the driver is called, and nothing runs. The driver's own call is extra on a card.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import time
from unittest import mock

import pytest
import torch

from bench.run.clock import write_down
from bench.run.turns import ratio

ROUNDS, WARM, PASSES = 40, 3, 20
CASES = ["layer_norm", "dropout_add", "lora_linear", "lora_linear backward", "attention", "attention backward"]
WAYS = ["Triton's launch", "ours"]


@pytest.mark.parametrize("implementation", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_launch(benchmark, device, case, implementation):
    pytest.importorskip("triton", reason="Triton is not installed: it launches nothing")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: the interpreter launches nothing")
    seconds = samples(device)[case, implementation]
    benchmark.group = f"launch {case}"
    benchmark.extra_info.update(
        op="launch",
        shape="64 x 64",
        case=case,
        dtype="bfloat16",
        tokens=64,
        implementation=implementation,
        of_triton=ratio(seconds, samples(device)[case, WAYS[0]]),
    )
    write_down(benchmark, seconds)


@functools.cache
def samples(device: str) -> dict[tuple[str, str], list[float]]:
    """(case, way) -> seconds of one launch, in each round."""
    from rehearsal.driver import played  # pyright: ignore[reportMissingImports]  of tests/, which pytest finds

    from petl_kernels.backends.triton.launch import launch

    def by_triton(kernel, grid, *args, warps, stages, **constexprs):
        kernel[grid](*args, **constexprs, num_warps=warps, num_stages=stages, enable_fp_fusion=True)

    recorded, found = launches(device), {}
    with contextlib.nullcontext() if device == "cuda" else played(records=False):
        for k in range(WARM + ROUNDS):
            for (case, given), (way, function) in itertools.product(
                recorded.items(), zip(WAYS, (by_triton, launch), strict=True)
            ):
                if device == "cuda":
                    torch.cuda.synchronize()
                began = time.perf_counter()
                for _ in range(PASSES):
                    for args, options in given:
                        function(*args, **options)
                if k >= WARM:
                    took = (time.perf_counter() - began) / (PASSES * len(given))
                    found.setdefault((case, way), []).append(took)
    return found


def launches(device: str) -> dict[str, list[tuple[tuple, dict]]]:
    """The arguments of ``launch`` in a call of each case."""
    from petl_kernels.backends.triton import attention, common, dropout_add, layer_norm, lora_linear

    found: list[tuple[tuple, dict]] = []
    with contextlib.ExitStack() as stack:
        for module in (attention, common, dropout_add, layer_norm, lora_linear):
            stack.enter_context(
                mock.patch.object(module, "launch", lambda *args, **options: found.append((args, options)))
            )
        recorded = {}
        for case, call in calls(device).items():
            call()
            recorded[case] = list(found)
            found.clear()
    return recorded


def calls(device: str) -> dict:
    from petl_kernels.backends.triton import attention, dropout_add, layer_norm, lora_linear

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    x, norm, seed = new(64, 64), new(64, dtype=torch.float32), new(1, dtype=torch.int64)
    weights, biases = [new(64, 64) for _ in range(3)], [new(64) for _ in range(3)]
    a, b = ([new(*shape, dtype=torch.float32) for _ in range(3)] for shape in ((8, 64), (64, 8)))
    lora = a, b, [2.0] * 3, 0.1, seed
    q, k, v = (new(2, 32, 4, 64).transpose(1, 2) for _ in range(3))
    o, lse, mask = torch.empty_like(q), new(2, 4, 32, dtype=torch.float32), new(2, 1, 1, 32, dtype=torch.bool)
    options = mask, None, None, None, False, 0.125, 0.1, seed
    packed = None, None, None
    return {
        "layer_norm": lambda: layer_norm.layer_norm(x, norm, norm, 1e-5),
        "dropout_add": lambda: dropout_add.dropout_add(x, x, 0.1, seed),
        "lora_linear": lambda: lora_linear.lora_linear(x, weights, biases, *lora),
        "lora_linear backward": lambda: lora_linear.lora_linear_backward(
            [x] * 3, x, new(64, 24), weights, *lora, True, [False] * 3
        ),
        "attention": lambda: attention.attention(q, k, v, *options, *packed),
        "attention backward": lambda: attention.attention_backward(q, q, k, v, o, lse, *options, False, *packed, False),
    }
