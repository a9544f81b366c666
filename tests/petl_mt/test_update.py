from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from fake_graphs import Recorder
from layers.waiting import waits
from petl_mt import plan, train, update
from petl_mt.cli import main
from petl_mt.config import TrainConfig
from petl_mt.data import Position, TrainBatches
from petl_mt.runs import RunFolder
from petl_mt.train import _Training

from petl_kernels.errors import InputError
from petl_kernels.interop import device_masks
from petl_kernels.memory import planner


@pytest.fixture
def graphs(monkeypatch) -> list[Recorder]:
    """Graphs on the CPU, as far as the bookkeeping goes; the recorders that were made."""
    made = []
    monkeypatch.setattr(update, "CudaGraphs", lambda device: made.append(Recorder()) or made[-1])
    for module in (train, planner):
        monkeypatch.setattr(module, "check_device", lambda device: None)
    return made


def training(settings: dict, **changes) -> _Training:
    config = TrainConfig(**{**settings, **changes})
    return _Training(config, RunFolder(Path(config.out)), resuming=False, quiet=True)


def losses(settings: dict, out: Path, **changes) -> list[float]:
    return training(settings, out=str(out), **changes).run().losses


def test_graphs_train_to_the_same_losses(settings, tmp_path, graphs, monkeypatch):
    """Batches of one width have one shape, whatever is filled up."""
    settings |= {"dropout": 0.0, "method_args": {"rank": 2}, "steps": 8}
    monkeypatch.setattr(plan, "WIDTH", 16)
    found = losses(settings, tmp_path / "graphs", cuda_graphs=True)
    monkeypatch.setattr(train, "TrainBatches", lambda *given: TrainBatches(*given[:3], 16))
    expected = losses(settings, tmp_path / "eager")
    assert found == pytest.approx(expected, rel=1e-4)
    (recorder,) = graphs
    assert 0 < recorder.captures < recorder.replays


def test_graphs_give_their_memory_back_to_an_evaluation_in_a_budget(settings, tmp_path, graphs):
    settings |= {"steps": 4, "eval_every": 2, "memory": "64MiB"}
    loop = training(settings, out=str(tmp_path / "run"), cuda_graphs=True)
    loop.run()
    assert graphs[0].releases == 2


def test_a_plan_that_was_made_without_graphs_is_refused(settings, tmp_path, graphs):
    settings |= {"memory": "64MiB"}
    loop = training(settings, out=str(tmp_path / "run"))
    assert not loop.plan.cuda_graphs
    with pytest.raises(InputError, match="plan.json: made without --cuda-graphs; expected one made with it"):
        training(settings, out=str(tmp_path / "other"), cuda_graphs=True, plan=str(tmp_path / "run" / "plan.json"))


def plan_flags(settings: dict) -> list[str]:
    flags = ["plan", "--model", settings["model"], "--method", "lora", "--method-arg", "rank=2", "--max-length", "40"]
    return [*flags, "--batch-tokens", "128", "--memory", "64MiB", "--device", "cpu", "--cuda-graphs"]


def test_petl_mt_plan_makes_plans_for_graphs(settings, tmp_path, graphs):
    """As train pads them: there are few shapes, and sentences of 40 tokens are 64 long."""
    path = str(tmp_path / "plan.json")
    assert main([*plan_flags(settings), "--json", path]) == 0
    loop = training(settings, out=str(tmp_path / "run"), cuda_graphs=True, memory="64MiB", plan=path)
    assert loop.plan.cuda_graphs and loop.plan.longest == 64 and loop.update.graphs is not None


def test_refused(settings, capsys):
    with pytest.raises(InputError, match="cuda_graphs: the device is cpu; expected cuda"):
        training(settings, cuda_graphs=True)
    assert main(plan_flags(settings)) == 2
    assert capsys.readouterr().err == "petl-mt plan: cuda_graphs: the device is cpu; expected cuda\n"
    assert main([*plan_flags(settings), "--tier", "5"]) == 2
    assert "tier 5: a CUDA graph holds no inputs in host memory; expected 1 to 4" in capsys.readouterr().err


def _innermost(place: str) -> str:
    """The function that asks, of ``waits``' lines."""
    return place.partition(" < ")[0].rpartition(":")[2]


def test_an_update_waits_for_nothing(settings, tmp_path, monkeypatch):
    """As a CUDA device would see it: numbers are read when the next update has been queued."""
    monkeypatch.setattr(device_masks, "WAITED_FOR", ("cpu",))
    loop = training(settings, out=str(tmp_path / "run"))
    loop.numbers._late = True
    loop.model.train()
    loop._update()
    with waits() as found:
        loss = loop.update.gradients([batch := loop.batches.take(Position(0, 1))], batch.target_tokens)
        norm = loop.update.step(0.1)
        loop.numbers.settle()
    # counting what is on the host, the checks of labels and of sentences (on CUDA the device's own, or none), and the
    # numbers that are due
    allowed = ("of", "_ends", "_first_rows", "_kept_rows", "_check_boundaries", "sentences", "_read")
    assert [place for place in found if _innermost(place) not in allowed] == []
    assert loss.isfinite() and norm.isfinite() and len(loop.losses) == 1


def test_a_capture_that_fails_is_told_once(settings, tmp_path, graphs, monkeypatch):
    loop = training(settings, out=str(tmp_path / "run"), cuda_graphs=True)
    said = []
    monkeypatch.setattr(loop.update, "say", said.append)
    graphs[0].failures = 1
    loop.model.train()
    for _ in range(4):
        loop._update()
    reason = "operation not permitted when stream is capturing"
    assert said == [f"cuda_graphs: a step could not be captured, and runs as it is ({reason})"]


def test_a_tightened_plan_may_have_no_room_for_graphs(settings, tmp_path, graphs, monkeypatch):
    loop = training(settings, out=str(tmp_path / "run"), cuda_graphs=True, memory="64MiB")
    said = []
    monkeypatch.setattr(loop.update, "say", said.append)
    loop.update.tighten(dataclasses.replace(loop.update.plan, tiers=(4, 4)))
    assert loop.update.graphs is not None and len(said) == 1
    loop.update.tighten(dataclasses.replace(loop.update.plan, cuda_graphs=False))
    assert loop.update.graphs is None and said[1].startswith("cuda_graphs: steps run as they are from here on")
