"""Parts of a training step as CUDA graphs: captured once for each shape of their inputs, replayed after that.

At d = 1024 a kernel takes some 50 µs and its launch from Python about as long. A replay launches all of a step's
kernels at once. A captured step must not wait for the device (``ops.linear_cross_entropy`` needs ``counted``), read a
number of Python's that changes from step to step, or find its gradients in another place than before. So it cannot
stream layers, hold their inputs in host memory (tier 5) or have gradients in 16 bits.

Its inputs are packed rows, filled up so that there are few shapes: ``row_tokens`` and ``row_sentences``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from petl_kernels.errors import InputError

MOST = 64  # shapes; the graph of each takes some megabytes of the driver's own, which no allocator counts
WORKSPACE = 32 * 2**20  # bytes that cuBLAS has for each stream: the most that PyTorch gives it (on Hopper)
_SMALLEST = 512  # bytes that CUDA's allocator gives to a number
_SIZES, _ALIGN = 8, 128  # how many lengths rows have up to the longest; the number of tokens that divides them

Run = Callable[..., Tensor]
Replay = Callable[[], None]


def check_device(device: torch.device) -> None:
    """Raises InputError for a device that has no CUDA graphs."""
    if device.type != "cuda":
        raise InputError(f"cuda_graphs: the device is {device}; expected cuda")


def row_tokens(count: int, most: int) -> int:
    """Returns how many tokens a row of ``count`` has when it is filled up: the next of at most 8 sizes up to ``most``.

    A row is longer than ``most`` where a single sentence is.
    """
    step = -(-most // (_SIZES * _ALIGN)) * _ALIGN
    size = -(-count // step) * step
    return min(size, most) if count <= most else size


def row_sentences(count: int, tokens: int) -> int:
    """Returns how many sentences, empty ones included, a row of ``tokens`` has when ``count`` are not empty."""
    quarter = -(-tokens // 4)
    return quarter if count <= quarter else max(count, tokens)


def graph_bytes(tokens: int) -> int:
    """Returns the bytes that graphs of a training step take beside the step itself, as far as they can be known.

    For each shape of rows of up to ``tokens`` a side: three rows of ids, int64, the boundaries of both sides, int32,
    and the numbers that go in and out; and cuBLAS' workspace on the stream that is captured. The step's own memory
    counts once: all graphs have one pool, and what ran before the first capture is given back. Not counted: what the
    driver takes for each graph, gaps in a pool that shapes of several sizes share, and steps of shapes beyond the first
    64, which run beside it.
    """
    sizes = len({row_tokens(min(count, tokens), tokens) for count in range(_ALIGN, tokens + _ALIGN, _ALIGN)})
    shapes = min(MOST, 2 * sizes**2)
    return WORKSPACE + shapes * (3 * 8 * tokens + 2 * 4 * (tokens + 1) + 2 * _SMALLEST)


class CudaGraphs:
    """Captures graphs on ``device``, whose memory is one pool: they run one after the other.

    reason: why a capture has failed, in one line; "" while none has. After one has failed nothing is captured any more,
    and the graphs captured before are dropped.
    """

    def __init__(self, device: torch.device):
        self.device, self.reason, self._pool = device, "", None
        self.users: list[Graphed] = []  # those that have graphs in the pool

    def capture(self, run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Returns (a call that runs it again, the tensor that its result is written to). Computes nothing yet."""
        with torch.cuda.device(self.device):
            if self._pool is None:
                torch.cuda.empty_cache()  # what eager steps have left; the pool cannot use it
                self._pool = torch.cuda.graph_pool_handle()
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            generator = torch.cuda.default_generators[self.device.index or 0]
            random = generator.clone_state()
            try:
                # "relaxed": Triton loads kernels for a new shape while it is captured
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="relaxed"):
                    result = run()
            except torch.OutOfMemoryError:
                raise
            except Exception:
                self._end(stream, generator, random)
                raise
        return graph.replay, result

    def release(self) -> None:
        """Drops all graphs and gives their memory back; shapes are captured anew when they come again."""
        for user in self.users:
            user.forget()
        self._pool = None
        torch.cuda.empty_cache()

    def give_up(self, reason: str) -> None:
        """Drops all graphs and captures no others."""
        self.reason = reason
        self.release()

    def _end(self, stream, generator: torch.Generator, random: torch.Generator) -> None:
        """Ends a capture that a wait has made invalid, which PyTorch leaves half ended: its stream is still the current
        one, its pool takes what is allocated, and the generator draws nothing outside of a capture."""
        torch.cuda.set_stream(stream)
        with suppress(RuntimeError):  # ended already, where something else has failed
            if self._pool is not None:
                torch._C._cuda_endAllocateToPool(self.device.index or 0, self._pool)
        generator.graphsafe_set_state(random)


class Graphed:
    """Calls ``run(*inputs)``, as a replay where inputs of the same shapes have come before.

    run: takes tensors of fixed dtypes on the recorder's device and returns a scalar; the gradients that it adds to stay
    where they are. Inputs may be on the host, in pinned memory. ``run`` itself is called the first time, when kernels
    are compiled and checked, which no capture could hold; for shapes beyond the first 64; and always after a capture
    has failed, of this or of another ``Graphed`` with the same recorder. Raises torch.OutOfMemoryError and InputError
    as ``run`` does.
    """

    def __init__(self, run: Run, recorder: CudaGraphs):
        self._run, self._recorder = run, recorder
        self._captured: dict[tuple, tuple[list[Tensor], Replay, Tensor]] = {}
        self._warm = False
        recorder.users.append(self)

    def __call__(self, *inputs: Tensor) -> Tensor:
        key = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
        if self._warm and key not in self._captured and not self.is_full and not self._recorder.reason:
            self._capture(key, inputs)
        if key not in self._captured:
            result = self._run(*(tensor.to(self._recorder.device, non_blocking=True) for tensor in inputs))
            self._warm = True
            return result
        own, replay, result = self._captured[key]
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        replay()
        return result.clone()  # the next replay overwrites it

    def __len__(self) -> int:
        return len(self._captured)

    @property
    def is_full(self) -> bool:
        """Returns whether as many shapes are captured as may be."""
        return len(self) >= MOST

    def forget(self) -> None:
        """Drops the graphs; the next call runs ``run`` itself."""
        self._captured.clear()
        self._warm = False

    def _capture(self, key: tuple, inputs: tuple[Tensor, ...]) -> None:
        own = [tensor.to(self._recorder.device, copy=True) for tensor in inputs]
        try:
            self._captured[key] = (own, *self._recorder.capture(lambda: self._run(*own).detach()))
        except (torch.OutOfMemoryError, InputError):
            raise
        except Exception as error:  # of the driver, of PyTorch, of Triton's compiler
            self._recorder.give_up(next(iter(str(error).splitlines()), type(error).__name__))
