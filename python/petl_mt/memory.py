"""What a run takes, in two figures that are never mixed. Bar, log, README, result and tables name them so:

memory    the most of what ``--memory`` counts. On the CPU: tensors (weights, gradients, the optimiser's state, what is
          kept for backward) and the pages of streamed layers. On CUDA: what PyTorch's allocator holds of the card, and
          CUDA's own context.
process   the most host memory that the system has given to this process (its resident set): Python, PyTorch, the text
          and, on a CPU, the tensors too. No budget counts it.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch
from torch import nn

from petl_kernels.step import cap
from petl_kernels.units import format_size


class MemoryMeter:
    """Reads both figures for what happens after it was made."""

    def __init__(self, device: torch.device) -> None:
        """Whatever is not in use any more is given back first, so that it is not taken for this run's."""
        gc.collect()
        self.device, self.model = device, None
        self._earlier = cap.count(device)
        self._most = 0

    def watch(self, model: nn.Module) -> None:
        """Count the pages of the layers that ``model`` streams from files."""
        self.model = model

    def restart(self) -> None:
        """Let ``since_restart`` begin anew."""
        self._most = max(self._most, self.since_restart() or 0)
        cap.reset_peak(self.device)

    def since_restart(self) -> int | None:
        """``memory`` in bytes since the last ``restart``; None where nothing counts it (a CPU without extension)."""
        if self._earlier is None:
            return None
        return max(0, cap.held_peak(self.device) - self._earlier) + self._pages()

    def memory(self) -> int | None:
        """``memory`` in bytes since the meter was made; None where nothing counts it."""
        now = self.since_restart()
        return None if now is None else max(self._most, now)

    def text(self) -> str:
        return memory_text(self.memory(), process_bytes())

    def _pages(self) -> int:
        """Resident now, of files: the allocator of a CPU does not see them, that of a card has the slots."""
        streamed = getattr(self.model, "petl_streamed", None)
        return streamed.resident_bytes() if streamed is not None and self.device.type == "cpu" else 0


def process_bytes() -> int:
    """``process``: the highest resident set of this process so far, in bytes."""
    try:  # as the system has it since the process began, or since somebody has written to clear_refs
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_text(memory: int | None, process: int | None) -> str:
    """Both figures as a line shows them, such as ``memory 33.1 MiB, process 512 MiB``."""
    figures = (("memory", memory), ("process", process))
    return ", ".join(f"{name} {format_size(size)}" for name, size in figures if size is not None)
