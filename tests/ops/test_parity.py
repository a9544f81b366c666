"""The check itself: it passes right kernels and fails wrong ones, by the name of what is wrong."""

from __future__ import annotations

import pytest
import torch

from petl_kernels import backends, ops, parity

from . import contract


@pytest.mark.parametrize("op", ops.OPS)
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_backends_pass(op, backend, dtype):
    assert parity.check(op, backend, "cpu", dtype) is None


def test_table(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rows = parity.table("cpu")
    assert {row[:3] for row in rows} == {
        (op, backend, dtype)
        for op in ops.OPS
        for backend in contract.BACKENDS
        for dtype in ("float32", "bfloat16", "float16")
    }
    assert {row[3] for row in rows} == {"pass"}
    assert {row[1] for row in rows if row[4]} == {contract.BACKENDS[-1]}


@pytest.fixture
def broken(monkeypatch):
    """Break one output of one of the reference's kernels, for a backend named cpu."""

    def break_output(op: str, position: int, spoil):
        kernel = backends.kernel_of(op, "reference")

        def spoiled(*args):
            results = list(kernel(*args)) if isinstance(kernel(*args), tuple) else [kernel(*args)]
            results[position] = spoil(results[position])
            return tuple(results) if len(results) > 1 else results[0]

        monkeypatch.setattr(backends, "_kernels", backends._kernels | {(op, "cpu"): spoiled})
        monkeypatch.setitem(backends._load_errors, "cpu", None)

    return break_output


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("op", "position", "name"),
    [
        ("frozen_linear", 0, "y"),
        ("frozen_linear_backward", 0, "dx"),
        ("frozen_linear_backward", 1, "dbias"),
        ("lora_linear", 1, "s"),
        ("lora_linear_backward", 0, "dx"),
        ("bottleneck_adapter", 0, "y"),
        ("bottleneck_adapter_backward", 0, "dx"),
        ("bottleneck_adapter_backward", 1, "dln_weight"),
        ("bottleneck_adapter_backward", 2, "dln_bias"),
        ("bottleneck_adapter_backward", 3, "ddown"),
        ("bottleneck_adapter_backward", 4, "ddown_bias"),
        ("bottleneck_adapter_backward", 5, "dup"),
        ("bottleneck_adapter_backward", 6, "dup_bias"),
        ("activation", 0, "y"),
        ("activation_backward", 0, "dz"),
        ("gated_activation", 0, "y"),
        ("gated_activation_backward", 0, "dz"),
        ("gated_activation_backward", 1, "dg"),
        ("dropout_add", 0, "y"),
        ("dropout_add_backward", 0, "dx"),
        ("layer_norm", 0, "y"),
        ("layer_norm_from_statistics", 0, "again"),
        ("layer_norm_backward", 0, "dx"),
        ("layer_norm_backward", 1, "dweight"),
        ("layer_norm_backward", 2, "dbias"),
        ("rms_norm", 0, "y"),
        ("rms_norm_from_statistics", 0, "again"),
        ("rms_norm_backward", 0, "dx"),
        ("rms_norm_backward", 1, "dweight"),
        ("frozen_ffn", 0, "y"),
        ("frozen_ffn_backward", 0, "dx"),
        ("frozen_ffn_backward", 1, "dc1"),
        ("frozen_ffn_backward", 2, "dc2"),
    ],
)
def test_a_value_that_is_off_is_found(broken, op, position, name, dtype):
    broken(op, position, lambda value: value * 1.05)
    op = op.removesuffix("_backward").removesuffix("_from_statistics")
    error = parity.check(op, "cpu", "cpu", dtype)
    assert error is not None and f": {name} is off by " in error


@pytest.mark.parametrize(("position", "name"), [(1, "da"), (2, "db"), (3, "dbias")])
def test_one_wrong_gradient_of_a_group_is_found(broken, position, name):
    broken("lora_linear_backward", position, lambda grads: [*grads[:-1], grads[-1] * 1.05])
    error = parity.check("lora_linear", "cpu", "cpu", torch.float32)
    assert error is not None and f": {name}" in error


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda y: torch.full_like(y, float("nan")), "y is off by nan"),
        (lambda y: y[:-1], "y is torch.float32 of shape"),
        (lambda y: y.double(), "y is torch.float64 of shape"),
        (lambda y: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_what_else_can_be_wrong(broken, spoil, message):
    broken("frozen_linear", 0, spoil)
    assert message in parity.check("frozen_linear", "cpu", "cpu", torch.float32)


def test_the_check_leaves_the_generator_alone():
    state = torch.get_rng_state()
    parity.check("lora_linear", "reference", "cpu", torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
