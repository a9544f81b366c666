"""`petl-mt doctor`: each line at once, kernels that are wrong, and checks that there was no time for."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch
from petl_mt import doctor
from petl_mt.cli import main

import petl_kernels as pk
from petl_kernels import dispatch, parity

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    """Switches Triton's interpreter off, which other tests set for the whole process: checks would take minutes."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def quick(monkeypatch):
    """Replaces checks by ones that find nothing wrong at once; returns the kernels that were checked."""
    asked = []

    def check_case(op, backend, device, dtype, case):
        asked.append((op, backend, dtype, case))

    monkeypatch.setattr(parity, "check_case", check_case)
    return asked


# Those with a C++ kernel.
HERE = [op for op in pk.ops.OPS if op not in ("lora_border", "capped_attention")]


def lines_of(report: str) -> list[list[str]]:
    """Returns dtype, op, backend and result of each line of the table."""
    return [line.split(maxsplit=3) for line in report.split("parity with the reference:\n")[1].splitlines()]


def test_what_it_says_of_this_machine(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "SECONDS", 600)
    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    for word in ("torch 2", "transformers", "device: ", "extension: ", "backend reference: available"):
        assert word in report
    if dispatch.load_error("cpu") is None:
        assert "served by plain PyTorch: lora_border, capped_attention\n" in report
        found = lines_of(report)
        assert [line[:2] for line in found] == [
            [kind, op] for kind in ("bfloat16", "float32", "float16") for op in HERE
        ]
        assert all(line[2:] == ["cpu", "pass, serves"] for line in found)


def test_each_line_comes_when_it_is_known_and_bf16_comes_first(quick, monkeypatch, capsys):
    """A check that hangs holds up its own line and no other."""
    goes_on, printed = threading.Event(), []

    def check_case(op, backend, device, dtype, case):
        if (op, dtype) == ("lora_linear", torch.bfloat16):
            assert goes_on.wait(60)

    monkeypatch.setattr(parity, "check_case", check_case)
    monkeypatch.setattr(doctor, "THREADS", 4)
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(dispatch, "serving", lambda op, device: ("reference", "triton"))
    monkeypatch.setattr(parity, "checked_dtypes", lambda backend, device: parity.DTYPES)
    for check in doctor.checks(torch.device("cuda", 0), time.monotonic() + 600):
        printed.append((check.op, check.dtype))
        if len(printed) == 3 * len(pk.ops.OPS) - 1:
            goes_on.set()
    others = [(op, dtype) for dtype in parity.DTYPES for op in pk.ops.OPS]
    others.remove(("lora_linear", torch.bfloat16))
    assert sorted(printed[:-1], key=str) == sorted(others, key=str) and printed[-1] == ("lora_linear", torch.bfloat16)
    assert {dtype for _, dtype in printed[:10]} == {torch.bfloat16}


SLOW = """
import time, types
from petl_kernels import parity
from petl_mt import doctor

clock = [0]

def check_case(op, backend, device, dtype, case):
    if op == "layer_norm":  # it takes longer than there is time
        time.sleep(1)
        clock[0] = doctor.SECONDS + 1

parity.check_case = check_case
doctor.time = types.SimpleNamespace(monotonic=lambda: clock[0])
raise SystemExit(doctor.doctor())
"""


@pytest.mark.slow
@pytest.mark.skipif(dispatch.load_error("cpu") is not None, reason="the extension is not built")
def test_lines_leave_at_once_and_what_there_was_no_time_for_is_named():
    """Lines go through a pipe, where Python would buffer them."""
    with subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE, text=True) as run:
        came = [(time.monotonic(), line) for line in run.stdout]
        ended = time.monotonic()
    first = next(at for at, line in came if line.startswith("bfloat16  frozen_linear"))
    assert ended - first > 0.9  # it came before the slow one was done
    table = lines_of("".join(line for _, line in came[:-1]))
    in_time = HERE.index("layer_norm")
    assert [line[3] for line in table] == ["pass, serves"] * in_time + ["not checked: no time"] * (len(table) - in_time)
    assert len(table) == 3 * len(HERE) and run.returncode == 3
    assert f"{len(table) - in_time} of {len(table)} not checked" in came[-1][1]


@pytest.mark.parametrize(
    ("outcomes", "code", "text"),
    [
        ({"_one_layer": None}, 0, "pass, serves"),
        ({"_group_with_dropout": "dx is off by 1"}, 1, "WRONG: dx is off by 1"),
        ({"_one_layer": torch.OutOfMemoryError("short")}, 3, "not checked: out of memory"),
        ({"_one_layer": torch.OutOfMemoryError("short"), "_group_with_dropout": "y is off"}, 1, "WRONG: y is off"),
    ],
)
def test_the_worst_case_of_an_op_counts_and_the_exit_code_tells(monkeypatch, capsys, outcomes, code, text):
    def check_case(op, backend, device, dtype, case):
        outcome = outcomes.get(case.__name__) if dtype == torch.float32 else None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(parity, "check_case", check_case)
    monkeypatch.setattr(doctor, "SECONDS", 600)
    assert main(["doctor"]) == code
    (line,) = [line for line in lines_of(capsys.readouterr().out) if line[:2] == ["float32", "lora_linear"]]
    assert line[3] == text


def test_on_a_card_it_says_what_serves_instead(monkeypatch):
    card = torch.device("cuda", 0)
    references = {key: kernel for key, kernel in dispatch._kernels.items() if key[1] == "reference"}
    monkeypatch.setattr(dispatch, "_kernels", references)  # other tests of this process may have loaded kernels
    monkeypatch.setattr(dispatch, "_load_errors", {**dispatch._load_errors, "triton": None, "cuda": None})
    for op in ("lora_linear", "frozen_linear"):
        dispatch.register(op, "triton")(print)
    wrong = doctor.Check("lora_linear", "triton", torch.bfloat16, doctor.Verdict.WRONG, "dx is off by 1")
    assert doctor._line(wrong, card).endswith("triton   WRONG: dx is off by 1; the reference serves")
    right = wrong._replace(verdict=doctor.Verdict.RIGHT)
    assert doctor._line(right, card).endswith("triton   pass, serves")
    assert doctor._line(right._replace(op="frozen_linear"), card).endswith("triton   pass")  # cuBLAS serves
    assert doctor._default("attention", card) == "reference"


@pytest.mark.parametrize(
    ("capability", "words"),
    [
        ((7, 5), ["class sm75 (T4", "64 KB", "fp32, fp16\n", "has no bfloat16", "take the CUDA cores"]),
        ((8, 6), ["class small (RTX 3060", "99 KB", "fp32, fp16, bf16\n"]),
        ((12, 1), ["class small", "not compiled ahead of time for compute capability 12.1\n"]),
    ],
)
def test_it_names_the_class_of_a_card_and_what_does_not_serve_there(capability, words):
    text = "\n".join(doctor.card_lines(capability)) + "\n"
    assert all(word in text for word in words)
    assert ("no bfloat16" in text) == (capability == (7, 5))
