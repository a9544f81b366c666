"""What LoRA's products cost on a CPU, one thread, in the thread's own time: `OMP_NUM_THREADS=1 python cpu_parts.py`.

Ways to write the same sum stand beside each other and run in turn: the skinny products each way round, A stacked under
W, the bordered weight, the whole kernels, and what Python adds around them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from petl_kernels import backends, ops

SHAPES = [(512, 768, 16), (512, 1024, 8), (512, 1024, 16), (512, 1024, 64), (512, 2048, 16), (2048, 1024, 16)]


def medians(calls: dict[str, Callable], rounds: int = 15) -> dict[str, float]:
    samples = {name: [] for name in calls}
    for _ in range(rounds + 2):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            samples[name].append(time.thread_time() - start)
    return {name: statistics.median(values[2:]) for name, values in samples.items()}


def parts(dtype: torch.dtype, tokens: int, d: int, rank: int) -> dict[str, Callable]:
    x, dy, weight, bias = (torch.randn(*size, dtype=dtype) for size in ((tokens, d), (tokens, d), (d, d), (d,)))
    a32, b32 = torch.randn(rank, d), torch.randn(d, rank)
    a, b = a32.to(dtype), b32.to(dtype)
    s, ds, b_rows, out = x @ a.t(), dy @ b, b.t().contiguous(), torch.randn(tokens, d).to(dtype)
    stacked, border = torch.cat([weight, a]), torch.cat([weight, b], 1)
    wide_x, wide_dy = torch.cat([x, s], 1), torch.cat([dy, ds], 1)
    forward, backward = (backends.kernel_of(f"lora_linear{part}", "cpu") for part in ("", "_backward"))
    fixed = ([a32], [b32], [1.0], 0.0, None)
    leaves = [t.clone().requires_grad_() for t in (x, a32, b32)]

    def kernels() -> None:
        with torch.no_grad():
            forward(x, [weight], [bias], *fixed)
            backward([dy], x, s, [weight], *fixed, True, [False])

    def op() -> None:
        torch.autograd.grad(ops.lora_linear(leaves[0], weight, bias, *leaves[1:], 1.0), leaves, dy)

    return {
        "xW": lambda: F.linear(x, weight, bias),
        "dyW": lambda: dy @ weight,
        "s": lambda: x @ a.t(),
        "s, transposed": lambda: (a @ x.t()).t().contiguous(),
        "y+": lambda: out.addmm_(s, b.t()),
        "ds": lambda: dy @ b,
        "ds, transposed": lambda: (b_rows @ dy.t()).t().contiguous(),
        "dB": lambda: s.t() @ dy,
        "dA": lambda: ds.t() @ x,
        "dx+": lambda: out.addmm_(ds, a),
        "x[W; A]": lambda: x @ stacked.t(),
        "[x, s][W, B]": lambda: F.linear(wide_x, border, bias),
        "[dy, ds][W; A]": lambda: wide_dy @ stacked,
        "copy of x beside s": lambda: wide_x[:, :d].copy_(x),
        "kernels": kernels,
        "op": op,
    }


def main() -> None:
    torch.set_num_threads(1)
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            times = medians(parts(dtype, *shape))
            limit = times["xW"] + times["dyW"]
            print(f"{dtype} {shape}: kernels {times['kernels'] / limit:.3f}, op {times['op'] / limit:.3f} of the limit")
            print("   " + ", ".join(f"{name} {value * 1e3:.3f} ms" for name, value in times.items()), flush=True)


if __name__ == "__main__":
    main()
