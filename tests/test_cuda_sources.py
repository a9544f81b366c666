"""Every CUDA source compiles for the targets that ship, without a GPU, and within their registers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[1] / "csrc" / "cuda").glob("*.cu"))
TARGETS = (80, 90, 100)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_without_spills(source, tmp_path):
    targets = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in TARGETS]
    report = subprocess.run(
        ["nvcc", "-O3", *targets, "-Xptxas", "-v", "-c", str(source), "-o", str(tmp_path / "kernel.o")],
        capture_output=True,
        text=True,
    )
    assert report.returncode == 0, report.stderr
    for target in TARGETS:
        assert f"for 'sm_{target}'" in report.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report.stderr)
    assert spills and set(spills) == {("0", "0", "0")}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_includes_no_pytorch(source):
    included = re.findall(r'#include [<"]([^>"]+)', source.read_text())
    assert not [name for name in included if name.startswith(("torch", "ATen", "c10"))]
