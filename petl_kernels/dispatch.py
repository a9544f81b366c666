"""Which kernel serves an op: a table of callables and the router that picks one.

A backend is a module in this package that registers callables with ``@register(op, backend)``. It is imported
when it is first needed. Adding one touches no op and no caller.

    reference   plain PyTorch, any device and dtype: the executable specification
    cpu         C++ kernels of the extension (``csrc/cpu``)
    triton      Triton kernels, on CUDA devices (and on the CPU under ``TRITON_INTERPRET=1``)
    cuda        CUDA C++ of the extension (``csrc/cuda``), by ``use("cuda")``: feed-forward blocks on cuBLASLt

On a CUDA device a backend other than the reference becomes the default of an op only after a small comparison
with the reference has passed on that device, once per process (``petl_kernels/parity.py``). ``turned_down`` lists
those that have failed theirs. While a CUDA graph is captured nothing is compared.
"""

from __future__ import annotations

import importlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from petl_kernels.device import resolve
from petl_kernels.errors import InputError

BACKENDS = ("reference", "cpu", "triton", "cuda")

# What serves an op when nobody asked for a backend by name, first choice first.
DEFAULT_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}
DEFAULT_ORDER_OF = {
    # cuBLAS already runs a frozen linear layer at the speed of the hardware.
    ("frozen_linear", "cuda"): ("reference",),
}

# The specification, and kernels that the same machine has compiled and that no driver or card can change.
UNCHECKED = ("reference", "cpu")

# What an op may have beside its forward kernel.
PARTS = ("_backward", "_from_statistics", "_back", "_begin", "_words", "_end")

_kernels: dict[tuple[str, str], Callable] = {}
_load_errors: dict[str, str | None] = {}
_chosen: dict[tuple[str, torch.device, str, torch.dtype], Callable] = {}
_parity_errors: dict[tuple[str, str, torch.device, torch.dtype], str | None] = {}
_checking: dict[tuple[str, str, torch.device, torch.dtype], threading.Lock] = {}
_warned: set[str] = set()
_active = ""


def register(op: str, backend: str) -> Callable[[Callable], Callable]:
    """Decorator: this callable is ``backend``'s kernel of ``op`` (``"lora_linear"``, ``"lora_linear_backward"``)."""

    def add(kernel: Callable) -> Callable:
        _kernels[op, backend] = kernel
        return kernel

    return add


def load_error(backend: str) -> str | None:
    """Import a backend's kernels once. Returns why they cannot be used on this machine, or None."""
    if backend not in _load_errors:
        _load_errors[backend] = _load(backend)
    return _load_errors[backend]


def _load(backend: str) -> str | None:
    if backend == "triton" and not (torch.cuda.is_available() or triton_interprets()):
        return "no CUDA device"
    try:
        importlib.import_module(f"petl_kernels.backends.{backend}")
    except ImportError as error:
        return str(error).splitlines()[0]
    except AttributeError as error:  # an op that the extension does not have
        return f"the extension was built from other sources: {error}"
    if not any(name == backend for _, name in _kernels):
        return "it registers no kernel"
    return None


def triton_interprets() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU. Its bf16 products are wrong."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available_backends() -> tuple[str, ...]:
    """Names of the backends that this machine can run."""
    return tuple(name for name in BACKENDS if load_error(name) is None)


@contextmanager
def use(name: str) -> Iterator[None]:
    """Serve every op of this block with backend ``name``, for the whole process (autograd has its own threads).

    An op that the backend does not have keeps its default. A backward pass uses the backend of its forward pass.
    Raises InputError for a name that is unknown or that this machine cannot run.
    """
    global _active
    if name not in BACKENDS:
        raise InputError(f"backend {name!r} is unknown: expected one of {', '.join(BACKENDS)}")
    if error := load_error(name):
        raise InputError(
            f"backend {name!r} is not available here ({error}): expected one of {', '.join(available_backends())}"
        )
    before, _active = _active, name
    try:
        yield
    finally:
        _active = before


def active() -> str:
    """The backend that ``use`` asks for, or "" for each op's default."""
    return _active


def kernel_of(op: str, backend: str) -> Callable | None:
    """The callable of one backend, or None when it has none for this op."""
    return _kernels.get((op, backend)) if load_error(backend) is None else None


def serving(op: str, device: torch.device | str) -> tuple[str, ...]:
    """Names of the backends that have kernels of ``op`` and run on ``device``."""
    device = torch.device(device)
    return tuple(name for name in BACKENDS if _serves(name, device) and _has(op, name))


def _has(op: str, backend: str) -> bool:
    return any(kernel_of(f"{op}{part}", backend) is not None for part in ("", *PARTS))


def _family(op: str) -> str:
    return next((op.removesuffix(part) for part in PARTS if op.endswith(part)), op)


class TurnedDown(NamedTuple):
    """Names a backend that computes something else than the reference here, and so does not serve by default."""

    op: str
    backend: str
    device: torch.device
    dtype: torch.dtype
    reason: str

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.backend} {self.op} is not used on {self.device} in {kind}: {self.reason}"


def turned_down() -> list[TurnedDown]:
    """Returns what the checks of this process have turned down, in their order."""
    return [TurnedDown(*key, error) for key, error in list(_parity_errors.items()) if error]


def backend_of(op: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """Name of the backend that serves ``op`` on ``device`` now, for activations of ``dtype``."""
    return _choose(op, resolve(device), _active, dtype)[0]


def dispatch(op: str, device: torch.device, backend: str, dtype: torch.dtype) -> Callable:
    """The kernel of ``op`` for activations of ``dtype`` on ``device``; ``backend``: a name, or "" for the default."""
    key = (op, device, backend, dtype)
    kernel = _chosen.get(key)
    if kernel is None:
        name, for_good = _choose(op, device, backend, dtype)
        kernel = _kernels[op, name]
        if for_good:
            _chosen[key] = kernel
    return kernel


def default_order(op: str, device: torch.device) -> tuple[str, ...]:
    """Returns the backends that may serve ``op`` when none is named, first choice first."""
    return DEFAULT_ORDER_OF.get((_family(op), device.type), DEFAULT_ORDER.get(device.type, ("reference",)))


def _choose(op: str, device: torch.device, backend: str, dtype: torch.dtype) -> tuple[str, bool]:
    """Returns the backend that serves ``op``, and whether it will at the next call too."""
    if backend and kernel_of(op, backend) is not None:
        if not _serves(backend, device):
            raise InputError(f"backend {backend!r} does not run on device {str(device)!r}")
        return backend, True
    for_good = True
    for name in default_order(op, device):
        usable = _usable(op, name, device, dtype)
        if usable:
            return name, for_good
        for_good = for_good and usable is not None
    raise AssertionError(f"{op} has no reference")


def _serves(backend: str, device: torch.device) -> bool:
    if backend == "reference":
        return True
    if backend == "triton" and triton_interprets():
        return True
    return device.type == ("cpu" if backend == "cpu" else "cuda")


def _usable(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> bool | None:
    """Whether ``backend`` may serve ``op``; None while that cannot be found out."""
    if error := load_error(backend):
        _warn_once(f"petl_kernels: backend {backend!r} is not available ({error}); plain PyTorch serves instead")
        return False
    if kernel_of(op, backend) is None:
        return False
    if backend in UNCHECKED:
        return True
    key = (_family(op), backend, device, dtype)
    if key not in _parity_errors and _captures(device):
        # A check waits for the device, which ends a capture; and an unchecked kernel may be wrong. So the reference is
        # captured, and nothing is remembered: the next call outside of a capture makes the check.
        _warn_once(f"petl_kernels: {backend} {key[0]} is not in this CUDA graph: it was not checked before the capture")
        return None
    error = _parity_error(key)
    if error:
        _warn_once(f"petl_kernels: {TurnedDown(*key, error)}")
    return error is None


def _parity_error(key: tuple[str, str, torch.device, torch.dtype]) -> str | None:
    """Checked once for each dtype that comes: on a machine's first run the kernels are compiled for it.

    Threads that come for the same check wait for the first. An error that is raised (out of memory) is the caller's,
    and is not remembered.
    """
    from petl_kernels import parity  # it imports the ops, which import this module

    if key not in _parity_errors:
        with _checking.setdefault(key, threading.Lock()):
            if key not in _parity_errors:
                _parity_errors[key] = parity.check(*key) if key[-1] in parity.DTYPES else None
    return _parity_errors[key]


def _captures(device: torch.device) -> bool:
    """Whether this thread records a CUDA graph now."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=2)
