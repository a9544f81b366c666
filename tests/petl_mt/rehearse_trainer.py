"""The trainer on a CUDA device that host memory plays (``rehearsal/card.py``); ``test_rehearsal.py`` runs these."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from petl_mt.cli import main
from petl_mt.config import Pair, TrainConfig
from petl_mt.demo.make_parent import parent_folder
from petl_mt.demo.text import parallel_lines
from petl_mt.models.adapt import prepare_model
from petl_mt.runs import RunFolder
from petl_mt.train import setup, train, update
from petl_mt.train.budget import plan_for
from rehearsal import card
from safetensors.torch import load_file
from test_resume import Killed, assert_same_run, kill_at
from transformers import AutoConfig, AutoModelForSeq2SeqLM
from weights.test_streamed import Copies

from petl_kernels.interop.hf import load_skeleton
from petl_kernels.planning import cost, planner
from petl_kernels.planning.plan import Plan
from petl_kernels.step import cap
from petl_kernels.units import parse_size
from petl_kernels.weights import streamed as stream
from petl_kernels.weights.slots import Slots

CUDA = torch.device("cuda", 0)
BUDGET = "1GiB"
SIZES = {"attention_heads": 2, "ffn_dim": 48}


@pytest.fixture(autouse=True)
def quick_rates(monkeypatch):
    """Assumes rates: the products that measure them take a processor half a minute."""
    monkeypatch.setattr(planner, "measure_rates", lambda device, dtype: cost.ASSUMED)


@pytest.fixture(scope="session")
def lines(tmp_path_factory) -> dict[str, Pair]:
    folder, pairs = tmp_path_factory.mktemp("text"), {}
    for name, count in {"train": 40, "valid": 6}.items():
        rows = parallel_lines(("en", "fi"), name, count, seed=1)
        files = [folder / f"{name}.{language}" for language in ("en", "fi")]
        for i, file in enumerate(files):
            file.write_text("".join(f"{row[i]}\n" for row in rows), encoding="utf-8")
        pairs[name] = Pair("en", "fi", *map(str, files))
    return pairs


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> str:
    """A checkpoint like the demo's parent, with its tokenizer, but small and untrained."""
    folder = tmp_path_factory.mktemp("small") / "model"
    shutil.copytree(parent_folder(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(folder)
    config.update({"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "dtype": "float32"})
    config.update({f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in SIZES.items()})
    torch.manual_seed(1)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def settings(lines, small, tmp_path) -> dict:
    return settings_of(lines, small, tmp_path / "run")


def settings_of(lines: dict[str, Pair], small: str, out: Path) -> dict:
    return {
        "model": small,
        "out": str(out),
        "train": [lines["train"]],
        "valid": [lines["valid"]],
        "method": "lora",
        "method_args": {"rank": 4},
        "steps": 4,
        "batch_tokens": 512,
        "max_length": 48,
        "lr": 1e-2,
        "eval_every": 2,
        "beam": 2,
        "dropout": 0.0,
    }


def run(settings: dict, out: Path, quiet: bool = True, **changes) -> dict[str, torch.Tensor]:
    """Trains as a user does; returns the trained tensors of the last step."""
    gc.collect()  # of an earlier run, whose end would hide the bytes of this one
    before = card.allocated()
    train(TrainConfig(**{**settings, "out": str(out), **changes}), quiet=quiet)
    assert card.peak() > before, "nothing was computed on the card"
    return load_file(RunFolder(out).checkpoints / "latest" / "trained.safetensors")


@pytest.fixture(scope="session")
def expected(lines, small, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The trained tensors of the same run on the CPU."""
    out = tmp_path_factory.mktemp("expected") / "cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(setup, "width_multiple", lambda device: 8)  # which decides what stands in a batch
        AcceleratorState._reset_state(reset_partial_state=True)
        train(TrainConfig(**settings_of(lines, small, out)), quiet=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    return load_file(out / "checkpoints" / "latest" / "trained.safetensors")


def assert_same_weights(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys() and found
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def saved_plan(settings: dict, path: Path, memory: str = BUDGET, **changes) -> str:
    """Writes a plan for the settings' model on the card, with some of its fields changed; returns its path."""
    config = TrainConfig(**settings, memory=memory)
    model, _ = load_skeleton(config.model)
    config = config.resolve(model.config.d_model)
    dataclasses.replace(plan_for(prepare_model(model, config), config, 48, CUDA), **changes).save(path)
    return str(path)


def test_a_run_ends_with_the_weights_of_the_cpu(settings, tmp_path, expected):
    assert_same_weights(run(settings, tmp_path / "card"), expected)


def test_a_budget_is_planned_kept_and_taken_back(settings, tmp_path, expected, monkeypatch):
    fractions = []
    monkeypatch.setattr(
        torch._C, "_cuda_setMemoryFraction", lambda f, i: fractions.append(f) or card.set_fraction(f, i)
    )
    assert_same_weights(run(settings, tmp_path / "card", memory=BUDGET), expected)
    assert fractions == [(parse_size(BUDGET) - card.CONTEXT) / card.TOTAL, 1.0]
    result = json.loads((tmp_path / "card" / "result.json").read_text())
    plan = Plan.load(tmp_path / "card" / "plan.json")
    assert plan.device == "cuda" and card.CONTEXT < result["peak_memory_bytes"] <= plan.peak <= parse_size(BUDGET)


def test_a_device_without_its_number_is_noticed(settings, tmp_path, monkeypatch):
    """PyTorch's own check of the device refuses it; that once ended every run with a budget on a card."""
    monkeypatch.setattr(cap, "resolve", lambda device: torch.device(device.type))
    with pytest.raises(ValueError, match="Expected a torch.device with a specified index"):
        run(settings, tmp_path / "card", memory=BUDGET)


def test_a_step_that_does_not_fit_goes_on_tighter(settings, tmp_path, expected, monkeypatch, capsys):
    """The driver takes more for itself than was planned with, and the allocator refuses the first batch."""
    path = saved_plan(settings, tmp_path / "plan.json", rows=8, micro_tokens=512, micro_batches=1, tiers=(1,) * 4)
    monkeypatch.setattr(cap, "context_bytes", lambda device: parse_size(BUDGET) - card.allocated() - (4 << 20))
    config = TrainConfig(**{**settings, "out": str(tmp_path / "card"), "memory": BUDGET, "plan": path})
    train(config)
    assert "was not enough for a step; it goes on in" in capsys.readouterr().err
    assert_same_weights(load_file(tmp_path / "card" / "checkpoints" / "latest" / "trained.safetensors"), expected)


def test_rates_are_measured(monkeypatch):
    monkeypatch.setattr(cost, "_seconds", lambda run, device: torch.cuda.synchronize(device) or run() is None or 1.0)
    rates = cost.measure_rates.__wrapped__(CUDA, torch.float32)
    assert rates.measured and rates.products == 2 * 4096**3


ROUNDED = [("int8", "nf4"), *(pytest.param(kind, kind, marks=pytest.mark.repeat) for kind in ("int8", "nf4"))]


@pytest.mark.parametrize(("storage", "tables"), ROUNDED)
def test_quantized_weights(settings, tmp_path, capsys, storage, tables):
    """A run beside rounded weights trains, goes on, translates, and is merged both ways."""
    levers = {"storage": storage, "tables": tables, "streamed": 0, "approximations": ["quantized"]}
    settings |= {
        "memory": BUDGET,
        "allow": ["quantized"],
        "plan": saved_plan(settings, tmp_path / "plan.json", **levers),
    }
    run(settings, tmp_path / "run", steps=12)
    losses = [line["valid_loss"] for line in metrics(tmp_path / "run") if "valid_loss" in line]
    assert losses[-1] < losses[0]
    assert main(["score", "--run", str(tmp_path / "run"), "--test", *files(settings["valid"][0])]) == 0
    assert capsys.readouterr().out.startswith("BLEU ")
    for into in ("original", "quantized"):
        assert main(["merge", "--run", str(tmp_path / "run"), "--out", str(tmp_path / into), "--into", into]) == 0
    assert re.search(r"relative error of at most \d", capsys.readouterr().err)


def test_streamed_layers(settings, tmp_path, expected, monkeypatch):
    monkeypatch.setattr(
        stream, "_store", lambda weights, slots, device, *_: Slots(weights, slots, device, CardCopies(device))
    )
    path = saved_plan(settings, tmp_path / "plan.json", streamed=4, cuda_graphs=False)
    assert_same_weights(run(settings, tmp_path / "card", memory=BUDGET, plan=path), expected)


class CardCopies(Copies):
    """Copies into slots that are on the card, whose bytes ``Copies`` reaches as it does those of the host."""

    def __init__(self, device: torch.device):
        super().__init__()
        assert device == CUDA


@pytest.mark.parametrize("memory", [None, pytest.param(BUDGET, marks=pytest.mark.repeat)])
def test_inputs_in_host_memory(settings, tmp_path, expected, memory):
    assert_same_weights(run(settings, tmp_path / "card", tier=5, memory=memory), expected)


@pytest.mark.parametrize("memory", [BUDGET, pytest.param(None, marks=pytest.mark.repeat)])
def test_cuda_graphs(settings, tmp_path, memory, monkeypatch, capsys):
    """Graphs are on by default; rows of a budget are filled up, which changes no gradient."""
    replays, replay = [], card.Graph.replay
    monkeypatch.setattr(card.Graph, "replay", lambda self: replays.append(1) or replay(self))
    settings |= {"steps": 6, "memory": memory}
    found = run(settings, tmp_path / "graphs", quiet=False)
    said = capsys.readouterr().err
    assert replays and "steps are captured as CUDA graphs" in said and "could not" not in said
    before = len(replays)
    assert_same_weights(run(settings, tmp_path / "eager", cuda_graphs=False), found)
    assert len(replays) == before


def test_graphs_that_cannot_be_captured(settings, tmp_path, monkeypatch, capsys):
    """The run logs the reason, and goes on as if no capture had been tried."""
    loss = update.sequence_loss

    def waiting(*given):
        found = loss(*given)
        return found + 0 * found.item() if torch.cuda.is_current_stream_capturing() else found

    monkeypatch.setattr(update, "sequence_loss", waiting)
    found = run(settings, tmp_path / "graphs", quiet=False, steps=3)
    said = capsys.readouterr().err
    assert said.count("could not be captured, and all run as they are (") == 1 and not card.Graph.half_ended
    monkeypatch.undo()
    monkeypatch.setattr(planner, "measure_rates", lambda device, dtype: cost.ASSUMED)
    assert_same_weights(run(settings, tmp_path / "eager", cuda_graphs=False, steps=3), found)


@pytest.mark.parametrize(
    "options",
    [{"memory": BUDGET, "dropout": 0.1, "precision": "bf16"}, pytest.param({}, marks=pytest.mark.repeat)],
)
def test_a_killed_run_goes_on(settings, tmp_path, monkeypatch, options):
    settings |= options
    run(settings, tmp_path / "whole")
    kill_at(monkeypatch, 4)
    with pytest.raises(Killed):
        run(settings, tmp_path / "cut")
    monkeypatch.undo()
    monkeypatch.setattr(planner, "measure_rates", lambda device, dtype: cost.ASSUMED)
    train(TrainConfig(**{**settings, "out": str(tmp_path / "cut")}), resume=True, quiet=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_the_commands_of_a_user(lines, small, tmp_path, capsys, monkeypatch):
    """plan, train, resume, translate, score and merge, as the README has them."""
    out, model = str(tmp_path / "run"), small
    flags = ["--model", model, "--method", "adapter", "--params", "10%", "--memory", BUDGET, "--precision", "bf16"]
    flags += ["--max-length", "48", "--batch-tokens", "512"]
    assert main(["plan", *flags]) == 0
    assert ", cuda, memory 1 GiB" in capsys.readouterr().out
    text = [
        "--train",
        *files(lines["train"]),
        "--valid",
        *files(lines["valid"]),
        "--src-lang",
        "en",
        "--tgt-lang",
        "fi",
    ]
    train_flags = ["train", *flags, *text, "--steps", "4", "--eval-every", "2", "--beam", "2", "--out", out]
    assert main(train_flags) == 0
    assert main([*train_flags, "--resume"]) == 0
    monkeypatch.setattr("sys.stdin", open(lines["valid"].source, encoding="utf-8"))
    capsys.readouterr()
    assert main(["translate", "--run", out]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6
    assert main(["score", "--run", out, "--test", *files(lines["valid"])]) == 0
    assert "chrF" in capsys.readouterr().out
    assert main(["score", "--run", out, "--test", *files(lines["valid"]), "--memory", "700MiB"]) == 0


def files(pair: Pair) -> list[str]:
    return [pair.source, pair.target]


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
