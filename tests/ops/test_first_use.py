"""A kernel is checked at its first use, wherever that is: inside an op, in a mode, on a thread, while memory is short.

A pretended Triton backend serves the CPU here, and is checked as on a card.
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from petl_kernels import dispatch, ops, parity
from petl_kernels.ops.quantized import STORAGES, quantize
from petl_kernels.planning.peak import Ledger

from . import contract

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
QUANTIZED = ("quantized_project", "quantized_project_back")


class NoFunction(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"seen: {function}")


class NoOperation(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"seen: {function}")


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(FP32)


@contextlib.contextmanager
def default_device(device: str):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES = {
    "plain": contextlib.nullcontext,
    "below autograd": torch._C._AutoDispatchBelowAutograd,
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", BF16),
    "fake tensors": FakeTensorMode,
    "a function mode": NoFunction,
    "a dispatch mode": NoOperation,
    "no subclasses": torch._C.DisableTorchFunctionSubclass,
    "a default device": lambda: default_device("meta"),
    "a device block": lambda: torch.device("meta"),
    "a default dtype": lambda: default_dtype(torch.float64),
    "another default dtype": lambda: default_dtype(BF16),
    "deterministic": deterministic,
}
OPS = ("lora_linear", "attention", "linear_cross_entropy", "bottleneck_adapter", "quantize_nf4", "quantized_project")


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("op", OPS)
def test_the_check_works_in_every_state(op, state):
    with STATES[state]():
        error = parity.check(op, contract.BACKENDS[-1], "cpu", FP32)
    assert error is None


@pytest.mark.parametrize("state", ["plain", "below autograd", "inference mode", "autocast", "a device block"])
def test_the_check_leaves_generators_and_the_ledger_alone(state):
    random = torch.get_rng_state()
    with Ledger([]) as ledger, STATES[state]():
        for op in OPS:
            parity.check(op, "reference", "cpu", BF16)
    assert ledger.live == ledger.peak == 0 and torch.equal(torch.get_rng_state(), random)


def test_the_check_works_while_a_graph_is_traced_and_under_vmap():
    found = []

    def function(x):
        found.append(parity.check("lora_linear", "reference", "cpu", FP32))
        return x + 1

    torch.compile(function, backend="eager")(torch.ones(3))
    torch.func.vmap(function)(torch.ones(3))
    assert found == [None, None]


# ---- the router -----------------------------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch):
    """The CPU as a card. ``card(op, ...)`` gives it a "triton" backend that is checked, and returns what was called."""
    for name in ("_kernels", "_load_errors"):
        monkeypatch.setattr(dispatch, name, dict(getattr(dispatch, name)))
    for name, fresh in (("_chosen", {}), ("_parity_errors", {}), ("_checking", {}), ("_warned", set())):
        monkeypatch.setattr(dispatch, name, fresh)
    monkeypatch.setattr(dispatch, "DEFAULT_ORDER", {"cpu": ("triton", "reference")})
    dispatch._load_errors["triton"] = None
    for key in [key for key in dispatch._kernels if key[1] == "triton"]:
        del dispatch._kernels[key]

    def serve(*names: str, spoil=lambda value: value) -> list[str]:
        calls = []

        def pretended(name):
            kernel = dispatch.kernel_of(name, "reference")

            def call(*args):
                if threading.current_thread().name != "petl-parity":
                    calls.append(name)
                return spoil(kernel(*args))

            return call

        for name in names:
            dispatch.register(name, "triton")(pretended(name))
        return calls

    return serve


FIRST_USES = {
    "plain": contextlib.nullcontext,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", BF16),
    "a ledger": lambda: Ledger([]),
    "deterministic": deterministic,
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("state", FIRST_USES)
@pytest.mark.parametrize("storage", STORAGES)
def test_a_product_with_a_quantized_weight_has_its_kernels_from_the_first_on(card, storage, state, compiled):
    """It is first used below autograd, in the handler of a tensor subclass."""
    calls, backward = card(*QUANTIZED), state != "inference mode"
    weight = quantize(torch.randn(40, 72), storage)
    x = torch.randn(5, 72, requires_grad=backward)
    product = torch.compile(F.linear, backend="aot_eager") if compiled else F.linear
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="petl_kernels")
        with FIRST_USES[state]():
            y = product(x, weight)
        if backward:
            y.sum().backward()
    assert calls == list(QUANTIZED[: 1 + backward]) and dispatch.turned_down() == []


def test_a_first_use_in_another_thread(card):
    calls = card(*QUANTIZED)
    x, weight = torch.randn(5, 72, requires_grad=True), quantize(torch.randn(40, 72), "nf4")
    thread = threading.Thread(target=lambda: F.linear(x, weight).sum().backward())
    thread.start()
    thread.join()
    assert calls == list(QUANTIZED) and x.grad is not None


def test_several_threads_make_one_check(card, monkeypatch):
    card("rms_norm")
    asked = []

    def check(*key):
        asked.append(key)
        time.sleep(0.2)

    monkeypatch.setattr(parity, "check", check)
    served = []
    threads = [threading.Thread(target=lambda: served.append(ops.backend_of("rms_norm", "cpu"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert served == ["triton"] * 8 and asked == [("rms_norm", "triton", CPU, FP32)]


def test_what_a_check_turns_down_is_listed_once(card):
    card("rms_norm", spoil=lambda value: (value[0] * 1.05, value[1]))
    x, weight = torch.randn(4, 72), torch.ones(72)
    with pytest.warns(UserWarning, match="triton rms_norm is not used on cpu in float32: _rms: y is off by") as told:
        for _ in range(2):
            ops.rms_norm(x, weight, 1e-6)
    (only,) = dispatch.turned_down()
    assert len(told) == 1 and only[:4] == ("rms_norm", "triton", CPU, FP32)
    assert str(only).startswith("triton rms_norm is not used on cpu in float32: _rms: y is off by 0.")


@pytest.mark.parametrize(
    "problem",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        MemoryError(),
    ],
    ids=["allocator", "cublas", "triton", "host"],
)
def test_memory_that_is_short_is_the_callers_and_says_nothing_of_the_kernel(card, problem):
    """It is raised as the op's own would be, so that a run with a budget takes a smaller plan."""
    short = [True]

    def spoil(value):
        if short[0]:
            raise problem
        return value

    calls = card("rms_norm", spoil=spoil)
    x, weight = torch.randn(4, 72), torch.ones(72)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match=f"checking triton rms_norm: {type(problem).__name__}"):
            ops.rms_norm(x, weight, 1e-6)
    short[0] = False
    ops.rms_norm(x, weight, 1e-6)
    assert calls == ["rms_norm"] and dispatch.turned_down() == []


def test_in_a_capture_nothing_is_checked_and_the_reference_serves(card, monkeypatch):
    calls, asked, captures = card("rms_norm", "layer_norm"), [], [False]
    monkeypatch.setattr(parity, "check", lambda *key: asked.append(key[0]))
    monkeypatch.setattr(dispatch, "_captures", lambda device: captures[0])
    x, weight = torch.randn(4, 72), torch.ones(72)
    ops.layer_norm(x, weight, weight, 1e-5)
    captures[0] = True
    with pytest.warns(UserWarning, match="triton rms_norm is not in this CUDA graph: it was not checked") as told:
        for _ in range(2):
            ops.rms_norm(x, weight, 1e-6)
            ops.layer_norm(x, weight, weight, 1e-5)  # checked before, and so in the graph
    assert len(told) == 1 and asked == ["layer_norm"] and calls == ["layer_norm"] * 3
    captures[0] = False
    ops.rms_norm(x, weight, 1e-6)
    assert asked == ["layer_norm", "rms_norm"] and calls == ["layer_norm"] * 3 + ["rms_norm"]
    captures[0] = True
    ops.rms_norm(x, weight, 1e-6)
    assert calls[-2:] == ["rms_norm"] * 2 and dispatch.turned_down() == []


def test_a_capture_is_that_of_the_current_stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert dispatch._captures(torch.device("cuda", 0)) and not dispatch._captures(CPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not dispatch._captures(torch.device("cuda", 0))


@pytest.mark.parametrize("op", ops.OPS)
@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_no_check_waits_for_itself(op, backend, monkeypatch):
    """A check may use other ops by default, and make their checks; never its own, which it would wait for."""
    used, choose = [], dispatch._choose
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(dispatch, "_choose", lambda *given: used.append(dispatch.op_of(given[0])) or choose(*given))
    assert parity.check(op, backend, "cpu", FP32) is None
    assert op not in used
