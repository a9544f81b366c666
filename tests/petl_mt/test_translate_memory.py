"""Translating and scoring inside a budget: weights as training had them, batches that fit, one line for a refusal."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from petl_mt.cli import main
from petl_mt.config import TrainConfig
from petl_mt.evaluate import BatchLimit, until_it_fits
from petl_mt.inference import Translator, load
from petl_mt.train import train
from test_memory import saved_plan

from petl_kernels.errors import InputError
from petl_kernels.methods.owner import owner
from petl_kernels.step import cap
from petl_kernels.units import parse_size

_C = pytest.importorskip("petl_kernels._C")
CPU = torch.device("cpu")


@pytest.fixture
def settings(settings) -> dict:
    return settings | {"method_args": {"rank": 2}, "dropout": 0.0, "batch_tokens": 400, "steps": 20, "eval_every": 20}


def trained(settings: dict, out: Path, **changes):
    return train(TrainConfig(**{**settings, "out": str(out), **changes}), quiet=True)


@pytest.mark.parametrize(
    "storage", ["nf4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dense", "streamed"))]
)
def test_score_says_what_training_said(settings, tmp_path, capsys, storage):
    """A run under a budget is loaded as it trained; `petl-mt score` of the validation text gives the same line."""
    kept = {"storage": "dense" if storage == "streamed" else storage, "streamed": 2 * (storage == "streamed")}
    path = saved_plan(settings, tmp_path / "plan.json", "2MiB", approximations=[], **kept)
    result = trained(settings, tmp_path / "run", memory="2MiB", plan=path, allow=["quantized"])
    capsys.readouterr()
    valid = settings["valid"][0]
    hypotheses = tmp_path / "hyp"
    command = ["score", "--run", str(tmp_path / "run"), "--test", valid.source, valid.target]
    assert main([*command, "--hypotheses", str(hypotheses)]) == 0
    assert capsys.readouterr().out.splitlines() == next(iter(result.scores.values())).lines()
    assert hypotheses.read_text() == (tmp_path / "run" / "valid.best.hyp").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [0, pytest.param(2, marks=pytest.mark.repeat)])  # "streamed" above translates, too
def test_a_run_without_a_budget_translates_within_one(settings, tmp_path, text, monkeypatch, streamed):
    """With its layers in memory and streamed the lines are the same, and the peak is below the budget."""
    from petl_kernels.planning import planner

    def found(*arguments):
        return dataclasses.replace(plan_search(*arguments), streamed=streamed)

    plan_search = planner.plan_search
    monkeypatch.setattr("petl_mt.inference.load.plan_search", found)
    trained(settings, tmp_path / "run")
    lines = Path(text["train"].source).read_text().splitlines()[:60]
    free = list(Translator(tmp_path / "run", beam=4).stream(lines))
    memory = _least(tmp_path / "run")
    before = _C.cpu_bytes()
    with ExitStack() as limits:
        translator = Translator(tmp_path / "run", beam=4, memory=memory, limits=limits)  # the cap holds while it loads
        cap.reset_peak(CPU)
        assert (owner(translator.model).streamed is not None) == bool(streamed)
        assert list(translator.stream(lines)) == free
        assert cap.peak(CPU) - before <= parse_size(memory)


def _least(run: Path) -> str:
    """Returns the least budget that the refusal names."""
    try:
        Translator(run, beam=4, memory="1KiB")
    except InputError as error:
        number, unit = str(error).split("needs ")[1].split(";")[0].split()
        return f"{float(number) * 1.01}{unit}"
    raise AssertionError("1 KiB was enough")


@pytest.mark.slow
def test_what_does_not_fit_is_one_line_with_the_least(settings, tmp_path, capsys, text):
    trained(settings, tmp_path / "run", steps=1)
    pair = text["test"]
    command = ["score", "--run", str(tmp_path / "run"), "--test", pair.source, pair.target]
    assert main([*command, "--memory", "9 lots"]) == 2
    assert "memory size '9 lots'" in capsys.readouterr().err
    assert main([*command, "--memory", "20KiB"]) == 2
    error = capsys.readouterr().err
    assert "memory 20 KiB: to translate one sentence of 40 tokens with 1 beams needs" in error
    assert error.count("\n") == 1
    assert main([*command, "--memory", _least(tmp_path / "run")]) == 0


def test_host_memory_is_that_of_a_plan(settings, tmp_path, capsys, text, monkeypatch):
    """Beside a card the host is counted; on a CPU it is the budget's own memory."""
    trained(settings, tmp_path / "run", steps=1)
    command = ["score", "--run", str(tmp_path / "run"), "--test", text["test"].source, text["test"].target]
    assert main([*command, "--host-memory", "1GiB"]) == 2
    assert "host_memory: no effect without a budget; expected --memory with it" in capsys.readouterr().err
    assert main([*command, "--memory", "2GiB", "--host-memory", "1GiB"]) == 2
    assert "host_memory 1 GiB: below memory 2 GiB, which is host memory on a CPU" in capsys.readouterr().err
    config = TrainConfig(**settings, host_memory="64KiB")
    assert load._host_limit(config, CPU, 2**30, None) is None
    assert load._host_limit(config, torch.device("cuda"), 2**30, None) == 2**16
    assert load._host_limit(config, torch.device("cuda"), 2**30, "1MiB") == 2**20
    monkeypatch.setattr("petl_mt.inference.load.resolve", lambda: torch.device("cuda"))
    assert main([*command, "--memory", "2GiB", "--host-memory", "64KiB"]) == 2
    assert "host_memory 64 KiB: loading the model, and what stays on the host, take" in capsys.readouterr().err


def test_batches_shrink_until_they_fit():
    said, tried = [], []

    def run(limit: BatchLimit) -> str:
        tried.append(limit.tokens)
        if limit.tokens > 30:
            raise torch.OutOfMemoryError("no")
        return "done"

    assert until_it_fits(run, BatchLimit(100), "1 MiB", said.append) == ("done", BatchLimit(25))
    assert tried == [100, 50, 25] and len(said) == 2
    with pytest.raises(InputError, match="memory 1 MiB: evaluation of one sentence does not fit; expected more"):
        until_it_fits(lambda limit: run(BatchLimit(99)), BatchLimit(4), "1 MiB", said.append)
