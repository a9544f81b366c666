"""Training under a budget of bytes: the plan is kept, and the trained weights are those without it."""

from __future__ import annotations

import dataclasses
import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from petl_mt.cli import main
from petl_mt.config import TrainConfig
from petl_mt.data import Position
from petl_mt.inference import Translator
from petl_mt.models.adapt import prepare_model
from petl_mt.runs import RunFolder
from petl_mt.train import train
from petl_mt.train.budget import plan_for, plan_of_run
from petl_mt.train.loop import run_training
from petl_mt.train.saved_bytes import measure_saved_bytes
from petl_mt.train.setup import Setup, set_up
from safetensors.torch import load_file
from test_resume import Killed, assert_same_run, kill_at

import petl_kernels as pk
from petl_kernels.errors import InputError
from petl_kernels.interop.hf import load_skeleton
from petl_kernels.planning.plan import Plan
from petl_kernels.step import cap

_C = pytest.importorskip("petl_kernels._C")
CPU = torch.device("cpu")


@pytest.fixture
def settings(settings) -> dict:
    return settings | {"method_args": {"rank": 2}, "dropout": 0.0, "batch_tokens": 400, "steps": 4, "eval_every": 2}


def run(settings: dict, out: Path, **changes):
    config = TrainConfig(**{**settings, "out": str(out), **changes})
    result = train(config, quiet=True)
    return result, load_file(RunFolder(out).checkpoints / "latest" / "trained.safetensors")


def saved_plan(settings: dict, path: Path, memory: str, **changes) -> str:
    """Writes a plan for the settings' model, of one tier and with some fields changed; returns its path."""
    config = TrainConfig(**settings, memory=memory, tier=1)  # each tier that a plan may choose is counted
    model, _ = load_skeleton(config.model)
    config = config.resolve(model.config.d_model)
    dataclasses.replace(plan_for(prepare_model(model, config), config, 40, CPU), **changes).save(path)
    return str(path)


def assert_same_weights(found: dict, expected: dict, tolerance: float = 1e-4) -> None:
    assert found.keys() == expected.keys() and found
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=1e-6, msg=name)


@pytest.mark.slow
def test_on_a_cpu_the_text_is_part_of_the_budget(settings, tmp_path, monkeypatch):
    """In the plan, in the limit of the allocator, and in what is told of memory."""
    caps = []
    monkeypatch.setattr(cap, "capped", lambda memory, device: caps.append(memory) or ExitStack())
    with ExitStack() as limits:
        found = set_up(TrainConfig(**settings, memory="4MiB", tier=1), RunFolder(tmp_path / "run"), limits=limits)
    text = found.text.nbytes
    assert found.plan is not None and text > 1000
    assert found.plan.parts["text"] == text and caps == [2**22 - text] and found.plan.host == {}
    assert (found.meter.since_restart() or 0) >= text + sum(p.nbytes for p in found.model.parameters())
    found.plan.save(tmp_path / "plan.json")
    config = dataclasses.replace(found.config, plan=str(tmp_path / "plan.json"))
    with pytest.raises(InputError, match=r"memory 4 MiB: the tokenised text alone takes 5"):
        plan_of_run(found.model, config, found.folder, 40, CPU, 5 * 2**20)


@pytest.mark.slow
def test_a_run_under_a_budget_ends_with_the_weights_of_one_without(settings, tmp_path):
    free, expected = run(settings, tmp_path / "free")
    tight, found = run(settings, tmp_path / "tight", memory="1MiB", tier=1)
    assert_same_weights(found, expected)
    plan = Plan.load(tmp_path / "tight" / "plan.json")
    assert plan.rows * plan.longest < 400 and plan.peak <= 2**20
    assert tight.valid_loss == pytest.approx(free.valid_loss, rel=1e-4)
    assert tight.bleu == free.bleu


def test_the_cap_is_there_during_the_run_and_gone_after_it(settings, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "petl_mt.train.loop.train_to_the_end", lambda run, interrupted: seen.append(_allocate(64 * 2**20))
    )
    monkeypatch.setattr("petl_mt.train.loop.write_result", lambda run: None)
    train(TrainConfig(**{**settings, "memory": "32MiB"}), quiet=True)
    assert seen == [False] and _allocate(64 * 2**20)


def _allocate(size: int) -> bool:
    try:
        torch.empty(size, dtype=torch.uint8)
    except torch.OutOfMemoryError:
        return False
    return True


@pytest.mark.slow
def test_a_plan_that_asks_too_much_is_tightened_and_changes_no_weight(settings, tmp_path, capsys):
    """The plan has whole batches, and the allocator room for less."""
    _, expected = run(settings, tmp_path / "free")
    wrong = {"rows": 10, "micro_tokens": 400, "micro_batches": 1, "tiers": (1, 1), "streamed": 0}
    path = saved_plan(settings, tmp_path / "plan.json", "900KiB", **wrong)
    config = TrainConfig(**{**settings, "out": str(tmp_path / "tight"), "memory": "900KiB", "plan": path})
    train(config)
    assert "was not enough for a step; it goes on in" in capsys.readouterr().err
    found = load_file(RunFolder(tmp_path / "tight").checkpoints / "latest" / "trained.safetensors")
    assert_same_weights(found, expected)


def test_a_tightened_plan_stays(settings, tmp_path):
    """Measuring saved bytes switches to the model's own layers and back to the tiers of the tightened plan."""
    loop = training(settings, tmp_path / "run", memory="2MiB", tier=1)
    loop.update.tighten(dataclasses.replace(loop.plan, tiers=(4, 3)))
    measure_saved_bytes(loop)
    assert [layer.tier for layer in pk.report(loop.model).layers] == [4, 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("storage", "tables"),
    [
        ("int8", "nf4"),
        *(
            pytest.param(*kinds, marks=pytest.mark.repeat)
            for kinds in (("int8", "int8"), ("nf4", "nf4"), ("dense", "nf4"))
        ),
    ],
)
def test_quantized_weights_train_and_translate(settings, tmp_path, storage, tables):
    path = saved_plan(
        settings,
        tmp_path / "plan.json",
        "2MiB",
        storage=storage,
        tables=tables,
        streamed=0,
        approximations=["quantized"],
    )
    result, _ = run(settings, tmp_path / "run", memory="2MiB", plan=path, allow=["quantized"], steps=40, lr=2e-2)
    losses = [line["valid_loss"] for line in metrics(tmp_path / "run") if "valid_loss" in line]
    assert losses[-1] < losses[0]
    assert len(list(Translator(tmp_path / "run").stream(["one two", "", "red house"]))) == 3
    assert result.stored_parameters < result.total_parameters


def gradient_plan(settings: dict, path: Path, memory: str = "2MiB", **changes) -> dict:
    """Returns the options of a run whose plan keeps gradients in bf16."""
    levers = {"rows": 3, "micro_tokens": 120, "micro_batches": 4, "gradients": "bfloat16", "streamed": 0}
    plan = saved_plan(settings, path, memory, **levers, approximations=["bf16-gradients"], **changes)
    return {"memory": memory, "plan": plan, "allow": ["bf16-gradients"]}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_run_with_bf16_gradients_learns_as_one_without(settings, tmp_path, optimizer):
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra 8bit)")
    settings |= {"steps": 8, "optimizer": optimizer}
    exact, _ = run(settings, tmp_path / "exact")
    rounded, _ = run(settings, tmp_path / "rounded", **gradient_plan(settings, tmp_path / "plan.json"))
    assert rounded.losses == pytest.approx(exact.losses, rel=0.02) and rounded.losses != exact.losses
    norms = [
        [line["grad_norm"] for line in metrics(tmp_path / out) if "grad_norm" in line] for out in ("exact", "rounded")
    ]
    assert norms[1] == pytest.approx(norms[0], rel=0.05) and norms[1] != norms[0]
    assert Plan.load(tmp_path / "rounded" / "plan.json").gradients == "bfloat16"


@pytest.mark.slow
def test_a_run_with_bf16_gradients_goes_on_with_the_same_bits(settings, tmp_path, monkeypatch):
    settings |= gradient_plan(settings, tmp_path / "plan.json") | {"steps": 6}
    run(settings, tmp_path / "whole")
    kill_at(monkeypatch, 5)
    with pytest.raises(Killed):
        run(settings, tmp_path / "cut")
    monkeypatch.undo()
    train(TrainConfig(**{**settings, "out": str(tmp_path / "cut")}), resume=True, quiet=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
def test_a_step_that_is_tried_again_forgets_what_it_had_of_bf16_gradients(settings, tmp_path):
    loop = training(settings, tmp_path / "run", **gradient_plan(settings, tmp_path / "plan.json"))
    backward, calls = loop.update._backward, []

    def fail_once(part, tokens):
        calls.append(part.source.numel())
        if len(calls) == 2:
            raise torch.OutOfMemoryError("once")
        return backward(part, tokens)

    batch = loop.batches.take(Position(0, 0))
    loop.update._gradients([batch], batch.target_tokens)
    expected = loop.update.clip(1.0)
    loop.update.zero_gradients()
    loop.update._backward = fail_once
    loop.update._until_it_fits(lambda: loop.update._gradients([batch], batch.target_tokens))
    assert calls[2] < calls[0]  # from the first sentence on, in smaller parts
    torch.testing.assert_close(loop.update.clip(1.0), expected, rtol=0.01, atol=0)


@pytest.mark.slow
def test_a_plan_with_bf16_gradients_that_asks_too_much_is_tightened(settings, tmp_path, capsys):
    options = gradient_plan(settings, tmp_path / "plan.json", "900KiB", tiers=(1, 1))
    path = Path(options["plan"])
    dataclasses.replace(Plan.load(path), rows=10, micro_tokens=400, micro_batches=1).save(path)
    train(TrainConfig(**{**settings, **options, "out": str(tmp_path / "run")}))
    assert "was not enough for a step; it goes on in" in capsys.readouterr().err


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        "lora",
        pytest.param("adapter", marks=pytest.mark.repeat),
        pytest.param("cross-attention", marks=pytest.mark.slow),
    ],
)
def test_streamed_layers_train_to_the_same_weights(settings, tmp_path, method):
    settings |= {"method": method, "method_args": {}}
    _, expected = run(settings, tmp_path / "free")
    path = saved_plan(settings, tmp_path / "plan.json", "2MiB", streamed=2)
    loop = training(settings, tmp_path / "streamed", memory="2MiB", plan=path)
    assert len(loop.model.petl.streamed.paths) == 2
    run_training(loop)
    found = load_file(RunFolder(tmp_path / "streamed").checkpoints / "latest" / "trained.safetensors")
    assert_same_weights(found, expected, 1e-3)  # AdamW divides by what may be almost nothing
    assert not list(tmp_path.glob("petl-mt-*"))


def training(settings: dict, out: Path, **changes) -> Setup:
    config = TrainConfig(**{**settings, "out": str(out), **changes})
    return set_up(config, RunFolder(out), resuming=False, quiet=True)


@pytest.mark.slow
def test_evaluation_takes_smaller_batches_where_it_has_to(settings, tmp_path, capsys):
    path = saved_plan(settings, tmp_path / "plan.json", "1200KiB", evaluation_tokens=40_000, search=None)
    out = tmp_path / "run"
    settings |= {"valid": settings["train"], "beam": 4}
    train(TrainConfig(**{**settings, "out": str(out), "memory": "1200KiB", "plan": path}))
    assert "evaluation goes on in batches of" in capsys.readouterr().err


@pytest.mark.slow
def test_a_plan_for_another_run_is_refused(settings, tmp_path):
    path = saved_plan(settings, tmp_path / "plan.json", "2MiB")
    with pytest.raises(InputError, match="for 2 MiB; expected one for the 1.5 MiB"):
        training(settings, tmp_path / "run", memory="1.5MiB", plan=path)
    with pytest.raises(InputError, match="plan: for M2M100ForConditionalGeneration with"):
        training(settings | {"method_args": {"rank": 3}}, tmp_path / "run", memory="2MiB", plan=path)
    with pytest.raises(InputError, match="needs the budget"):
        TrainConfig(**settings, plan=path).check()
    short = saved_plan(settings, tmp_path / "short.json", "2MiB", longest=3)
    with pytest.raises(InputError, match="for sentences of 3 tokens"):
        training(settings, tmp_path / "run", memory="2MiB", plan=short)
    for change, message in (
        ({"device": "cuda"}, "for cuda; expected one for cpu"),
        ({"precision": "bf16"}, "for products in bf16; expected one for the fp32 of --precision"),
        ({"batch_tokens": 100}, "for updates of 100 tokens; expected the 400 of --batch-tokens"),
        ({"tables": "nf4"}, "uses quantized; expected --allow quantized beside it"),
        ({"gradients": "bfloat16"}, "uses bf16-gradients; expected --allow bf16-gradients"),
        ({"optimizer": "adamw8bit"}, "uses 8bit-optimizer; expected --allow 8bit-optimizer"),
    ):
        other = saved_plan(settings, tmp_path / "other.json", "2MiB", **change)
        with pytest.raises(InputError, match=message):
            training(settings, tmp_path / "run", memory="2MiB", plan=other)
    assert not (tmp_path / "run").exists()


def test_the_command_prints_a_plan_and_writes_it(settings, tmp_path, capsys):
    command = ["plan", "--model", settings["model"], "--method", "lora", "--method-arg", "rank=2", "--max-length", "40"]
    command += ["--batch-tokens", "400", "--memory", "2MiB", "--device", "cpu"]
    assert main([*command, "--json", str(tmp_path / "plan.json")]) == 0
    out = capsys.readouterr().out
    assert "frozen weights" in out and "2 MiB (0.0021 GB)" in out
    found, _ = run(settings, tmp_path / "run", memory="2MiB", plan=str(tmp_path / "plan.json"))
    assert found.steps == 4
    assert main([*command, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "M2M100ForConditionalGeneration"


@pytest.mark.slow
def test_a_config_file_alone_is_enough_for_a_plan(settings, tmp_path, capsys):
    config = Path(settings["model"], "config.json").read_text()
    (tmp_path / "model-config.json").write_text(config)
    command = ["plan", "--model", str(tmp_path / "model-config.json"), "--method", "lora", "--memory", "8MB"]
    assert main([*command, "--tier", "2", "--max-length", "40", "--batch-tokens", "400"]) == 0
    assert "7.63 MiB (0.008 GB)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--memory", "8 gib bytes"], "memory size '8 gib bytes'"),
        ([], "memory: not given"),
        (["--memory", "1GiB", "--device", "tpu"], "device 'tpu': expected cpu or cuda"),
        (
            ["--memory", "1GiB", "--allow", "rounding"],
            "allow 'rounding': expected quantized or 8bit-optimizer or bf16-",
        ),
        (["--memory", "1GiB", "--tier", "9"], "tier 9"),
        (["--memory", "1GiB", "--model", "new"], "model 'new'"),
        (["--memory", "1GiB", "--model", "nowhere.json"], "no such file"),
        (["--memory", "1GiB", "--method", "lorra"], "method 'lorra'"),
    ],
)
def test_wrong_flags_of_plan(settings, capsys, flags, message):
    model = [] if "--model" in flags else ["--model", settings["model"]]
    assert main(["plan", *model, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_cap_module_says_what_was_taken(settings, tmp_path):
    with ExitStack() as limits:
        config = TrainConfig(**{**settings, "out": str(tmp_path / "run"), "memory": "2MiB"})
        loop = set_up(config, RunFolder(tmp_path / "run"), False, True, limits)
        before = _C.cpu_bytes()
        loop.update.try_worst_batch(loop.tokenizer.eos_token_id, loop.meter)
        assert 0.5 * loop.plan.peak < cap.peak(CPU) - before + sum(p.nbytes for p in loop.model.parameters()) <= 2**21


FAILURES = {"AcceleratorError": "the device failed (CUDA error: gone)", "OutOfMemoryError": "out of memory"}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_device_that_fails_is_one_line(settings, capsys, monkeypatch, kind):
    def fail(run):
        raise type(kind, (RuntimeError,), {})("CUDA error: gone\nmore lines")

    monkeypatch.setattr("petl_mt.train.run_training", fail)
    pair = settings["train"][0]
    command = [
        "train",
        "--model",
        settings["model"],
        "--out",
        settings["out"],
        "--method",
        "lora",
        "--max-length",
        "40",
    ]
    command += ["--src-lang", "en", "--tgt-lang", "de", "--train", pair.source, pair.target]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert FAILURES[kind] in error and error.splitlines()[-1].startswith("petl-mt train: ")
