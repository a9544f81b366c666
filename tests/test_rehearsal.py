"""What only runs on a card, run without one: host memory plays the card (``rehearsal/card.py``).

Each test is a process of its own, since PyTorch looks for a card once, and there are few, since each imports all.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rehearsal import library

TESTS = Path(__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="needs a PyTorch without CUDA, whose functions it plays"),
]


@pytest.fixture(scope="module", autouse=True)
def built():
    pytest.importorskip("petl_kernels._C")
    subprocess.run([sys.executable, library.__file__], check=True)  # it loads what it builds


@pytest.mark.parametrize(
    "arguments",
    [
        ["rehearsal/rehearse_library.py", "rehearsal/rehearse_graphs.py", "petl_mt/rehearse_trainer.py"],
        ["rehearsal/rehearse_triton.py"],
        # Tests for a card whose kernels are PyTorch's own.
        ["-m", "gpu", "step/test_graphs.py", "petl_mt/test_late.py", "layers/test_no_waiting.py"],
    ],
    ids=["library and trainer", "triton", "gpu tests"],
)
def test_on_a_card_of_host_memory(arguments, request):
    command = [sys.executable, "-m", "pytest", "-p", "rehearsal.card", "-o", "python_files=test_*.py rehearse_*.py"]
    if "not repeat" in request.config.option.markexpr:  # with or without repeats, as it is here; none of them is slow
        command += ["-m", "not repeat"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    environment["TRITON_INTERPRET"] = "1" if "triton" in arguments[0] else "0"
    done = subprocess.run([*command, *arguments], cwd=TESTS, env=environment, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0 and re.search(r"\d+ passed", last) and "skipped" not in last, done.stdout + done.stderr
