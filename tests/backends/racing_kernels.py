"""Two small kernels for the audit of races. Run as a script, it compiles both for sm_90 and prints the audit of each
as a line of JSON."""

from __future__ import annotations

import json

import triton
import triton.language as tl
import triton_races
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def one_load(out, sums, x, y, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """out = x y and sums = Σ_k x_k: one load feeds the product and the sum."""
    rows, cols = tl.arange(0, BM), tl.arange(0, BN)
    acc, total = tl.zeros((BM, BN), tl.float32), tl.zeros((BM,), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(x + rows[:, None] * K + k[None, :])
        right = tl.load(y + k[:, None] * BN + cols[None, :])
        acc = tl.dot(left, right, acc)
        total += tl.sum(left.to(tl.float32), 1)
    tl.store(out + rows[:, None] * BN + cols[None, :], acc)
    tl.store(sums + rows, total)


@triton.jit
def two_loads(out, sums, x, y, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Does the same, with a load a step ahead for the sum."""
    rows, cols = tl.arange(0, BM), tl.arange(0, BN)
    acc, total = tl.zeros((BM, BN), tl.float32), tl.zeros((BM,), tl.float32)
    ahead = tl.load(x + rows[:, None] * K + tl.arange(0, BK)[None, :])
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(x + rows[:, None] * K + k[None, :])
        right = tl.load(y + k[:, None] * BN + cols[None, :])
        acc = tl.dot(left, right, acc)
        total += tl.sum(ahead.to(tl.float32), 1)
        ahead = tl.load(x + rows[:, None] * K + (k + BK)[None, :], mask=(k + BK < K)[None, :], other=0.0)
    tl.store(out + rows[:, None] * BN + cols[None, :], acc)
    tl.store(sums + rows, total)


def main() -> None:
    for kernel in (one_load, two_loads):
        pointers = {"out": "*fp32", "sums": "*fp32", "x": "*bf16", "y": "*bf16", "K": "i32"}
        blocks = {"BM": 64, "BN": 128, "BK": 64}
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(5)}
        constants = {(kernel.arg_names.index(name),): value for name, value in blocks.items()}
        code = ASTSource(kernel, pointers | dict.fromkeys(blocks, "constexpr"), constants, aligned)
        options = {"num_warps": 4, "num_stages": 3}
        compiled = triton.compile(code, target=GPUTarget("cuda", 90, 32), options=options)
        print(json.dumps({"kernel": kernel.__name__, **triton_races.audit(compiled.asm["ttgir"])._asdict()}))


if __name__ == "__main__":
    main()
