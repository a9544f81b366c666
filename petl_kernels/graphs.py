"""A training step as a CUDA graph: captured once for each shape of its inputs, replayed after that.

At d = 1024 a kernel takes some 50 µs and its launch from Python about as long. A replay launches all of a step's
kernels at once. What a captured step may not do: wait for the device (``ops.linear_cross_entropy`` needs ``counted``),
read a number of Python's that changes from step to step, or find its gradients in another place than before. So it
cannot stream layers, hold their inputs in host memory (tier 5) or keep gradients in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from petl_kernels.errors import InputError

MOST = 64  # graphs; each takes some megabytes of the driver's own, which no allocator counts
WIDTH = 32  # lengths of batches are multiples of it, so that there are few shapes
WORKSPACE = 32 * 2**20  # of cuBLAS, which has one for each stream: the largest that PyTorch gives it (Hopper's)
_SMALLEST = 512  # bytes that CUDA's allocator gives to a number

Run = Callable[..., Tensor]
Replay = Callable[[], None]


def check_device(device: torch.device) -> None:
    if device.type != "cuda":
        raise InputError(f"cuda_graphs: the device is {device}; expected cuda")


def graph_bytes(tokens: int, longest: int) -> int:
    """What graphs of a training step take beside what the step itself takes, as far as it can be known.

    For each pair of widths up to ``longest``: source and labels, int64, of ``tokens`` at most, and the numbers that go
    in and out; and cuBLAS' workspace on the stream that is captured. The step's own memory counts once: all graphs have
    one pool, and what ran before the first capture is given back. Not counted: what the driver takes for each graph,
    gaps in a pool that shapes of several sizes share, and steps of shapes beyond the first 64, which run beside it.
    """
    shapes = min(MOST, (-(-longest // WIDTH)) ** 2)
    return WORKSPACE + shapes * (2 * 8 * tokens + 2 * _SMALLEST)


class CudaGraphs:
    """Captures on ``device``. The memory of all graphs is one pool: they run one after the other."""

    def __init__(self, device: torch.device):
        self._device, self._pool = device, None

    def capture(self, run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """(what runs it again, the tensor that its result is written to). Nothing is computed yet."""
        with torch.cuda.device(self._device):
            if self._pool is None:
                torch.cuda.empty_cache()  # what eager steps have left; the pool cannot use it
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # "relaxed": Triton loads kernels for a new shape while it is captured
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="relaxed"):
                result = run()
        return graph.replay, result

    def release(self) -> None:
        self._pool = None
        torch.cuda.empty_cache()


class GraphedStep:
    """``run(*inputs)``, replayed where the same shapes have come before.

    run: tensors of fixed dtypes -> a scalar; it adds to the gradients of its parameters, which stay where they are.
    The first call runs as it is: kernels are compiled and checked then, which no capture could hold. Shapes beyond the
    first 64 run as they are. So does everything after a capture that has failed, since it may leave the allocator
    in a state of its own; ``reason`` says why. Raises torch.OutOfMemoryError as ``run`` does.
    """

    def __init__(self, run: Run, recorder: CudaGraphs):
        self._run, self._recorder = run, recorder
        self._captured: dict[tuple, tuple[list[Tensor], Replay, Tensor]] = {}
        self._warm = False
        self.reason = ""

    def __call__(self, *inputs: Tensor) -> Tensor:
        key = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
        if self._warm and key not in self._captured and len(self._captured) < MOST and not self.reason:
            self._capture(key, inputs)
        self._warm = True
        if key not in self._captured:
            return self._run(*inputs)
        own, replay, result = self._captured[key]
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        replay()
        return result.clone()  # the next replay writes over it

    def __len__(self) -> int:
        return len(self._captured)

    def forget(self) -> None:
        """Give the graphs and their memory back; shapes are captured anew when they come again."""
        self._captured.clear()
        self._recorder.release()

    def _capture(self, key: tuple, inputs: tuple[Tensor, ...]) -> None:
        own = [tensor.clone() for tensor in inputs]
        try:
            self._captured[key] = (own, *self._recorder.capture(lambda: self._run(*own).detach()))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.reason = str(error).splitlines()[0]
