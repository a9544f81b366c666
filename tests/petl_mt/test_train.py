"""The loop: gradients, what is trained, early stopping, what is written, what stops it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from petl_mt.config import TrainConfig
from petl_mt.runs import RunFolder
from petl_mt.train import TrainingStopped, result, train
from petl_mt.train.loop import run_training, train_one_update
from petl_mt.train.setup import Setup, set_up
from safetensors.torch import load_file
from transformers import M2M100ForConditionalGeneration

from petl_kernels import dispatch
from petl_kernels.errors import InputError
from petl_kernels.methods import METHODS


def training(settings: dict, **changes) -> Setup:
    """Everything that a run sets up, before its first step."""
    config = TrainConfig(**{**settings, **changes})
    return set_up(config, RunFolder(Path(config.out)), resuming=False, quiet=True)


def gradients_of_first_update(loop: Setup) -> dict[str, torch.Tensor]:
    found = {}
    loop.optimizer.step = lambda: found.update(
        {name: p.grad.clone() for name, p in loop.model.named_parameters() if p.grad is not None}
    )
    loop.model.train()
    train_one_update(loop)
    return found


def assert_same_gradients(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_accumulation_gives_the_gradient_of_one_large_batch(settings, tmp_path):
    settings |= {"method": "full", "method_args": {}, "dropout": 0.0, "clip": 0.0}
    one = training(settings, batch_tokens=64, accumulate=3, max_length=30)
    accumulated = gradients_of_first_update(one)
    joined = training(settings, out=str(tmp_path / "joined"), batch_tokens=64, max_length=30)
    indices = [i for batch in one.batches.epoch_indices(0)[:3] for i in batch]
    joined.batches.epoch_indices(0)[0] = torch.tensor(indices).numpy()
    assert (
        len({len(batch) for batch in one.batches.epoch_indices(0)[:3]}) > 1
    )  # unequal batches, or a mean of means would pass
    assert_same_gradients(accumulated, gradients_of_first_update(joined))


def test_micro_batches_give_the_gradient_of_the_batch(settings, tmp_path):
    settings |= {"method": "full", "method_args": {}, "dropout": 0.0}
    whole = gradients_of_first_update(training(settings))
    split = training(settings, out=str(tmp_path / "split"))
    split.update.micro_tokens = 23
    calls = []
    backward = split.update._backward
    split.update._backward = lambda batch, tokens: calls.append(len(batch.source)) or backward(batch, tokens)
    assert_same_gradients(gradients_of_first_update(split), whole)
    assert len(calls) > 3


def test_a_memory_budget_splits_batches_and_changes_no_gradient(settings, tmp_path):
    settings |= {"method_args": {"rank": 2}, "dropout": 0.0, "batch_tokens": 400}
    whole = gradients_of_first_update(training(settings))
    small = training(
        settings, out=str(tmp_path / "small"), memory="1MiB", tier=1
    )  # a plan that test_memory.py has, too
    assert small.update.micro_tokens < 400
    assert_same_gradients(gradients_of_first_update(small), whole)


def test_clipping_bounds_the_norm(settings):
    norms = []
    for clip in (0.0, 1e-3):
        loop = training(settings, out=f"{settings['out']}{clip}", clip=clip)
        gradients = gradients_of_first_update(loop)
        norms.append(torch.stack([g.norm() for g in gradients.values()]).norm().item())
    assert norms[0] > 2e-3 and norms[1] == pytest.approx(1e-3, rel=1e-3)


FIRST = ("full", "lora", "adapter", "prefix", "bitfit")  # tests/methods has what each of them trains


@pytest.mark.parametrize("method", [m if m in FIRST else pytest.param(m, marks=pytest.mark.repeat) for m in METHODS])
def test_every_method_trains_what_it_should_and_nothing_else(settings, parent, method):
    base = M2M100ForConditionalGeneration.from_pretrained(parent / "model").state_dict()
    settings |= {"method": method, "method_args": {}, "steps": 3, "valid": [], "lr": None}
    loop = training(settings)
    result, run = run_training(loop), RunFolder(Path(settings["out"]))
    assert run.model.is_dir() == (method == "full") and run.adapter.is_dir() == (method != "full")
    trained = load_file(run.checkpoints / "latest" / "trained.safetensors")
    assert sum(t.numel() for t in trained.values()) == result.trained_parameters >= result.stored_parameters
    assert any(name not in base or not torch.equal(tensor, base[name]) for name, tensor in trained.items())
    frozen = {name: p for name, p in loop.model.named_parameters() if not p.requires_grad}
    assert (method == "full") == (not frozen) and not frozen.keys() & trained.keys()
    assert all(torch.equal(p, base[name]) for name, p in frozen.items())


def test_loss_falls_and_the_parent_can_translate(parent):
    losses = [json.loads(line) for line in (parent / "metrics.jsonl").read_text().splitlines()]
    valid = [line["valid_loss"] for line in losses if "valid_loss" in line]
    train_loss = [line["loss"] for line in losses if "loss" in line]
    assert train_loss[-1] < 0.5 * train_loss[0] and valid[-1] < valid[0]
    scores = json.loads((parent / "result.json").read_text())["scores"]["en-de"]
    assert scores["bleu"] > 5 and scores["chrf"] > 40


def test_what_a_run_folder_holds(settings, parent):
    result = train(TrainConfig(**settings), quiet=True)
    run = RunFolder(Path(settings["out"]))
    names = {path.name for path in run.path.iterdir()}
    assert names == {
        "config.yaml", "text.json", "metrics.jsonl", "adapter", "checkpoints", "result.json", "README.md",
        "valid.best.hyp",
    }  # fmt: skip
    assert yaml.safe_load(run.config.read_text())["lr"] == 0.01
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "valid_loss" in line] == [3, 6, 8]
    assert {"loss", "lr", "grad_norm", "target_tokens_per_second", "memory_bytes"} <= lines[0].keys()
    assert any("bleu" in line for line in lines)
    written = json.loads((run.path / "result.json").read_text())
    assert written["scores"]["en-de"]["bleu_signature"].startswith("nrefs:1|") and result.bleu is not None
    assert written["saved_bytes_per_token"] > 0 and written["seconds_per_step"] > 0
    assert len((run.path / "valid.best.hyp").read_text(encoding="utf-8").splitlines()) == 17
    card = (run.path / "README.md").read_text()
    assert "lora" in card and "BLEU" in card and "nrefs:1" in card and "train en-de | 200 | 200" in card
    assert str(parent) not in card and "petl-mt merge" in card and "base model `run/model`" in card.lower()
    steps = sorted(path.name for path in run.checkpoints.glob("step-*"))
    links = {name: (run.checkpoints / name).readlink().name for name in ("latest", "best")}
    assert links["latest"] == "step-8" and set(steps) == set(links.values())
    assert sorted(p.name for p in (run.checkpoints / "latest").iterdir()) == [
        "checksums.json", "optimizer.safetensors", "progress.json", "random.safetensors", "trained.safetensors"
    ]  # fmt: skip


@pytest.fixture
def prescribed(monkeypatch):
    """Replaces validation losses by given ones, one an evaluation."""

    def prescribe(*losses: float) -> None:
        given = iter(losses)
        monkeypatch.setattr("petl_mt.train.evaluation.validation_loss", lambda *rest: next(given))

    return prescribe


def test_the_best_checkpoint_is_what_is_kept(settings, prescribed):
    prescribed(3.0, 1.5, float("nan"), 2.0)
    result = train(TrainConfig(**{**settings, "steps": 4, "eval_every": 1}), quiet=True)
    assert (result.best_step, result.steps, result.valid_loss) == (2, 4, 1.5)
    run = RunFolder(Path(settings["out"]))
    assert sorted(path.name for path in run.checkpoints.glob("step-*")) == ["step-2", "step-4"]
    best, latest = (load_file(run.checkpoints / name / "trained.safetensors") for name in ("best", "latest"))
    assert any(not torch.equal(best[name], latest[name]) for name in best)
    adapter = load_file(next(run.adapter.glob("*.safetensors")))
    assert sum(t.double().sum() for t in adapter.values()) == sum(t.double().sum() for t in best.values())


def test_early_stopping(settings, prescribed):
    prescribed(3.0, 2.0, 2.5, 1.0, 1.1, 1.0)
    result = train(TrainConfig(**{**settings, "steps": 50, "eval_every": 2, "patience": 2}), quiet=True)
    assert (result.best_step, result.steps) == (8, 12)


def test_bf16_trains_fp32_adapters_beside_a_bf16_base(settings):
    loop = training(settings, precision="bf16", label_smoothing=0.0)
    dtypes = {p.requires_grad: p.dtype for p in loop.model.parameters() if p.dim() > 1}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    bf16 = run_training(loop)
    fp32 = train(TrainConfig(**{**settings, "out": settings["out"] + "32", "label_smoothing": 0.0}), quiet=True)
    assert bf16.losses == pytest.approx(fp32.losses, rel=0.03) and bf16.losses != fp32.losses
    assert bf16.saved_bytes_per_token < fp32.saved_bytes_per_token


def test_dropout_settings_reach_the_model(settings):
    loop = training(settings, dropout=0.25, attention_dropout=0.125)
    layer = loop.model.model.decoder.layers[0]
    assert (layer.dropout, layer.self_attn.dropout, layer.encoder_attn.dropout) == (0.25, 0.125, 0.125)
    assert (loop.model.model.encoder.dropout, layer.activation_dropout) == (0.25, 0.0)


@pytest.mark.parametrize("lr", [1e38, 1e30])
def test_a_loss_that_is_no_number_stops_the_run(settings, lr):
    """The rate is near zero through warm-up to step 3, where a checkpoint is written, and absurd after that."""
    settings |= {"steps": 40, "eval_every": 1, "lr": lr, "warmup": 0, "valid": []}
    with pytest.raises(TrainingStopped) as stop:
        train(TrainConfig(**settings), quiet=True)
    message = str(stop.value)
    kept = RunFolder(Path(settings["out"])).checkpoints / "latest"
    assert "training stopped at step" in message and ("nan" in message or "inf" in message)
    assert str(kept.resolve()) in message and "\n" not in message
    assert load_file(kept / "trained.safetensors")


def test_nothing_is_written_before_the_first_checkpoint_can_be(settings):
    with pytest.raises(InputError, match="rank"):
        train(TrainConfig(**{**settings, "method_args": {"rank": 1000}}), quiet=True)
    assert not Path(settings["out"]).exists()


def test_tensorboard_is_written_when_asked(settings):
    pytest.importorskip("tensorboard")
    train(TrainConfig(**{**settings, "steps": 2, "valid": [], "tensorboard": True}), quiet=True)
    assert list(Path(settings["out"]).glob("tensorboard/events*"))


def test_what_a_check_turned_down_is_in_the_log_once(settings, monkeypatch, capsys):
    """A backend is turned down in the first update, another in the third, another while the run is scored."""
    settings |= {"steps": 4, "eval_every": 4}
    errors = {}
    monkeypatch.setattr(dispatch, "_parity_errors", errors)

    def found(op: str) -> None:
        errors[op, "triton", torch.device("cuda", 0), torch.bfloat16] = "y is off by 1, allowed 0.1"

    loop = set_up(TrainConfig(**settings), RunFolder(Path(settings["out"])), resuming=False, quiet=False)
    gradients, score = loop.update.gradients, result.score_validation_text
    found_in = {0: ["lora_linear"], 2: ["attention"]}

    def with_first_uses(*given):
        for op in found_in.get(loop.progress.step, []):
            found(op)
        return gradients(*given)

    def score_with_first_use(run):
        found("dequantize")
        return score(run)

    loop.update.gradients = with_first_uses
    monkeypatch.setattr(result, "score_validation_text", score_with_first_use)
    run_training(loop)
    said = [line for line in capsys.readouterr().err.splitlines() if "is not used" in line]
    expected = [
        f"triton {op} is not used on cuda:0 in bfloat16: y is off by 1, allowed 0.1"
        for op in ("lora_linear", "attention", "dequantize")
    ]
    assert said == expected
    lines = [json.loads(line) for line in (Path(settings["out"]) / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["turned_down"]) for line in lines if "turned_down" in line] == list(
        zip((1, 3, 4), expected, strict=True)
    )
