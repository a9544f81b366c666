"""Which kernel serves an op: a table of callables and the router that picks one.

A backend is a module in this package that registers callables with ``@register(op, backend)``. It is imported
when it is first needed. Adding one touches no op and no caller.

    reference   plain PyTorch, any device and dtype: the executable specification
    cpu         C++ kernels of the extension (``csrc/cpu``)
    triton      Triton kernels, on CUDA devices (and on the CPU under ``TRITON_INTERPRET=1``)
    cuda        CUDA C++ kernels of the extension (``csrc/cuda``), by ``use("cuda")`` and to quantise weights

On a CUDA device a backend other than the reference becomes the default of an op only after a small comparison
with the reference has passed on that device, once per process (``petl_kernels/parity.py``).
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from petl_kernels.errors import InputError

BACKENDS = ("reference", "cpu", "triton", "cuda")

# What serves an op when nobody asked for a backend by name, first choice first.
DEFAULT_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}
DEFAULT_ORDER_OF = {
    # cuBLAS already runs a frozen linear layer at the speed of the hardware.
    ("frozen_linear", "cuda"): ("reference",),
    # Passes over bytes and bits, which Triton has no kernels for.
    ("quantise_int8", "cuda"): ("cuda", "reference"),
    ("quantise_nf4", "cuda"): ("cuda", "reference"),
}

# What an op may have beside its forward kernel.
PARTS = ("_backward", "_from_statistics", "_back")

_kernels: dict[tuple[str, str], Callable] = {}
_load_errors: dict[str, str | None] = {}
_chosen: dict[tuple[str, torch.device, str, torch.dtype], Callable] = {}
_parity_errors: dict[tuple[str, str, torch.device, torch.dtype], str | None] = {}
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
        importlib.import_module(f"{__name__}.{backend}")
    except ImportError as error:
        return str(error).splitlines()[0]
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


def backend_of(op: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """Name of the backend that serves ``op`` on ``device`` now, for activations of ``dtype``."""
    return _choose(op, _indexed(torch.device(device)), _active, dtype)


def dispatch(op: str, device: torch.device, backend: str, dtype: torch.dtype) -> Callable:
    """The kernel of ``op`` for activations of ``dtype`` on ``device``; ``backend``: a name, or "" for the default."""
    key = (op, device, backend, dtype)
    kernel = _chosen.get(key)
    if kernel is None:
        kernel = _chosen[key] = _kernels[op, _choose(op, device, backend, dtype)]
    return kernel


def _choose(op: str, device: torch.device, backend: str, dtype: torch.dtype) -> str:
    if backend and kernel_of(op, backend) is not None:
        if not _serves(backend, device):
            raise InputError(f"backend {backend!r} does not run on device {str(device)!r}")
        return backend
    family = _family(op)
    order = DEFAULT_ORDER_OF.get((family, device.type), DEFAULT_ORDER.get(device.type, ("reference",)))
    return next(name for name in order if _usable(family, op, name, device, dtype))


def _serves(backend: str, device: torch.device) -> bool:
    if backend == "reference":
        return True
    if backend == "triton" and triton_interprets():
        return True
    return device.type == ("cpu" if backend == "cpu" else "cuda")


def _usable(family: str, op: str, backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    if error := load_error(backend):
        _warn_once(f"petl_kernels: backend {backend!r} is not available ({error}); plain PyTorch serves instead")
        return False
    if kernel_of(op, backend) is None:
        return False
    if backend == "reference" or device.type == "cpu":
        return True
    error = _parity_error(family, backend, device, dtype)
    if error:
        kind = str(dtype).removeprefix("torch.")
        _warn_once(f"petl_kernels: {backend} {family} is not used on {device} in {kind}: {error}")
    return error is None


def _parity_error(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Checked once for each dtype that comes: on a machine's first run the kernels are compiled for it."""
    from petl_kernels import parity  # it imports the ops, which import this module

    key = (op, backend, device, dtype)
    if key not in _parity_errors:
        _parity_errors[key] = parity.check(op, backend, device, dtype) if dtype in parity.DTYPES else None
    return _parity_errors[key]


def _indexed(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=2)
