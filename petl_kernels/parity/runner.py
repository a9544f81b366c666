"""Compares a backend's kernels with the reference on an op's cases, in a thread whose state is PyTorch's default."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future

import torch

import petl_kernels.dispatch as dispatch
from petl_kernels.device import resolve
from petl_kernels.ops import OPS
from petl_kernels.ops.cases import CASES as OP_CASES
from petl_kernels.ops.cases.case import Values, in_float64
from petl_kernels.parity.criterion import compare_tensors

# The dtypes that kernels are checked in, the one that a card uses first in front.
DTYPES = (torch.bfloat16, torch.float32, torch.float16)

# Op -> its cases: functions of (device, dtype) that return arguments by name. In the order of OPS.
CASES = {op: OP_CASES[op].inputs for op in OPS}


def table(device: torch.device | str | None = None) -> list[tuple[str, str, str, str, bool]]:
    """Returns rows (op, backend, dtype, "pass" or the error, whether the backend serves by default) for one device."""
    device = resolve(device)
    rows = []
    for op in OPS:
        for backend in dispatch.serving(op, device):
            for dtype in checked_dtypes(backend, device):
                error = check(op, backend, device, dtype)
                default = backend == dispatch.backend_of(op, device, dtype)
                rows.append((op, backend, str(dtype).removeprefix("torch."), error or "pass", default))
    return rows


def checked_dtypes(backend: str, device: torch.device) -> tuple[torch.dtype, ...]:
    """Returns the DTYPES in which ``backend`` has kernels of its own for ``device`` on this machine."""
    dtypes = [dtype for dtype in DTYPES if dispatch.lacking(backend, device, dtype) is None]
    interpreted = backend == "triton" and dispatch.triton_interprets()
    return tuple(dtype for dtype in dtypes if not (interpreted and dtype == torch.bfloat16))


def check(op: str, backend: str, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Compares one backend, forward and backward, with the reference on an op's cases; returns None or the first error.

    It may be called anywhere but in the capture of a CUDA graph: below autograd, in a tensor subclass's handler, under
    autocast, ``inference_mode``, FakeTensorMode or any other mode, on a stream of the caller's. All of these belong to
    a thread, so the check runs in one of its own, whose state is PyTorch's default, on inputs from a generator of its
    own. Settings of the process hold there too: precision of products, deterministic algorithms. The few megabytes that
    it allocates count where the allocator counts. Products of another thread may allocate one more workspace of cuBLAS
    (32 MiB on Hopper, 8 MiB elsewhere), which PyTorch keeps for the next thread that multiplies.

    Raises torch.OutOfMemoryError where memory is short, which is no fault of the backend.
    """
    return _in_new_thread(_first_error, op, backend, device, dtype)


def _in_new_thread(function: Callable, *args):
    outcome = Future()

    def work() -> None:
        try:
            outcome.set_result(function(*args))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, name="petl-parity", daemon=True).start()
    return outcome.result()


def _first_error(op: str, backend: str, device: torch.device | str, dtype: torch.dtype) -> str | None:
    errors = (check_case(op, backend, device, dtype, case) for case in CASES[op])
    return next((error for error in errors if error), None)


def check_case(
    op: str, backend: str, device: torch.device | str, dtype: torch.dtype, case: Callable[..., dict]
) -> str | None:
    """Compares on one of the ``CASES`` of ``op``, in the state of this thread; returns None or the first error."""
    device = torch.device(device)
    try:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            error = compare(op, backend, case(device, dtype))
    except Exception as problem:  # a kernel that cannot even run must not stop the caller
        lines = str(problem).splitlines()
        error = f"{type(problem).__name__}: {lines[0] if lines else ''}"
        if _is_out_of_memory(problem):
            raise torch.OutOfMemoryError(f"checking {backend} {op}: {error}") from problem
    return f"{case.__name__}: {error}" if error else None


def _is_out_of_memory(problem: Exception) -> bool:
    """Returns whether memory was short: cuBLAS, Triton and the driver raise errors of other types then."""
    words = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    return isinstance(problem, (torch.OutOfMemoryError, MemoryError)) or any(word in str(problem) for word in words)


def compare(op: str, backend: str, arguments: dict) -> str | None:
    """Holds every value and gradient of one call to the criterion; returns None or the first error."""
    exact = run(op, "reference", in_float64(arguments))
    reference = run(op, "reference", arguments)
    computed = run(op, backend, arguments)
    for name, value in exact.items():
        additions = most_additions(op, name, arguments)
        if error := compare_tensors(name, computed[name], reference[name], value, additions):
            return error
    return None


def most_additions(op: str, value: str, arguments: dict) -> int:
    """Returns the most additions behind one element of ``value`` of ``op``, nested sums together; 0 where none are."""
    return OP_CASES[op].additions(value, arguments)


@torch.no_grad()
def run(op: str, backend: str, arguments: dict) -> Values:
    """Returns the outputs and all gradients of one op by name, straight from a backend's kernels.

    The reference's kernels stand in for those that the backend does not have.
    """

    def kernel(name: str) -> Callable:
        found = dispatch.kernel_of(name, backend) or dispatch.kernel_of(name, "reference")
        assert found is not None, f"{name} has no reference"
        return found

    return OP_CASES[op].run(kernel, arguments)
