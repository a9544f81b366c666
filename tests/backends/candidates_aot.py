"""Compile the candidates of bench/candidates as ``triton_aot.py`` compiles the shipped kernels: one JSON line each."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch
import triton_aot

sys.path.insert(0, str(Path(__file__).parents[2] / "bench" / "candidates"))
NAMES = ("in_loop", "one_read", "tma", "tma_flat", "tma_warps")  # the others launch shipped kernels
SHAPES = [(torch.bfloat16, 1, 16, 8192, 1024), (torch.float16, 3, 8, 2048, 1024), (torch.bfloat16, 1, 64, 512, 2048)]


def call(module, dtype, groups: int, rank: int, tokens: int, d: int) -> None:
    new = triton_aot._new
    x, dys, weights = new(dtype, tokens, d), [new(dtype, tokens, d)] * groups, [new(dtype, d, d)] * groups
    a, b = [new(torch.float32, rank, d)] * groups, [new(torch.float32, d, rank)] * groups
    rest = ([2.0] * groups, 0.0, None)
    _, s = module.lora_linear(x, weights, [new(dtype, d)] * groups, a, b, *rest)
    module.lora_linear_backward(dys, x, s, weights, a, b, *rest, True, [True] * groups)


def main(card: str) -> None:
    seen = set()
    for name in NAMES:
        if (name.startswith("tma") and card == "sm80") or (name == "tma_warps" and card != "sm100"):
            continue
        module = importlib.import_module(name)
        for shape in SHAPES:
            for kernel, args, constexprs, options in triton_aot.record(card, lambda m=module, s=shape: call(m, *s)):
                key = (kernel.__name__, str(constexprs), str(options), shape[1])
                if kernel.__module__ in NAMES and key not in seen:
                    seen.add(key)
                    # The audit does not know TMA.
                    audited = not name.startswith("tma")
                    report = triton_aot.compile_launch(card, kernel, args, constexprs, options, audited)
                    print(json.dumps({"candidate": name, "shape": str(shape), **report}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
