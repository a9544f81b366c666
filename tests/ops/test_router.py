"""Which backend serves an op: by name, by default, after a failed check, without the extension."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings

import pytest
import torch

from petl_kernels import dispatch, ops, parity
from petl_kernels.errors import InputError
from petl_kernels.ops import cases

from . import contract

CUDA = torch.device("cuda", 0)
needs_extension = pytest.mark.skipif("cpu" not in contract.BACKENDS, reason="the extension is not built")


@pytest.fixture
def router(monkeypatch):
    """A router whose state is put back, with a pretended Triton backend of lora_linear alone."""
    for name in ("_kernels", "_load_errors"):
        monkeypatch.setattr(dispatch, name, dict(getattr(dispatch, name)))
    for name, fresh in (("_chosen", {}), ("_parity_errors", {}), ("_warned", set())):
        monkeypatch.setattr(dispatch, name, fresh)
    dispatch._load_errors["triton"] = None
    for key in [key for key in dispatch._kernels if key[1] == "triton"]:
        del dispatch._kernels[key]
    for op in ("lora_linear", "lora_linear_backward"):
        dispatch.register(op, "triton")(dispatch.kernel_of(op, "reference"))
    return dispatch


def test_names():
    assert set(ops.OPS) == set(parity.CASES) == set(cases.CASES)
    assert {dispatch.op_of(name) for name in dispatch.registered("reference")} == {*ops.OPS, "product"}
    assert "reference" in ops.available_backends()
    assert set(ops.available_backends()) <= set(dispatch.BACKENDS)


@needs_extension
def test_the_extension_serves_the_cpu_by_default():
    plain = [op for op in ops.OPS if ops.backend_of(op, "cpu") != "cpu"]
    assert plain == list(contract.FOR_CARDS) and ops.backend_of(plain[0], "cpu") == "reference"


def test_use_is_for_a_block():
    before = ops.backend_of("lora_linear", "cpu")
    with ops.use("reference"):
        assert ops.backend_of("lora_linear", "cpu") == "reference"
        with pytest.raises(RuntimeError), ops.use(contract.BACKENDS[-1]):
            assert ops.backend_of("lora_linear", "cpu") == contract.BACKENDS[-1]
            raise RuntimeError
        assert ops.backend_of("lora_linear", "cpu") == "reference"
    assert ops.backend_of("lora_linear", "cpu") == before


def test_use_holds_in_other_threads():
    names = []
    with ops.use("reference"):
        thread = threading.Thread(target=lambda: names.append(ops.backend_of("lora_linear", "cpu")))
        thread.start()
        thread.join()
    assert names == ["reference"]


def test_use_refuses_an_unknown_name():
    with pytest.raises(InputError, match="backend 'tritron' is unknown: expected one of reference, cpu, triton, cuda"):
        with ops.use("tritron"):
            pass


def test_use_refuses_what_is_not_here(router):
    router._load_errors["cuda"] = "the extension was built without CUDA"
    with pytest.raises(InputError, match=r"'cuda' is not available here \(the extension was built without CUDA\)"):
        with ops.use("cuda"):
            pass


def test_a_backend_on_the_wrong_device_is_refused(router, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.ones(2, 3)
    with ops.use("triton"), pytest.raises(InputError, match="backend 'triton' does not run on device 'cpu'"):
        ops.lora_linear(x, torch.ones(4, 3), None, torch.ones(2, 3), torch.ones(4, 2), 1.0)


def test_an_op_that_the_backend_lacks_keeps_its_default(router, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with ops.use("triton"):
        assert ops.backend_of("frozen_linear", "cpu") == contract.BACKENDS[-1]
        assert ops.frozen_linear(torch.ones(2, 3), torch.ones(4, 3)).shape == (2, 4)


def test_backward_uses_the_backend_of_forward(router):
    seen = []
    for op in ("lora_linear", "lora_linear_backward"):
        kernel = router.kernel_of(op, "reference")
        router._kernels[op, "reference"] = lambda *args, op=op, kernel=kernel: seen.append(op) or kernel(*args)
    a = torch.ones(2, 3, requires_grad=True)
    with ops.use("reference"):
        y = ops.lora_linear(torch.ones(2, 3), torch.ones(4, 3), None, a, torch.ones(4, 2), 1.0)
    y.sum().backward()
    assert seen == ["lora_linear", "lora_linear_backward"]


def test_on_cuda_a_backend_is_taken_when_the_check_passes(router, monkeypatch):
    asked = []
    monkeypatch.setattr(parity, "check", lambda *args: asked.append(args))
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert router.backend_of("lora_linear", CUDA, dtype) == "triton"
        assert router.backend_of("lora_linear_backward", CUDA, dtype) == "triton"
        assert router.backend_of("frozen_linear", CUDA, dtype) == "reference"
        # the pretended backend has no such op
        assert router.backend_of("bottleneck_adapter", CUDA, dtype) == "reference"
    # once for both directions, and not for a dtype that Triton's kernels hand on
    assert asked == [("lora_linear", "triton", CUDA, dtype) for dtype in (torch.bfloat16, torch.float32)]


def test_on_cuda_a_backend_that_fails_the_check_is_left_out_with_one_warning(router, monkeypatch):
    def check(op, backend, device, dtype):
        return "y0 is off by 1, allowed 0.1" if dtype == torch.bfloat16 else None

    monkeypatch.setattr(parity, "check", check)
    expected = "triton lora_linear is not used on cuda:0 in bfloat16: y0 is off by 1"
    with pytest.warns(UserWarning, match=expected) as record:
        assert router.backend_of("lora_linear", CUDA, torch.bfloat16) == "reference"
        assert router.backend_of("lora_linear_backward", CUDA, torch.bfloat16) == "reference"
    assert len(record) == 1
    assert router.backend_of("lora_linear", CUDA, torch.float16) == "triton"


def test_a_backend_that_chooses_by_timing_serves_only_by_name(router):
    for op in ("frozen_ffn", "frozen_ffn_backward"):
        assert router.default_order(op, torch.device("cuda")) == ("triton", "reference")


def test_no_check_and_no_warning_on_the_cpu(monkeypatch):
    monkeypatch.setattr(parity, "check", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.backend_of("lora_linear", torch.device("cpu"), torch.float32) == "cpu"


WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["petl_kernels._C"] = None
import torch
from petl_kernels import ops
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x = torch.ones(2, 3, requires_grad=True)
    for _ in range(2):
        ops.frozen_linear(x, torch.ones(4, 3)).sum().backward()
        ops.lora_linear(x, torch.ones(4, 3), None, torch.ones(2, 3), torch.ones(4, 2), 1.0).sum().backward()
print(ops.backend_of("lora_linear", "cpu"), ops.available_backends()[0], "cpu" in ops.available_backends())
print(*[str(w.message) for w in caught if "petl_kernels" in str(w.message)], sep="\\n")
"""


@pytest.mark.slow
def test_without_the_extension_the_reference_serves_and_says_so_once():
    run = subprocess.run([sys.executable, "-c", WITHOUT_EXTENSION], capture_output=True, text=True, check=True)
    served, *messages = run.stdout.splitlines()
    assert served == "reference reference False"
    assert len(messages) == 1 and "backend 'cpu' is not available" in messages[0] and "compiler" in messages[0]


OLD_PROCESSOR = """
import torch
torch.backends.cpu.get_cpu_capability = lambda: "DEFAULT"
from petl_kernels import dispatch
print(dispatch.load_error("cpu"))
"""


@pytest.mark.slow
@pytest.mark.skipif("__import__('platform').machine() != 'x86_64'")
def test_a_processor_without_avx2_does_not_load_the_extension():
    run = subprocess.run([sys.executable, "-c", OLD_PROCESSOR], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "this processor has no AVX2"
