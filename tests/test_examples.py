"""Every program of examples/ runs offline and prints what it promises."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

from petl_kernels import ops

FOLDER = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="runs in a source tree")


@pytest.fixture
def printed(capsys, monkeypatch):
    """printed(name): what the example prints on standard output."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(name: str) -> str:
        runpy.run_path(str(FOLDER / name))
        return capsys.readouterr().out

    return run


def test_own_loop(printed):
    text = printed("own_loop.py")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+) nats", text)]
    assert len(losses) == 12 and losses[-1] < losses[0] / 10
    assert "6 of 6 layers at tier 2" in text
    assert "adapter None: Mittwoch, 4. März 2048\nadapter dates: Mittwoch, den 4. März 2048\n" in text
    assert text.endswith("saved: adapter_config.json adapter_model.safetensors\n")


def test_hf_trainer(printed):
    text = printed("hf_trainer.py")
    first, *_, last = map(float, re.search("losses: (.*)", text)[1].split())
    assert last < first / 4
    assert abs(float(re.search("of the trained one: (.*)", text)[1])) < 1e-4


@pytest.mark.slow
def test_budget(printed):
    text = printed("budget.py")
    assert 4.5 < float(re.search(r"parameters, ([\d.]+)%", text)[1]) <= 5
    assert re.search(r"^  peak +\d+ MiB$", text, re.M)
    assert re.search(r"micro-batches of an update: [1-9]", text)


def test_bench_kernel(printed, monkeypatch):
    quick = [name for name in ops.available_backends() if name != "triton" or torch.cuda.is_available()]
    monkeypatch.setattr(ops, "available_backends", lambda: quick)  # Triton's interpreter would take minutes
    lines = printed("bench_kernel.py").splitlines()
    assert [line.split()[0] for line in lines] == [name for name in quick if name != "cuda"]
    assert all(float(line.split()[-1]) < 1e-4 for line in lines)


def test_every_example_is_run_and_has_its_line():
    programs = {path.name for path in FOLDER.glob("*.py")}
    own = Path(__file__).read_text(encoding="utf-8")
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert programs and all(f'printed("{name}")' in own and f"`{name}`" in readme for name in programs)
