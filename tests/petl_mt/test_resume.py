"""A run that is stopped at any moment ends, resumed, with bitwise the same weights."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import settings_of
from petl_mt.cli import main
from petl_mt.config import TrainConfig
from petl_mt.runs import checkpoint
from petl_mt.train import loop, train
from petl_mt.train.update import Update
from safetensors.torch import load_file

from petl_kernels.errors import InputError


class Killed(BaseException):
    """An error that nothing catches."""


def kill_at(monkeypatch, step: int) -> None:
    """Kills the run in the middle of update ``step``: gradients are there, the optimiser has not moved."""
    update, move, now = loop.train_one_update, Update.step, []

    def numbered(run):
        now[:] = [run.progress.step + 1]
        update(run)

    def die(self, lr):
        if now == [step]:
            raise Killed
        return move(self, lr)

    monkeypatch.setattr(loop, "train_one_update", numbered)
    monkeypatch.setattr(Update, "step", die)


def weights(out: str | Path) -> dict[str, torch.Tensor]:
    latest, best = (load_file(Path(out) / "checkpoints" / name / "trained.safetensors") for name in ("latest", "best"))
    return {**{f"latest {k}": t for k, t in latest.items()}, **{f"best {k}": t for k, t in best.items()}}


def assert_same_run(out: str | Path, expected: str | Path) -> None:
    found, wanted = weights(out), weights(expected)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name
    for folder in ("adapter", "model"):
        for path in (Path(expected) / folder).glob("*.safetensors"):
            assert path.read_bytes() == (Path(out) / folder / path.name).read_bytes()
    hypotheses = [(Path(folder) / "valid.best.hyp").read_bytes() for folder in (out, expected)]
    assert hypotheses[0] == hypotheses[1]


@pytest.fixture(scope="module")
def run_once(parent, text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(TrainConfig(**settings_of(parent, text, out)), quiet=True)
    return out


@pytest.fixture
def whole(run_once, tmp_path) -> str:
    """The same run, uninterrupted: a copy, which a test may change."""
    return str(shutil.copytree(run_once, tmp_path / "whole", symlinks=True))


@pytest.mark.parametrize("step", [1, 8, *(pytest.param(step, marks=pytest.mark.slow) for step in (3, 5))])
def test_killed_and_resumed(settings, whole, monkeypatch, step):
    kill_at(monkeypatch, step)
    with pytest.raises(Killed):
        train(TrainConfig(**settings), quiet=True)
    monkeypatch.undo()
    result = train(TrainConfig(**settings), resume=True, quiet=True)
    assert result.steps == 8
    assert_same_run(settings["out"], whole)
    lines = [json.loads(line) for line in (Path(settings["out"]) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))


@pytest.mark.slow
def test_killed_twice_and_in_another_epoch(settings, tmp_path, monkeypatch):
    """The run has more than two epochs, accumulation, dropout in the model and in LoRA, warm-up still going on."""
    settings |= {"batch_tokens": 400, "accumulate": 2, "steps": 11, "eval_every": 2, "warmup": 9}
    train(TrainConfig(**{**settings, "out": str(tmp_path / "whole")}), quiet=True)
    for step in (4, 9):
        kill_at(monkeypatch, step)
        with pytest.raises(Killed):
            train(TrainConfig(**settings), resume=True, quiet=True)
        monkeypatch.undo()
    train(TrainConfig(**settings), resume=True, quiet=True)
    progress = json.loads((Path(settings["out"]) / "checkpoints" / "latest" / "progress.json").read_text())
    assert progress["epoch"] >= 2
    assert_same_run(settings["out"], tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["full", "prefix", *(pytest.param(other, marks=pytest.mark.repeat) for other in ("bitfit", "adapter"))]
)
def test_other_methods_resume_too(settings, tmp_path, monkeypatch, method):
    settings |= {"method": method, "method_args": {}, "lr": None}
    train(TrainConfig(**{**settings, "out": str(tmp_path / "whole")}), quiet=True)
    kill_at(monkeypatch, 5)
    with pytest.raises(Killed):
        train(TrainConfig(**settings), quiet=True)
    monkeypatch.undo()
    train(TrainConfig(**settings), resume=True, quiet=True)
    assert_same_run(settings["out"], tmp_path / "whole")


@pytest.mark.slow
def test_a_resumed_run_keeps_its_plan(settings, tmp_path, monkeypatch):
    """Rates are measured: a new plan might hold weights or moments in another way."""
    settings |= {"memory": "8MiB", "tier": 1}  # one, since a plan counts each
    train(TrainConfig(**{**settings, "out": str(tmp_path / "whole")}), quiet=True)
    kill_at(monkeypatch, 5)
    with pytest.raises(Killed):
        train(TrainConfig(**settings), quiet=True)
    monkeypatch.undo()
    monkeypatch.setattr("petl_mt.train.budget.plan_for", None)
    train(TrainConfig(**settings), resume=True, quiet=True)
    assert_same_run(settings["out"], tmp_path / "whole")


@pytest.mark.slow
def test_a_new_model_resumes_with_its_vocabulary(settings, text, tmp_path, monkeypatch):
    settings |= {"model": "new", "method": None, "method_args": {}, "vocab_size": 60, "d_model": 16, "layers": 1,
                 "heads": 2}  # fmt: skip
    train(TrainConfig(**{**settings, "out": str(tmp_path / "whole")}), quiet=True)
    kill_at(monkeypatch, 5)
    with pytest.raises(Killed):
        train(TrainConfig(**settings), quiet=True)
    monkeypatch.undo()
    train(TrainConfig(**settings), resume=True, quiet=True)
    assert_same_run(settings["out"], tmp_path / "whole")


def flags(settings: dict, config: Path) -> list[str]:
    values = TrainConfig(**settings).to_dict()
    config.write_text(yaml.safe_dump(values))
    return ["train", "--config", str(config), "--resume"]


LONG = {"steps": 50, "eval_every": 10}


@pytest.fixture(scope="module")
def long_run(parent, text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("long") / "run"
    train(TrainConfig(**{**settings_of(parent, text, out), **LONG}), quiet=True)
    return out


# What SIGKILL leaves is what Killed leaves above, and what bench/product.py's run leaves (tests/bench/test_product.py).
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.repeat)])
def test_signals(settings, long_run, tmp_path, number):
    """The real program, killed from outside at whatever step it is in."""
    settings |= LONG
    command = [sys.executable, "-m", "petl_mt.cli", *flags(settings, tmp_path / "run.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    latest = Path(settings["out"]) / "checkpoints" / "latest"
    while not latest.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    code = process.wait(60)
    stopped = json.loads((latest / "progress.json").read_text())["step"]
    assert code == (-number if number == signal.SIGKILL else 130) and stopped < 50
    if number == signal.SIGINT:
        assert f"interrupted; step {stopped} is saved" in process.stderr.read().decode()
    process.stderr.close()
    train(TrainConfig(**settings), resume=True, quiet=True)
    assert_same_run(settings["out"], long_run)


def test_a_full_disk_costs_nothing_but_the_last_steps(settings, whole, tmp_path, monkeypatch, capsys):
    save_file, saved = checkpoint.save_file, []

    def full_disk(tensors, path):
        saved.append(path)
        if len(saved) > 4:  # the second checkpoint's second file
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    assert main(flags(settings, tmp_path / "run.yaml")) == 2
    monkeypatch.undo()
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("petl-mt train: ") and "step-6: No space left on device" in error
    folder = Path(settings["out"]) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["best", "latest", "step-3"]
    train(TrainConfig(**settings), resume=True, quiet=True)
    assert_same_run(settings["out"], whole)


def test_a_finished_run_can_be_resumed_to_no_effect(settings, whole):
    before = weights(whole)
    train(TrainConfig(**{**settings, "out": whole}), resume=True, quiet=True)
    after = weights(whole)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_run_is_not_overwritten(settings, whole, capsys):
    with pytest.raises(InputError, match="holds another run"):
        train(TrainConfig(**{**settings, "out": whole}), quiet=True)
    with pytest.raises(InputError, match=r"another configuration: .*lr \(0.01 -> 0.02\), seed \(1 -> 7\)"):
        train(TrainConfig(**{**settings, "out": whole, "lr": 0.02, "seed": 7}), resume=True, quiet=True)


def test_resuming_needs_no_flags_but_out(settings, whole):
    assert main(["train", "--resume", "--out", whole]) == 0


def test_a_checkpoint_of_another_run_is_refused(settings, whole, tmp_path):
    other = {**settings, "method_args": {"rank": 3}}
    train(TrainConfig(**{**other, "out": settings["out"]}), quiet=True)
    latest = Path(whole) / "checkpoints" / "latest"
    os.replace(Path(settings["out"]) / "checkpoints" / "latest" / "trained.safetensors", latest / "trained.safetensors")
    (latest / "checksums.json").unlink()  # as a checkpoint of an earlier version, which had none
    found, (line,) = checkpoint.Checkpoints(latest.parent).whole("latest")
    assert found == latest.resolve() and "has no checksums.json" in line and "cannot be told" in line
    with pytest.raises(InputError, match="does not fit the model"):
        train(TrainConfig(**{**settings, "out": whole}), resume=True, quiet=True)
    (latest / "trained.safetensors").write_bytes(b"damaged")
    assert checkpoint.damage(latest.resolve()).startswith("damaged, trained.safetensors cannot be read")
