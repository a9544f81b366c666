from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from layers.waiting import waits
from petl_mt import train, update
from petl_mt.config import TrainConfig
from petl_mt.data import Position, TrainBatches
from petl_mt.runs import RunFolder
from petl_mt.train import _Training
from petl_mt.update import check_graphs

from petl_kernels.errors import InputError
from petl_kernels.interop import device_masks
from petl_kernels.memory.plan import Plan

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Recorder:
    """Captures as CUDA does: nothing is computed then, and replaying computes."""

    made: list[Recorder] = []

    def __init__(self, device: torch.device):
        self.captures = self.replays = self.releases = 0
        self.made.append(self)

    def capture(self, run):
        self.captures += 1
        result = torch.zeros(())

        def replay():
            self.replays += 1
            result.copy_(run())

        return replay, result

    def release(self):
        self.releases += 1


@pytest.fixture
def graphs(monkeypatch):
    """Graphs on the CPU, as far as the bookkeeping goes."""
    monkeypatch.setattr(update, "CudaGraphs", Recorder)
    monkeypatch.setattr(train, "check_graphs", lambda device, plan: None)
    Recorder.made.clear()
    return Recorder.made


def training(settings: dict, **changes) -> _Training:
    config = TrainConfig(**{**settings, **changes})
    return _Training(config, RunFolder(Path(config.out)), resuming=False, quiet=True)


def losses(settings: dict, out: Path, **changes) -> list[float]:
    return training(settings, out=str(out), **changes).run().losses


def test_graphs_train_to_the_same_losses(settings, tmp_path, graphs, monkeypatch):
    """Batches of one width have one shape, whatever is filled up."""
    settings |= {"dropout": 0.0, "method_args": {"rank": 2}, "steps": 8}
    monkeypatch.setattr(train, "GRAPH_WIDTH", 16)
    found = losses(settings, tmp_path / "graphs", cuda_graphs=True)
    monkeypatch.setattr(train, "TrainBatches", lambda *given: TrainBatches(*given[:3], 16))
    expected = losses(settings, tmp_path / "eager")
    assert found == pytest.approx(expected, rel=1e-4)
    (recorder,) = graphs
    assert 0 < recorder.captures < recorder.replays


def test_graphs_give_their_memory_back_to_an_evaluation_in_a_budget(settings, tmp_path, graphs):
    settings |= {"steps": 4, "eval_every": 2, "memory": "8MiB"}
    loop = training(settings, out=str(tmp_path / "run"), cuda_graphs=True)
    loop.run()
    assert graphs[0].releases == 2


def test_what_a_graph_cannot_hold():
    plan = Plan(
        *("Model", 1, 2**30, "cuda", "bf16", 64, 8, 8, 64, 1, (1, 2), 2**20, "dense", "adamw", 0, 64, 2**20, {}),
        *(1.0, False, ()),
    )
    check_graphs(CUDA, None)
    check_graphs(CUDA, plan)
    with pytest.raises(InputError, match="cuda_graphs: the device is cpu; expected cuda"):
        check_graphs(CPU, None)
    for change, what in (
        ({"streamed": 2}, "the plan streams 2 layers"),
        ({"tiers": (5, 1)}, "tier 5"),
        ({"gradients": "bfloat16"}, "keeps gradients in bfloat16"),
    ):
        with pytest.raises(InputError, match=what):
            check_graphs(CUDA, dataclasses.replace(plan, **change))


def test_refused_on_a_cpu(settings):
    with pytest.raises(InputError, match="cuda_graphs: the device is cpu; expected cuda"):
        training(settings, cuda_graphs=True)


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
    # counting what is on the host, the loss' check of labels (on CUDA the device's own), and the numbers that are due
    allowed = ("of", "_first_rows", "_kept_rows", "_read")
    assert [place for place in found if _innermost(place) not in allowed] == []
    assert loss.isfinite() and norm.isfinite() and len(loop.losses) == 1


def test_a_capture_that_fails_is_told_once(settings, tmp_path, graphs, monkeypatch):
    loop = training(settings, out=str(tmp_path / "run"), cuda_graphs=True)
    said = []
    monkeypatch.setattr(loop.update, "say", said.append)

    def fail(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs[0], "capture", fail)
    loop.model.train()
    for _ in range(4):
        loop._update()
    reason = "operation not permitted when stream is capturing"
    assert said == [f"cuda_graphs: a step could not be captured, and runs as it is ({reason})"]


def test_no_graph_holds_inputs_in_host_memory(settings, tmp_path, graphs, monkeypatch):
    loop = training(settings, out=str(tmp_path / "run"), cuda_graphs=True, memory="8MiB")
    said = []
    monkeypatch.setattr(loop.update, "say", said.append)
    loop.update.tighten(dataclasses.replace(loop.update.plan, tiers=(4, 4)))
    assert loop.update.graphs is not None and len(said) == 1
    loop.update.tighten(dataclasses.replace(loop.update.plan, tiers=(5, 5)))
    assert loop.update.graphs is None and said[1].startswith("cuda_graphs: steps run as they are from here on")
