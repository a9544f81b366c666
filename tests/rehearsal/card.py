"""A CUDA card that is played by host memory: what a machine without one needs to run the code for one.

Importing this module, before PyTorch, gives the process a card of 2 GiB. PyTorch's own Python code and its checks of
arguments run as they are. Replaced are the functions of the driver that a build without CUDA lacks
(``torch._C._cuda_...``), streams, events and graphs. Tensors and pinned memory come from ``host_cuda.cpp``, which
``library.py`` compiles.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

from rehearsal.library import LIBRARY

assert "torch" not in sys.modules, "PyTorch looks for a card once, when it is imported"
_FOLDER = Path(importlib.util.find_spec("torch").origin).parent / "lib"
for _name in ("libc10.so", "libtorch_cpu.so"):
    ctypes.CDLL(str(_FOLDER / _name), ctypes.RTLD_GLOBAL)
_library = ctypes.CDLL(str(LIBRARY))
_library.card_limit.argtypes = [ctypes.c_int64]
_library.card_refuse_waiting.argtypes = [ctypes.c_bool]
_library.card_has_refused.restype = ctypes.c_bool
for _name in ("card_allocated", "card_peak", "card_times_pinned"):
    getattr(_library, _name).restype = ctypes.c_int64

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

TOTAL = 2 << 30  # bytes of the card
CONTEXT = 64 << 20  # bytes that the driver takes for itself


def peak() -> int:
    """Returns the most that ``allocated`` has been since the peak was last reset."""
    return _library.card_peak()


def allocated() -> int:
    """Returns the bytes of all tensors on the card."""
    return _library.card_allocated()


def set_fraction(fraction: float, index: int) -> None:
    """Limits what tensors may take, as ``cudaCachingAllocator::setMemoryFraction`` does."""
    _check_index(index)
    _library.card_limit(min(int(fraction * TOTAL), TOTAL - CONTEXT))


def _memory_info(index: int) -> tuple[int, int]:
    _check_index(index)
    return TOTAL - CONTEXT - allocated(), TOTAL


def _memory_stats(index: int) -> dict:
    _check_index(index)
    now = {"current": allocated(), "peak": _library.card_peak()}
    return {name: {"all": now} for name in ("allocated_bytes", "reserved_bytes")}


def _check_index(index: int) -> int:
    """Returns ``index`` as the driver's functions take it: a whole number, and of a device that is there."""
    if not isinstance(index, int):
        raise TypeError(f"the driver takes the number of a device, not {index!r}")
    if index != 0:
        raise RuntimeError("CUDA error: invalid device ordinal")
    return index


class Event:
    """An event of a stream on which everything has been done."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False):
        pass

    def record(self, stream: Stream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        _refuse_waiting()

    def query(self) -> bool:
        return True

    def wait(self, stream: Stream | None = None) -> None:
        pass


class Stream:
    """A stream on which everything is done when it is given."""

    cuda_stream = 0

    def __init__(self, device=None, priority: int = 0, **kwargs):
        with torch.cuda.device(device):  # PyTorch's own check of the device
            self.device = torch.device("cuda", 0)
        self.stream_id, self.device_index, self.device_type = 0, 0, 1

    def wait_stream(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event)

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None:
        _refuse_waiting()


class Generator(torch.Generator):
    """The card's generator, which PyTorch leaves unusable after a capture that has failed."""

    def graphsafe_set_state(self, state: torch.Generator) -> None:
        self.set_state(state.get_state())
        Graph.half_ended = False


_sync_debug_mode = 0


def _set_sync_debug_mode(mode: int) -> None:
    global _sync_debug_mode
    _sync_debug_mode = mode
    _library.card_refuse_waiting(mode == 2 or Graph.capturing is not None)


def _refuse_waiting() -> None:
    if Graph.capturing is not None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


class Graph:
    """A CUDA graph: what is captured is run again, operator by operator, on the very same tensors.

    A capture on a card computes nothing. Here it computes, and what it has written to tensors from before is put back.
    """

    capturing: Recording | None = None
    half_ended = False

    def capture_begin(self, pool=None, capture_error_mode: str = "global", **options) -> None:
        assert Graph.capturing is None
        Graph.capturing = self._recording = Recording()
        self._random = torch.get_rng_state()  # which the CPU's kernels draw from, and a capture does not
        _library.card_refuse_waiting(True)
        self._recording.__enter__()

    def capture_end(self) -> None:
        """After a wait PyTorch raises here, and leaves the pool and the generator to the capture."""
        Graph.capturing = None
        self._recording.__exit__(None, None, None)
        _library.card_refuse_waiting(_sync_debug_mode == 2)
        self._recording.put_back()
        torch.set_rng_state(self._random)
        Graph.half_ended = bool(_library.card_has_refused())
        if Graph.half_ended:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def replay(self) -> None:
        self._recording.replay()


class Recording(TorchDispatchMode):
    """The operators of a capture with their arguments and results."""

    def __init__(self):
        super().__init__()
        self._calls: list = []
        self._made: set[int] = set()  # storages
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for argument, given in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._remember(given)
        results = function(*args, **kwargs)
        self._made |= {tensor.untyped_storage()._cdata for tensor in _tensors(results)} - set(
            tensor.untyped_storage()._cdata for tensor in _tensors(args)
        )
        self._calls.append((function, args, kwargs, results))
        return results

    def _remember(self, given) -> None:
        for tensor in _tensors(given):
            storage = tensor.untyped_storage()._cdata
            if storage not in self._made and storage not in self._before:
                whole = tensor.detach().as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
                self._before[storage] = whole, whole.clone()

    def put_back(self) -> None:
        for tensor, before in self._before.values():
            tensor.copy_(before)
        self._before.clear()

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, results in self._calls:
            for old, new in zip(_tensors(results), _tensors(function(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for member in value for tensor in _tensors(member)]
    return []


def _install() -> None:
    driver = {
        "init": lambda: None,
        "getDeviceCount": lambda: 1,
        "getDevice": lambda: 0,
        "setDevice": _check_index,
        "getArchFlags": lambda: "sm_90",
        "synchronize": lambda: None,
        "emptyCache": lambda: None,
        "memoryStats": _memory_stats,
        "resetPeakMemoryStats": lambda index: _library.card_reset_peak(_check_index(index)),
        "setMemoryFraction": set_fraction,
        "getCurrentStream": lambda index: (0, _check_index(index), 1),
        "setStream": lambda **stream: None,
        "getCurrentRawStream": lambda index: 0,
        "set_sync_debug_mode": _set_sync_debug_mode,
        "get_sync_debug_mode": lambda: _sync_debug_mode,
        "endAllocateToPool": lambda index, pool: _check_index(index),
        "hostMemoryStats": lambda: {"num_host_alloc": _library.card_times_pinned()},
    }
    for name, function in driver.items():
        setattr(torch._C, f"_cuda_{name}", function)
    torch._C._host_emptyCache = lambda: None
    properties = SimpleNamespace(
        name="Host memory", major=9, minor=0, total_memory=TOTAL, L2_cache_size=50 << 20, multi_processor_count=132
    )
    for name, value in {
        "_initialized": True,
        "_cudart": SimpleNamespace(cudaMemGetInfo=_memory_info),
        "_get_device_properties": lambda index: properties,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
        "default_generators": (Generator(),),
        "is_current_stream_capturing": lambda: Graph.capturing is not None,
        "graph_pool_handle": lambda: (0, 1),
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
    }.items():
        setattr(torch.cuda, name, value)
    torch.version.cuda = "13.0"
    set_fraction(1.0, 0)


_install()
