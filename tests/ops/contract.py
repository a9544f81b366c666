"""The op contract, as functions over any op and backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from petl_kernels import dispatch, parity
from petl_kernels.accounting.saved import saved_bytes

CPU = torch.device("cpu")
BACKENDS = [name for name in ("reference", "cpu") if dispatch.load_error(name) is None]
# The backends for ``assert_parity``. The reference is compared with itself, and runs beside that of the kernels, too.
HELD = BACKENDS if BACKENDS == ["reference"] else [*BACKENDS[1:], pytest.param("reference", marks=pytest.mark.repeat)]
# Ops that have no C++ kernel: no layer runs them on a CPU unless a test forces it, or plain PyTorch serves.
FOR_CARDS = ("lora_border", "capped_attention")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def source(dtype: torch.dtype, seed: int = 0) -> parity.Source:
    return parity.Source(CPU, dtype, seed)


def assert_parity(op: str, backend: str, arguments: dict) -> None:
    """Every value and gradient within twice the reference's own error against float64."""
    error = parity.compare(op, backend, arguments)
    assert error is None, error


def assert_deterministic(op: str, backend: str, arguments: dict, threads: tuple[int, int] = (2, 2)) -> None:
    """Bitwise equal values and gradients in two runs, which may use different numbers of threads."""
    before = torch.get_num_threads()
    try:
        runs = []
        for count in threads:
            torch.set_num_threads(count)
            runs.append(parity.run(op, backend, arguments))
    finally:
        torch.set_num_threads(before)
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), f"{name} differs between runs"


def gradients(function: Callable[..., Tensor], leaves: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """The output of ``function(**leaves)`` and the gradient of every leaf, by name."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    y = function(**leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def assert_close_by_name(computed: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert computed.keys() == expected.keys()
    for name, value in expected.items():
        assert computed[name].shape == value.shape, name
        error = (computed[name].double() - value.double()).abs().max().item()
        assert error <= tolerance * (1 + value.abs().max().item()), f"{name} is off by {error:.3g}"


def bytes_saved(function: Callable[[], Tensor], exclude: list[Tensor]) -> int:
    with saved_bytes(exclude=exclude) as saved:
        y = function()  # alive until the count is read
    total = saved.bytes
    del y
    return total


def assert_compiles(function: Callable, *inputs: Tensor, tolerance: float = 1e-6) -> None:
    """One graph, and the same output and input gradients as without compilation."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        y = call(*leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=tolerance, atol=tolerance)


def opcheck(op: Callable, arguments: tuple) -> None:
    """Runs all of PyTorch's checks with one backend, and with others those of what a kernel gives."""
    first, *others = BACKENDS
    torch.library.opcheck(op, (*arguments, first))
    for backend in others:
        torch.library.opcheck(op, (*arguments, backend), test_utils=("test_schema", "test_faketensor"))
