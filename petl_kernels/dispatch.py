"""Which kernel serves an op: a table of callables and the router that picks one.

A backend is a module of ``petl_kernels/backends`` that registers callables with ``@register(name, backend)``. It is
imported by its name when it is first needed. Adding one touches no op and no caller.

    reference   plain PyTorch, any device and dtype: the executable specification
    cpu         C++ kernels of the extension (``csrc/cpu``)
    triton      Triton kernels, on CUDA devices (and on the CPU under ``TRITON_INTERPRET=1``)
    cuda        CUDA C++ of the extension (``csrc/cuda``), by ``use("cuda")``: feed-forward blocks on cuBLASLt

On a CUDA device a backend other than the reference becomes the default of an op only after a small comparison
with the reference has passed on that device, once per process. ``petl_kernels/backends/__init__.py`` hands that
comparison in (``check_first_use_with``), since this module lies below the ops and imports none of them.
``turned_down`` lists the backends that have failed theirs, or whose dtype the card lacks (``lacking``). While a
CUDA graph is captured nothing is compared.
"""

from __future__ import annotations

import importlib
import os
import threading
import warnings
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch

import petl_kernels.cards as cards
from petl_kernels.device import resolve
from petl_kernels.errors import InputError

BACKENDS = ("reference", "cpu", "triton", "cuda")

# The backends that may serve an op when none is named, first choice first. ``prefer`` sets another order for one op.
DEFAULT_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}

# The specification, and kernels that the same machine has compiled and that no driver or card can change.
UNCHECKED = ("reference", "cpu")

# A backend's callable; each has the arguments of its op.
Kernel = Callable[..., Any]
_K = TypeVar("_K", bound=Kernel)

# A check of a backend's op on a device in a dtype. It returns None or the first error.
Check = Callable[[str, str, torch.device, torch.dtype], str | None]

_kernels: dict[tuple[str, str], Kernel] = {}
_op_of: dict[str, str] = {}
_room_dtypes: dict[Kernel, Collection[torch.dtype]] = {}
_orders: dict[tuple[str, str], tuple[str, ...]] = {}
_first_use_check: Check | None = None
_load_errors: dict[str, str | None] = {}
_chosen: dict[tuple[str, torch.device, str, torch.dtype], Kernel] = {}
_parity_errors: dict[tuple[str, str, torch.device, torch.dtype], str | None] = {}
_checking: dict[tuple[str, str, torch.device, torch.dtype], threading.Lock] = {}
_warned: set[str] = set()
_active = ""


def register(
    name: str, backend: str, op: str | None = None, room_dtypes: Collection[torch.dtype] = ()
) -> Callable[[_K], _K]:
    """Returns a decorator that makes a callable ``backend``'s kernel ``name``.

    ``op``: the op that the kernel belongs to, where ``name`` is neither the op's own nor that with "_backward" behind
    it; the reference's kernel gives it, and other backends need not. ``room_dtypes``: the dtypes of activations in
    which the kernel takes one argument more and writes its rows where that tells (``ops/room.py``).
    """

    def add(kernel: _K) -> _K:
        _kernels[name, backend] = kernel
        if op is not None:
            _op_of[name] = op
        if room_dtypes:
            _room_dtypes[kernel] = room_dtypes
        return kernel

    return add


def op_of(name: str) -> str:
    """Returns the op that the kernel ``name`` belongs to: "layer_norm" for "layer_norm_backward"."""
    return _op_of.get(name, name.removesuffix("_backward"))


def takes_room(kernel: Kernel, dtype: torch.dtype) -> bool:
    """Returns whether ``kernel`` takes the argument more that ``register`` describes, for activations of ``dtype``."""
    return dtype in _room_dtypes.get(kernel, ())


def registered(backend: str) -> list[str]:
    """Returns the names of the kernels that ``backend`` has registered so far."""
    return [name for name, owner in list(_kernels) if owner == backend]


def prefer(op: str, device_type: str, *backends: str) -> None:
    """Sets the backends that may serve ``op`` on ``device_type`` when none is named, first choice first."""
    _orders[op, device_type] = backends


def check_first_use_with(check: Check) -> None:
    """Sets the comparison that a backend has to pass before it serves an op by default."""
    global _first_use_check
    _first_use_check = check


def load_error(backend: str) -> str | None:
    """Imports a backend's kernels once. Returns the reason why this machine cannot run them, or None."""
    if backend not in _load_errors:
        _load_errors[backend] = _load(backend)
    return _load_errors[backend]


def _load(backend: str) -> str | None:
    if backend == "triton" and not (torch.cuda.is_available() or triton_interprets()):
        return "no CUDA device"
    if backend == "triton" and torch.version.hip and not triton_interprets():
        return "ROCm: the kernels compile for AMD's cards, and none has been compared with the reference on one"
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
    """Returns whether Triton's kernels run in its interpreter, on the CPU. Its bf16 products are wrong."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available_backends() -> tuple[str, ...]:
    """Returns the names of the backends that this machine can run."""
    return tuple(name for name in BACKENDS if load_error(name) is None)


@contextmanager
def use(name: str) -> Generator[None]:
    """Serves every op of this block with backend ``name``, in the whole process (autograd has threads of its own).

    An op that the backend does not have, or not in this dtype on this card (``lacking``), keeps its default. A backward
    pass uses the backend of its forward pass.
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
    """Returns the backend that ``use`` has set, or "" for each op's default."""
    return _active


def kernel_of(op: str, backend: str) -> Kernel | None:
    """Returns the kernel ``op`` of one backend, or None where it has none or this machine cannot run it."""
    return _kernels.get((op, backend)) if load_error(backend) is None else None


def serving(op: str, device: torch.device | str) -> tuple[str, ...]:
    """Returns the names of the backends that have kernels of ``op`` and run on ``device``."""
    device = torch.device(device)
    return tuple(name for name in BACKENDS if _serves(name, device) and _has(op, name))


def _has(op: str, backend: str) -> bool:
    return load_error(backend) is None and any(op_of(name) == op for name in registered(backend))


def lacking(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns why no kernel of ``backend`` may serve activations of ``dtype`` on ``device``, or None.

    Plain PyTorch serves there: on cards without bf16 it computes bf16 products in fp32.
    """
    if backend in UNCHECKED or dtype != torch.bfloat16 or device.type != "cuda" or not torch.cuda.is_available():
        return None
    return cards.without_bf16(device)


class TurnedDown(NamedTuple):
    """A backend that does not serve by default here: it is off from the reference, or the card lacks the dtype."""

    op: str
    backend: str
    device: torch.device
    dtype: torch.dtype
    reason: str

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.backend} {self.op} is not used on {self.device} in {kind}: {self.reason}"


def turned_down() -> list[TurnedDown]:
    """Returns the backends that this process has turned down so far, in that order."""
    return [TurnedDown(*key, error) for key, error in list(_parity_errors.items()) if error]


def backend_of(op: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """Returns the name of the backend that serves ``op`` on ``device`` now, for activations of ``dtype``."""
    return _choose(op, resolve(device), _active, dtype)[0]


def dispatch(op: str, device: torch.device, backend: str, dtype: torch.dtype) -> Kernel:
    """Returns the kernel ``op`` for activations of ``dtype`` on ``device``; ``backend``: a name, or "" for the default.

    Raises InputError: a named backend that has the kernel and does not run on ``device``.
    """
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
    return _orders.get((op_of(op), device.type), DEFAULT_ORDER.get(device.type, ("reference",)))


def _choose(op: str, device: torch.device, backend: str, dtype: torch.dtype) -> tuple[str, bool]:
    """Returns the backend that serves ``op``, and whether the choice may be remembered."""
    if backend and kernel_of(op, backend) is not None:
        if not _serves(backend, device):
            raise InputError(f"backend {backend!r} does not run on device {str(device)!r}")
        if lacking(backend, device, dtype) is None:
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
    """Returns whether ``backend`` may serve ``op``; None while a capture keeps it from being checked."""
    if error := load_error(backend):
        _warn_once(f"petl_kernels: backend {backend!r} is not available ({error}); plain PyTorch serves instead")
        return False
    if kernel_of(op, backend) is None:
        return False
    if backend in UNCHECKED:
        return True
    key = (op_of(op), backend, device, dtype)
    if reason := lacking(backend, device, dtype):
        _parity_errors[key] = reason
        kind = str(dtype).removeprefix("torch.")
        _warn_once(f"petl_kernels: {backend} is not used on {device} in {kind}: {reason}; plain PyTorch serves instead")
        return False
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
    """Returns the error of the check of (op, backend, device, dtype), which is made once.

    Each dtype has a check of its own, since on a machine's first run the kernels are compiled for it then. Threads that
    need the same check wait for the first. An error that is raised (out of memory) reaches the caller, and the next use
    checks again.
    """
    assert _first_use_check is not None, "petl_kernels.backends hands the check in when it is imported"
    if key not in _parity_errors:
        with _checking.setdefault(key, threading.Lock()):
            if key not in _parity_errors:
                _parity_errors[key] = _first_use_check(*key)
    return _parity_errors[key]


def _captures(device: torch.device) -> bool:
    """Returns whether this thread records a CUDA graph now."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=2)
