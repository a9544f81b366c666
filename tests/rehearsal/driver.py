"""Triton's driver of a card, played: kernels are compiled for the card or made up, and what is started is written down.

What decides whether two launches are the same is all Triton's own; only the card is missing.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver


class PlayedDriver:
    """A card of sm_90. ``starts``: (what was compiled, arguments of Triton's launcher), as long as it ``records``."""

    def __init__(self, records: bool = True):
        self.device, self.stream = 0, 7
        self.starts: list[tuple] = []
        self.records = records
        functions = itertools.count(1)
        self.utils = SimpleNamespace(
            load_binary=lambda *given: (
                1,
                next(functions),
                32,
                0,
                1024,
            ),  # module, function, registers, spills, threads
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
        )

    def launcher_cls(self, source, metadata):
        if not self.records:
            return lambda *args: None
        return lambda *args: self.starts.append((source, args))

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream + device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextlib.contextmanager
def played(records: bool = True) -> Iterator[PlayedDriver]:
    """Makes a played driver Triton's until the end."""
    before, playing = driver._active, PlayedDriver(records)
    driver.set_active(playing)
    try:
        yield playing
    finally:
        gc.collect()  # a kernel of Triton 3.8 unloads itself by the driver
        driver.set_active(before)


def without_compiler() -> contextlib.AbstractContextManager:
    """Makes Triton's compiler return its source at once, as a kernel without code."""
    return mock.patch.object(triton.compiler, "compile", _made_up)


def _made_up(source, target: GPUTarget, options: dict) -> CompiledKernel:
    kernel = CompiledKernel.__new__(CompiledKernel)
    kernel.src, kernel.name, kernel.hash = source, source.fn.__name__, source.fn.cache_key  # which finds its globals
    kernel.kernel, kernel.metadata_group = b"", {}
    kernel.metadata = SimpleNamespace(target=target, shared=0, num_warps=options["num_warps"])
    kernel.packed_metadata = tuple(sorted(options.items(), key=str))
    kernel.module = kernel.function = kernel._run = None
    return kernel
