from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_graphs import Recorder
from layers.waiting import waits
from petl_mt.cli import main
from petl_mt.config import TrainConfig
from petl_mt.data import Position
from petl_mt.runs import RunFolder
from petl_mt.runs.log import RunLog
from petl_mt.train import batching, budget, setup, train, update
from petl_mt.train.loop import run_training, train_one_update
from petl_mt.train.setup import Setup, set_up
from petl_mt.train.update import Update

from petl_kernels.errors import InputError
from petl_kernels.layers import device_masks
from petl_kernels.planning import planner
from petl_kernels.step import graphs as graphs_module


@pytest.fixture
def graphs(monkeypatch) -> list[Recorder]:
    """Replaces graphs by recorders that count on the CPU; returns the recorders that were made."""
    made = []
    monkeypatch.setattr(update, "CudaGraphs", lambda device: made.append(Recorder()) or made[-1])
    for module in (setup, planner):
        monkeypatch.setattr(module, "check_device", lambda device: None)
    return made


def training(settings: dict, **changes) -> Setup:
    config = TrainConfig(**{**settings, **changes})
    return set_up(config, RunFolder(Path(config.out)), resuming=False, quiet=True)


def losses(settings: dict, out: Path, **changes) -> list[float]:
    return run_training(training(settings, out=str(out), **changes)).losses


@pytest.mark.parametrize("accumulate", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_graphs_train_to_the_same_losses(settings, tmp_path, graphs, accumulate):
    """Rows are filled up to few shapes; the optimiser's step and the validation loss have graphs, too."""
    settings |= {"dropout": 0.0, "method_args": {"rank": 2}, "steps": 8, "eval_every": 4, "accumulate": accumulate}
    loop = training(settings, out=str(tmp_path / "graphs"), cuda_graphs=True)
    found = run_training(loop)
    expected = run_training(training(settings, out=str(tmp_path / "eager")))
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.valid_loss == pytest.approx(expected.valid_loss, rel=1e-5)
    (recorder,) = graphs
    assert 3 <= recorder.captures < recorder.replays
    assert isinstance(loop.optimizer.param_groups[0]["lr"], float)


@pytest.mark.slow
def test_graphs_give_their_memory_back_to_an_evaluation_in_a_budget(settings, tmp_path, graphs):
    settings |= {"steps": 4, "eval_every": 2, "memory": "64MiB"}
    loop = training(settings, out=str(tmp_path / "run"), cuda_graphs=True)
    run_training(loop)
    assert graphs[0].releases == 5 and loop.update.graphs is None  # before and after, and for the search


def test_what_runs_says_whether_steps_are_captured(settings, tmp_path, graphs, monkeypatch):
    said = []
    monkeypatch.setattr(RunLog, "say", lambda self, line: said.append(line))
    training(settings, out=str(tmp_path / "with"), cuda_graphs=True)
    assert said[-1] == "steps are captured as CUDA graphs, one for each shape of rows"
    monkeypatch.setattr(batching, "packing_obstacle", lambda model: "a test")
    with pytest.raises(InputError, match="cuda_graphs: they take packed rows, and a test; expected a run without"):
        training(settings, out=str(tmp_path / "padded"), cuda_graphs=True)
    monkeypatch.setattr(batching, "wants_graphs", lambda config, device: True)
    assert training(settings, out=str(tmp_path / "default")).update.graphs is None


def test_padding_is_what_rows_are_filled_up_with(settings, tmp_path, graphs):
    loop = training(settings, out=str(tmp_path / "run"), cuda_graphs=True)
    batch = loop.batches.take(Position(0, 0))
    loop.update.gradients([batch], batch.target_tokens)
    tokens = batch.source.numel() + batch.labels.numel()
    assert loop.batches.corpus.tokens(batch.indices) == tokens < loop.update.positions == 2 * settings["batch_tokens"]


@pytest.mark.parametrize(
    ("device", "given", "tier", "expected"),
    [
        ("cuda", None, None, True),
        ("cuda", None, 3, True),
        ("cuda", False, None, False),
        ("cuda", None, 0, False),
        ("cuda", None, 5, False),
        ("cpu", None, None, False),
    ],
)
def test_on_by_default_where_they_can_be(device, given, tier, expected):
    config = TrainConfig(cuda_graphs=given, tier=tier)
    assert budget.wants_graphs(config, torch.device(device)) is expected


def test_an_optimiser_that_cannot_be_captured_steps_as_it_is(settings, tmp_path, graphs, monkeypatch, capsys):
    loop = training(settings, out=str(tmp_path / "run"), cuda_graphs=True)
    monkeypatch.delitem(loop.optimizer.param_groups[0], "capturable")
    given = loop.model, loop.optimizer, loop.accelerator, loop.config, None, loop.text.start, 1, print
    assert not Update(*given, longest=40).graphs.captures_step
    assert capsys.readouterr().out == "cuda_graphs: this optimiser's step cannot be captured, and runs as it is\n"


def test_a_run_is_resumed_without(settings, tmp_path, graphs):
    settings |= {"out": str(tmp_path / "run"), "steps": 2}
    run_training(training(settings, cuda_graphs=True))
    config = TrainConfig(**{**settings, "steps": 4, "cuda_graphs": False})
    loop = set_up(config, RunFolder(tmp_path / "run"), resuming=True, quiet=True)
    assert loop.update.graphs is None and run_training(loop).steps == 4


def test_elsewhere_a_run_with_graphs_is_refused(settings, tmp_path, graphs, monkeypatch):
    settings |= {"out": str(tmp_path / "run"), "steps": 2}
    run_training(training(settings, cuda_graphs=True))
    monkeypatch.undo()
    with pytest.raises(InputError, match="cuda_graphs: the device is cpu; expected cuda"):
        train(TrainConfig(**{**settings, "steps": 4}), resume=True, quiet=True)


def test_graphs_do_not_make_a_plan_much_slower(settings, monkeypatch):
    """A plan without graphs may be faster by what they cannot hold; it is taken unless graphs are wanted."""
    made = []

    def plan_like(model, config, longest, device, graphs, text):
        made.append(graphs)
        seconds, approximations = plans[graphs]
        return SimpleNamespace(seconds=seconds, approximations=approximations, graphs=graphs)

    monkeypatch.setattr(budget, "_fastest", plan_like)
    cuda, config = torch.device("cuda"), TrainConfig()
    plans = {}
    for with_graphs, without, expected in (
        ((1.1, ()), (1.0, ()), True),
        ((1.3, ()), (1.0, ()), False),
        ((1.0, ("quantized",)), (1.0, ()), False),
        ((1.0, ()), (1.0, ("quantized",)), True),
    ):
        plans.update({True: with_graphs, False: without})
        assert budget.plan_for(None, config, 40, cuda).graphs is expected
    assert budget.plan_for(None, TrainConfig(cuda_graphs=True), 40, cuda).graphs
    made.clear()
    assert not budget.plan_for(None, config, 40, torch.device("cpu")).graphs and made == [False]


def test_a_run_of_an_earlier_version_goes_on_without(settings, tmp_path, graphs, monkeypatch):
    """It has ``cuda_graphs`` false in its configuration, where none is the default now."""
    run_training(training(settings, out=str(tmp_path / "run"), cuda_graphs=False, steps=2))
    config = TrainConfig(**{**settings, "out": str(tmp_path / "run"), "steps": 4})
    loop = set_up(config, RunFolder(tmp_path / "run"), resuming=True, quiet=True)
    assert loop.config.cuda_graphs is False


@pytest.mark.slow
def test_a_plan_that_was_made_without_graphs_is_refused(settings, tmp_path, graphs):
    settings |= {"memory": "64MiB"}
    loop = training(settings, out=str(tmp_path / "run"))
    assert not loop.plan.cuda_graphs
    with pytest.raises(InputError, match="plan.json: has no room for CUDA graphs, or uses what they cannot hold; exp"):
        training(settings, out=str(tmp_path / "other"), cuda_graphs=True, plan=str(tmp_path / "run" / "plan.json"))


def plan_flags(settings: dict) -> list[str]:
    flags = ["plan", "--model", settings["model"], "--method", "lora", "--method-arg", "rank=2", "--max-length", "40"]
    return [*flags, "--batch-tokens", "128", "--memory", "64MiB", "--device", "cpu", "--cuda-graphs"]


@pytest.mark.slow
def test_petl_mt_plan_makes_plans_for_graphs(settings, tmp_path, graphs):
    path = str(tmp_path / "plan.json")
    assert main([*plan_flags(settings), "--json", path]) == 0
    loop = training(settings, out=str(tmp_path / "run"), cuda_graphs=True, memory="64MiB", plan=path)
    assert loop.plan.cuda_graphs and loop.plan.longest == 40 and loop.update.graphs is not None


def test_refused(settings, capsys):
    with pytest.raises(InputError, match="cuda_graphs: the device is cpu; expected cuda"):
        training(settings, cuda_graphs=True)
    assert main(plan_flags(settings)) == 2
    assert capsys.readouterr().err == "petl-mt plan: cuda_graphs: the device is cpu; expected cuda\n"
    assert main([*plan_flags(settings), "--tier", "5"]) == 2
    assert "tier 5: a CUDA graph holds no inputs in host memory; expected 1 to 4" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*plan_flags(settings), "--no-cuda-graphs"])
    assert (
        "arguments --cuda-graphs and --no-cuda-graphs: given twice; expected one of them, once"
        in capsys.readouterr().err
    )


def _innermost(place: str) -> str:
    """Returns the function that waits, of a line of ``waits``."""
    return place.partition(" < ")[0].rpartition(":")[2]


def test_an_update_waits_for_nothing(settings, tmp_path, monkeypatch):
    """As on a CUDA device, numbers are read when the next update has been queued."""
    monkeypatch.setattr(device_masks, "WAITED_FOR", ("cpu",))
    loop = training(settings, out=str(tmp_path / "run"))
    loop.step_log.numbers._late = True
    loop.model.train()
    train_one_update(loop)
    with waits() as found:
        loss = loop.update.gradients([batch := loop.batches.take(Position(0, 1))], batch.target_tokens)
        norm = loop.update.step(0.1)
        loop.step_log.numbers.settle()
    # counting what is on the host, the checks of labels and of sentences (on CUDA the device's own, or none), and the
    # numbers that are due
    allowed = ("of", "_ends", "_first_rows", "_counting_rows", "check_boundaries", "sentences", "_read")
    assert [place for place in found if _innermost(place) not in allowed] == []
    assert loss.isfinite() and norm.isfinite() and len(loop.step_log.losses) == 1


def test_a_capture_that_fails_is_told_once(settings, tmp_path, graphs, monkeypatch):
    loop = training(settings, out=str(tmp_path / "run"), cuda_graphs=True)
    said = []
    monkeypatch.setattr(loop.update, "say", said.append)
    graphs[0].failures = 1
    loop.model.train()
    for _ in range(4):
        train_one_update(loop)
    reason = "operation not permitted when stream is capturing"
    assert said == [f"cuda_graphs: a step could not be captured, and all run as they are ({reason})"]


def test_more_shapes_than_graphs_are_told_once(settings, tmp_path, graphs, monkeypatch):
    loop = training(settings, out=str(tmp_path / "run"), cuda_graphs=True)
    said = []
    monkeypatch.setattr(loop.update, "say", said.append)
    monkeypatch.setattr(graphs_module, "MOST", 1)
    loop.model.train()
    for _ in range(4):
        train_one_update(loop)
    assert len(said) == 1 and said[0].endswith("shapes are captured, those of others run as they are")


@pytest.mark.slow
def test_a_tightened_plan_may_have_no_room_for_graphs(settings, tmp_path, graphs, monkeypatch):
    loop = training(settings, out=str(tmp_path / "run"), cuda_graphs=True, memory="64MiB")
    said = []
    monkeypatch.setattr(loop.update, "say", said.append)
    loop.update.tighten(dataclasses.replace(loop.update.plan, tiers=(4, 4)))
    assert loop.update.graphs is not None and len(said) == 1
    loop.update.tighten(dataclasses.replace(loop.update.plan, cuda_graphs=False))
    assert loop.update.graphs is None and said[1].startswith("cuda_graphs: steps run as they are from here on")
