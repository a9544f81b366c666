"""The memory that a run takes, in two figures. Bar, log, README, result and tables call them so:

memory    the most of what ``--memory`` counts. On the CPU: tensors (weights, gradients, the optimiser's state, what is
          kept for backward), the pages of streamed layers, and the tokenised text of training. On CUDA: what PyTorch's
          allocator holds of the card, and CUDA's own context.
process   the most host memory that the system has given to this process (its resident set): Python, PyTorch, the lines
          of the text and, on a CPU, the tensors too. No budget counts it.
"""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path

import torch
from torch import nn

from petl_kernels.methods.owner import owner
from petl_kernels.step import cap
from petl_kernels.units import format_size


class MemoryMeter:
    """Reads both figures; memory counts from the moment the meter is made."""

    def __init__(self, device: torch.device) -> None:
        """Frees what is no longer in use first, so that it is not counted as this run's."""
        gc.collect()
        self.device = device
        self.model: nn.Module | None = None
        self.text_bytes = 0  # bytes of the tokenised text
        self._earlier = cap.count(device)
        self._most = 0

    def watch(self, model: nn.Module) -> None:
        """Counts the pages of the layers that ``model`` streams from files, too."""
        self.model = model

    def restart(self) -> None:
        """Lets ``since_restart`` begin anew."""
        self._most = max(self._most, self.since_restart() or 0)
        cap.reset_peak(self.device)

    def since_restart(self) -> int | None:
        """Returns ``memory`` in bytes since the last ``restart``; None on a CPU without the extension, which counts."""
        if self._earlier is None:
            return None
        text = self.text_bytes if self.device.type == "cpu" else 0
        return max(0, cap.held_peak(self.device) - self._earlier) + self._pages() + text

    def memory(self) -> int | None:
        """Returns ``memory`` in bytes since the meter was made; None as in ``since_restart``."""
        now = self.since_restart()
        return None if now is None else max(self._most, now)

    def text(self) -> str:
        """Returns both figures as a line shows them."""
        return memory_text(self.memory(), process_bytes())

    def _pages(self) -> int:
        """Returns the resident bytes of streamed layers; on CUDA 0, since the allocator counts them."""
        if self.model is None:
            return 0
        streamed = owner(self.model).streamed
        return streamed.resident_bytes() if streamed is not None and self.device.type == "cpu" else 0


def process_bytes() -> int:
    """Returns ``process``, the highest resident set of this process so far, in bytes."""
    try:  # counted since the process began, or since the last write to clear_refs
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_text(memory: int | None, process: int | None) -> str:
    """Returns both figures as a line shows them, such as ``memory 33.1 MiB, process 512 MiB``."""
    figures = (("memory", memory), ("process", process))
    return ", ".join(f"{name} {format_size(size)}" for name, size in figures if size is not None)
