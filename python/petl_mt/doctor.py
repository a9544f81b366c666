"""``petl-mt doctor``: the versions that are installed, the backend of each op, and its agreement with the reference.

On a card most of the time goes into compiling: some 270 kernels of 16 ops in three dtypes, each about a second of a
processor. They are compiled side by side, those for bf16 first, and what is compiled is kept on disk.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from queue import SimpleQueue
from typing import NamedTuple

import torch

from petl_kernels import __version__, cards, dispatch, machine, ops, parity
from petl_kernels.device import resolve

# After this no check begins. One that runs cannot be stopped: the longest take some seconds more.
SECONDS = 20
# Triton compiles without Python's lock, but for a tenth of the time. Each thread that multiplies takes a workspace.
THREADS = 16

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


class Verdict(IntEnum):
    """The result of checking a kernel; of several cases the least counts."""

    WRONG = 0
    UNKNOWN = 1
    RIGHT = 2


Outcome = tuple[Verdict, str]  # with the reason


class Check(NamedTuple):
    """The result for a backend's kernels of one op in one dtype."""

    op: str
    backend: str
    dtype: torch.dtype
    verdict: Verdict
    why: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds nothing: the command has no options."""


def run_command(arguments: argparse.Namespace) -> int:
    return doctor()


def doctor() -> int:
    """Prints the report, each line as soon as it is there.

    Returns 0 when every op agrees with the reference on this machine, 1 when one does not, and 3 when none was found
    wrong, but time or memory did not suffice to check them all.
    """
    stop = time.monotonic() + SECONDS
    for line in facts():
        print(line, flush=True)
    device = resolve()
    plain = [op for op in ops.OPS if _default(op, device) == "reference"]
    print(f"served by plain PyTorch: {', '.join(plain) or 'no op'}")
    print("parity with the reference:", flush=True)
    verdicts = Counter()
    for check in checks(device, stop):
        print(_line(check, device), flush=True)
        verdicts[check.verdict] += 1
    if unknown := verdicts[Verdict.UNKNOWN]:
        print(
            f"{unknown} of {verdicts.total()} not checked; what is compiled is kept, so that the next run gets further"
        )
    return 1 if verdicts[Verdict.WRONG] else 3 if unknown else 0


def checks(device: torch.device, stop: float) -> Iterator[Check]:
    """Yields the result of every backend but the reference, for each op and dtype. ``stop``: see ``_outcome``."""
    pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1) if device.type == "cuda" else 1)
    row_of, done, outcomes = {}, SimpleQueue(), defaultdict(list)
    try:
        for row in _rows(device):
            for case in parity.CASES[row[0]]:
                row_of[pool.submit(_outcome, *row, case, device, stop)] = row
        for future in row_of:
            future.add_done_callback(done.put)
        for _ in row_of:
            future = done.get()
            row = row_of[future]
            outcomes[row].append(future.result())
            if len(outcomes[row]) == len(parity.CASES[row[0]]):
                yield Check(*row, *min(outcomes[row]))
    finally:
        pool.shutdown(cancel_futures=True)


def _rows(device: torch.device) -> Iterator[tuple[str, str, torch.dtype]]:
    for dtype in parity.DTYPES:
        for op in ops.OPS:
            for backend in dispatch.serving(op, device):
                if backend != "reference" and dtype in parity.checked_dtypes(backend, device):
                    yield op, backend, dtype


def _outcome(op: str, backend: str, dtype: torch.dtype, case: Callable, device: torch.device, stop: float) -> Outcome:
    """Checks one case of ``parity.CASES``; after ``stop``, a time of ``time.monotonic``, no check begins."""
    if time.monotonic() > stop:
        return Verdict.UNKNOWN, "no time"
    try:
        error = parity.check_case(op, backend, device, dtype, case)
    except torch.OutOfMemoryError:
        return Verdict.UNKNOWN, "out of memory"
    return (Verdict.WRONG, error) if error else (Verdict.RIGHT, "")


def _line(check: Check, device: torch.device) -> str:
    default = _default(check.op, device)
    if check.verdict == Verdict.RIGHT:
        text = "pass, serves" if check.backend == default else "pass"
    elif check.verdict == Verdict.UNKNOWN:
        text = f"not checked: {check.why}"
    else:
        text = f"WRONG: {check.why}" + ("; the reference serves" if check.backend == default != "cpu" else "")
    return f"{str(check.dtype).removeprefix('torch.'):<8}  {check.op:<20}  {check.backend:<7}  {text}"


def _default(op: str, device: torch.device) -> str:
    """Returns the backend that serves ``op`` if it is right."""
    return next(name for name in dispatch.default_order(op, device) if dispatch.kernel_of(op, name) is not None)


def facts() -> list[str]:
    """Returns lines on versions, the device, the extension and the backends."""
    lines = [f"petl-kernels {__version__}, Python {sys.version.split()[0]}, {platform.platform()}"]
    lines.append(", ".join(f"{name} {machine.version(name) or '-'}" for name in PACKAGES))
    lines.append(f"device: {_device()}")
    if torch.cuda.is_available() and not torch.version.hip:
        lines += card_lines(torch.cuda.get_device_capability(0))
    lines.append(f"extension: {_extension()}")
    for name in dispatch.BACKENDS:
        error = dispatch.load_error(name)
        lines.append(f"backend {name}: {'available' if error is None else f'not here ({error})'}")
    return lines


def card_lines(capability: tuple[int, int]) -> list[str]:
    """Returns a line on the class of a CUDA card, and one for each thing that it lacks."""
    kind = cards.class_of(capability)
    lines = [
        f"card: class {kind.name} ({kind.cards}), {kind.shared_memory >> 10} KB of shared memory for a block; "
        f"Triton's kernels for {kind.dtypes()}"
    ]
    if capability not in kind.capabilities:
        lines.append(f"card: its kernels were not compiled ahead of time for compute capability {_dotted(capability)}")
    if not kind.bf16:
        lines.append(f"card: plain PyTorch serves every op in bf16: {cards.NO_BF16.format(*capability)}")
    if not kind.tensor_cores:
        lines.append("card: products of Triton's kernels take the CUDA cores, the library's the tensor cores")
    return lines


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _device() -> str:
    threads = f"{machine.cores()} CPUs, {machine.threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if not torch.cuda.is_available():
        return f"CPU ({threads}); no CUDA device"
    properties = torch.cuda.get_device_properties(0)
    version = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability "
        f"{properties.major}.{properties.minor}, {version}; {threads}"
    )


def _extension() -> str:
    try:
        extension = importlib.import_module("petl_kernels._C")
    except ImportError as error:
        return f"not built ({error})"
    return ", ".join(f"{name} {value}" for name, value in extension.build_info().items())
