"""`petl-mt doctor`: what is installed here, what serves each op, and does it compute what the reference computes."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from importlib import metadata

import torch

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "peft",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "sacrebleu",
    "numpy",
)


def doctor() -> int:
    """Print the report; 0 when every op agrees with the reference on this machine, else 1."""
    from petl_kernels import parity

    print("\n".join(facts()))
    rows = parity.table()
    print("\n".join(parity_lines(rows)))
    return 0 if all(row[3] == "pass" for row in rows) else 1


def facts() -> list[str]:
    from petl_kernels import __version__, ops
    from petl_kernels.backends import BACKENDS, load_error

    lines = [f"petl-kernels {__version__}, Python {sys.version.split()[0]}, {platform.platform()}"]
    lines.append(", ".join(f"{name} {_installed(name)}" for name in PACKAGES))
    lines.append(f"device: {_device()}")
    lines.append(f"extension: {_extension()}")
    for name in BACKENDS:
        error = load_error(name)
        lines.append(f"backend {name}: {'available' if error is None else f'not here ({error})'}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines += [f"{op} is served by {ops.backend_of(op, device)}" for op in ops.OPS]
    return lines


def parity_lines(rows: list[tuple[str, str, str, str, bool]]) -> list[str]:
    """The parity check as a table: one line an op and backend, one column a dtype; * marks what serves the op."""
    dtypes = list(dict.fromkeys(row[2] for row in rows))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for op, backend, dtype, outcome, default in rows:
        cells.setdefault((op, backend + ("*" if default else "")), {})[dtype] = outcome
    widths = [max(len(key[i]) for key in cells) for i in (0, 1)]
    lines = ["parity with the reference:"]
    lines.append("  ".join(["op".ljust(widths[0]), "backend".ljust(max(7, widths[1])), *dtypes]))
    for (op, backend), outcomes in cells.items():
        columns = [outcomes.get(dtype, "-").ljust(len(dtype)) for dtype in dtypes]
        lines.append("  ".join([op.ljust(widths[0]), backend.ljust(max(7, widths[1])), *columns]).rstrip())
    return lines


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "-"


def _device() -> str:
    threads = f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if not torch.cuda.is_available():
        return f"CPU ({threads}); no CUDA device"
    properties = torch.cuda.get_device_properties(0)
    return (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability "
        f"{properties.major}.{properties.minor}, CUDA {torch.version.cuda}; {threads}"
    )


def _extension() -> str:
    try:
        extension = importlib.import_module("petl_kernels._C")
    except ImportError as error:
        return f"not built ({error})"
    return ", ".join(f"{name} {value}" for name, value in extension.build_info().items())
