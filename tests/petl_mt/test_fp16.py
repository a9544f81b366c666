"""Training in fp16: losses are scaled, updates that overflow are skipped, and a run resumes with its scale."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_graphs import Recorder
from layers.lean_cases import adapted, exact_rms_norms, ragged
from methods.models import FAMILIES, build
from petl_mt.config import TrainConfig
from petl_mt.inference import Translator
from petl_mt.models import precision
from petl_mt.models.adapt import cast_frozen_matrices, prepare_model
from petl_mt.runs import RunFolder
from petl_mt.train import TrainingStopped, loop, setup, train, update
from petl_mt.train.loop import run_training
from petl_mt.train.setup import Setup, set_up
from petl_mt.train.update import Update
from safetensors.torch import load_file
from torch import Tensor

import petl_kernels as pk
from petl_kernels.errors import InputError
from petl_kernels.layers.lean import LeanLayer
from petl_kernels.layers.wide_linear import WIDE
from petl_kernels.methods import METHODS
from petl_kernels.methods.adapter import BottleneckAdapter
from petl_kernels.planning import planner
from petl_kernels.planning.plan import Plan


def training(settings: dict, **changes) -> Setup:
    config = TrainConfig(**{"precision": "fp16", **settings, **changes})
    return set_up(config, RunFolder(Path(config.out)), quiet=True)


def metrics(out: str) -> list[dict]:
    lines = (Path(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def latest(out: str) -> tuple[dict[str, Tensor], dict]:
    folder = Path(out) / "checkpoints" / "latest"
    return load_file(folder / "trained.safetensors"), json.loads((folder / "progress.json").read_text())


@pytest.fixture
def overflowing(monkeypatch):
    """Returns a function that makes gradients of the given updates infinite."""

    def at(*steps: int) -> None:
        make, now = Update.gradients, []
        train_one = loop.train_one_update

        def numbered(run):
            now[:] = [run.progress.step + 1]
            train_one(run)

        def gradients(self, batches, tokens):
            loss = make(self, batches, tokens)
            if now[0] in steps:
                parameter = self.parameters[0]
                found = parameter.grad if self.rounded is None else self.rounded.sum_of(parameter)
                found.view(-1)[0] = torch.inf
            return loss

        monkeypatch.setattr(loop, "train_one_update", numbered)
        monkeypatch.setattr(Update, "gradients", gradients)

    return at


def test_fp16_trains_fp32_adapters_beside_an_fp16_base(settings):
    run = training(settings, label_smoothing=0.0)
    dtypes = {p.requires_grad: p.dtype for p in run.model.parameters() if p.dim() > 1}
    assert dtypes == {True: torch.float32, False: torch.float16}
    fp16 = run_training(run)
    fp32 = train(
        TrainConfig(**{**settings, "out": settings["out"] + "32", "label_smoothing": 0.0, "precision": "fp32"}), True
    )
    assert fp16.losses == pytest.approx(fp32.losses, rel=0.005) and fp16.losses != fp32.losses
    assert (fp16.saved_bytes_per_token or 0) < (fp32.saved_bytes_per_token or 0) and fp16.overflows == 0
    steps = [line for line in metrics(settings["out"]) if "loss" in line]
    assert all(line["loss_scale"] == 2.0**16 and line["overflows"] == 0 for line in steps)


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2, "clip": 0.0}], ids=str)
def test_gradients_have_no_scale_when_they_are_clipped(settings, changes):
    """The norm and what the optimiser gets are those of fp32, within the rounding of fp16."""
    options = {**settings, **changes, "dropout": 0.0, "method_args": {"rank": 2}}
    runs = []
    for given in ("fp16", "fp32"):  # one after the other: a process has one of accelerate's states
        runs.append(training(options, precision=given, out=settings["out"] + given))
        loop.train_one_update(runs[-1])
    narrow, wide = runs
    norms = [metrics(run.config.out)[0]["grad_norm"] for run in runs]
    assert norms[0] == pytest.approx(norms[1], rel=0.01)
    for ours, theirs in zip(narrow.update.parameters, wide.update.parameters, strict=True):
        first, expected = (run.optimizer.state[p]["exp_avg"] for run, p in ((narrow, ours), (wide, theirs)))
        assert (first - expected).norm() <= 0.05 * expected.norm()  # Adam's moment: the gradient times 0.1


@pytest.mark.parametrize("way", ["adamw", "bf16-gradients", pytest.param("adamw8bit", marks=pytest.mark.repeat)])
def test_an_update_that_overflows_is_skipped_counted_and_told(settings, overflowing, capsys, monkeypatch, way):
    if way == "adamw8bit":
        pytest.importorskip("bitsandbytes")
        settings["optimizer"] = way
    if way == "bf16-gradients":
        prepare = setup.prepare_model

        def rounded(plain, config):
            from petl_kernels.step.gradients import RoundedGradients

            model: Any = prepare(plain, config)
            model.petl_gradients = RoundedGradients(p for p in model.parameters() if p.requires_grad)
            return model

        monkeypatch.setattr(setup, "prepare_model", rounded)
    overflowing(2)
    run = training({**settings, "steps": 3, "eval_every": 1})
    before = []
    move = Update.step

    def watched(self, lr):
        before.append([p.detach().clone() for p in self.parameters])
        return move(self, lr)

    monkeypatch.setattr(Update, "step", watched)
    run.log.quiet = False
    result = run_training(run)
    same = [all(map(torch.equal, a, b)) for a, b in zip(before[:-1], before[1:], strict=True)]
    assert same == [False, True] and result.overflows == 1 and result.steps == 3
    assert "step 2: a gradient overflowed in fp16; the update is skipped, loss scale 32768" in capsys.readouterr().err
    skipped = [line for line in metrics(settings["out"]) if line.get("overflow")]
    assert [(line["step"], line["loss_scale"], line["overflows"]) for line in skipped] == [(2, 2.0**15, 1)]
    assert all("grad_norm" not in line for line in metrics(settings["out"]) if line["step"] == 2)
    assert json.loads((Path(settings["out"]) / "result.json").read_text())["overflows"] == 1


@pytest.mark.slow
def test_a_run_that_overflowed_resumes_with_the_same_bits(settings, tmp_path, overflowing, monkeypatch):
    overflowing(2, 5)
    settings |= {"precision": "fp16", "steps": 8, "eval_every": 3}
    whole, halves = str(tmp_path / "whole"), str(tmp_path / "halves")
    train(TrainConfig(**{**settings, "out": whole}), quiet=True)
    move, moved = Update.step, []

    def killed(self, lr):
        moved.append(lr)
        if len(moved) == 5:
            raise KeyboardInterrupt
        return move(self, lr)

    monkeypatch.setattr(Update, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**{**settings, "out": halves}), quiet=True)
    monkeypatch.setattr(Update, "step", move)
    assert latest(halves)[1]["loss_scale"] == {"scale": 2.0**15, "updates": 1}
    train(TrainConfig(**{**settings, "out": halves}), resume=True, quiet=True)
    (found, after), (expected, wanted) = latest(halves), latest(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for progress in (after, wanted):
        assert progress["loss_scale"] == {"scale": 2.0**14, "updates": 3} and progress["overflows"] == 2


def test_a_loss_that_is_no_number_at_any_scale_stops_the_run(settings, overflowing):
    overflowing(*range(3, 60))
    with pytest.raises(TrainingStopped) as stop:
        train(TrainConfig(**{**settings, "precision": "fp16", "steps": 60, "valid": []}), quiet=True)
    assert "training stopped at step 32: gradients overflow at every loss scale, 6.10352e-05 by now" in str(stop.value)


def test_graphs_hold_the_scale(settings, tmp_path, overflowing, monkeypatch):
    """A captured step reads the scale where an earlier one has written it, and skips what overflows."""
    overflowing(4)
    monkeypatch.setattr(update, "CudaGraphs", lambda device: Recorder())
    for module in (setup, planner):
        monkeypatch.setattr(module, "check_device", lambda device: None)
    settings |= {"dropout": 0.0, "method_args": {"rank": 2}}
    captured = run_training(training(settings, out=str(tmp_path / "graphs"), cuda_graphs=True))
    eager = run_training(training(settings, out=str(tmp_path / "eager")))
    assert captured.overflows == eager.overflows == 1
    assert captured.losses == pytest.approx(eager.losses, rel=1e-3)
    assert latest(str(tmp_path / "graphs"))[1]["loss_scale"] == latest(str(tmp_path / "eager"))[1]["loss_scale"]


@pytest.mark.slow
def test_a_plan_counts_what_fp16_takes(settings):
    result = train(TrainConfig(**{**settings, "steps": 4, "memory": "1MiB", "tier": 2, "precision": "fp16"}), True)
    plan = Plan.load(Path(settings["out"]) / "plan.json")
    assert plan.precision == "fp16" and plan.peak <= 2**20
    assert result.peak_memory_bytes is not None and result.peak_memory_bytes <= plan.memory
    translator = Translator(settings["out"])  # within the run's budget, under fp16's autocast
    assert len(list(translator.stream(["one two", "red house"]))) == 2


@pytest.mark.parametrize(("capability", "default"), [((7, 5), "fp16"), ((8, 0), "fp32")])
def test_the_default_is_fp16_where_a_card_has_no_bf16(monkeypatch, capability, default):
    card = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert precision.with_precision(TrainConfig(), card).precision == default
    assert precision.with_precision(TrainConfig(), torch.device("cpu")).precision == "fp32"
    assert precision.with_precision(TrainConfig(precision="fp32"), card).precision == "fp32"
    if default == "fp16":
        with pytest.raises(InputError, match="^precision bf16: Tesla T4 has no bf16; expected fp16 or fp32$"):
            precision.with_precision(TrainConfig(precision="bf16"), card)


# A ReLU's gradient jumps where rounding takes a hidden unit across 0, in either model: a smooth activation instead.
SMOOTH = dict.fromkeys(("m2m100", "seamless"), {"activation_function": "silu"})
ALWAYS = {(family, "lora") for family in (*FAMILIES, "seamless")}
ALWAYS |= {("t5", "adapter"), ("t5", "full"), ("m2m100", "adapter"), ("seamless", "parallel")}


@pytest.mark.parametrize(
    ("family", "method"),
    [
        pytest.param(f, m, marks=() if (f, m) in ALWAYS else pytest.mark.repeat)
        for f in (*FAMILIES, "mt5", "seamless")
        for m in METHODS
    ],
)
def test_the_error_is_at_most_twice_the_plain_models(family, method):
    """Against float64, with the dtypes, the autocast and a loss scale of the trainer, in every kind of tier."""
    exact = adapted(family, method, **SMOOTH.get(family, {}))
    for module in exact.modules():
        if isinstance(module, BottleneckAdapter):
            module.activation = "silu"
    inputs = ragged(exact, rows=6)
    expected = gradients(exact, inputs)
    model = copy.deepcopy(exact).float()
    cast_frozen_matrices(model, torch.float16)
    assert_no_worse_than_plain(model, inputs, expected, 0.05)


def assert_no_worse_than_plain(model, inputs, expected: dict[str, Tensor], most: float) -> None:
    """Compares the plain model, whose error is below ``most``, and lean ones with float64."""
    plain = distance(gradients(model, inputs, narrow=True), expected)
    assert plain < most
    for tier in (1, 3, 5):
        lean = distance(gradients(pk.lean(copy.deepcopy(model), tier), inputs, narrow=True), expected)
        assert lean <= 2 * plain, (tier, lean, plain)


def gradients(model, inputs, scale: float = 2.0**12, narrow: bool = False) -> dict[str, Tensor]:
    """Returns the gradients by name. narrow: under autocast in fp16, which ends before backward, as in the trainer."""
    with torch.autocast("cpu", torch.float16, enabled=narrow):
        loss = model(**inputs).loss * scale
    loss.backward()
    found = {name: p.grad.double() / scale for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    difference = torch.stack([(found[name] - expected[name]).norm() for name in expected]).norm()
    return (difference / torch.stack([value.norm() for value in expected.values()]).norm()).item()


def test_dora_starts_from_the_model_that_is_cast():
    """m follows where frozen matrices are cast after the adapter has been made."""
    model = prepare_model(build("mbart"), TrainConfig(method="dora", precision="bf16", dropout=0.0)).eval()
    inputs = ragged(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        adapted = model(**inputs).logits
        assert torch.equal(adapted, pk.use_adapter(model, None)(**inputs).logits)


BEYOND = 3e5  # a factor that lets the outputs of T5's last projections leave the range of fp16
ON_WO = {"lora": {"rank": 2, "targets": ["q", "wo"]}}
FEW = ("lora", "adapter", "adapter-sublayer", "parallel", "full")


@pytest.mark.parametrize("family", ["t5", pytest.param("umt5", marks=pytest.mark.repeat)])
@pytest.mark.parametrize("method", [m if m in FEW else pytest.param(m, marks=pytest.mark.repeat) for m in METHODS])
def test_outputs_of_t5_beyond_the_range_of_fp16_are_finite_and_right(family, method):
    """The last projection, what an adapter makes of it and the sums behind it are fp32, as transformers loads T5.

    The reference is in float64. A model whose adapters compute in fp16 has infinite losses.
    """
    model: Any = build(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("wo.weight"):
                parameter.mul_(BEYOND)
    config = TrainConfig(method=method, method_args=ON_WO.get(method, {}), precision="fp16", dropout=0.0)
    exact = exactly(prepare_model(copy.deepcopy(model), replace(config, precision="fp32")).double())
    model = prepare_model(model, config)
    with torch.no_grad():
        for own, other in zip(pk.trainable_parameters(model), pk.trainable_parameters(exact), strict=True):
            other.add_(0.05 * torch.randn_like(other) * other.abs().mean().clamp(min=0.1))
            own.copy_(other)
    wide = [module for module in model.modules() if isinstance(module, tuple(WIDE.values()))]
    assert len(wide) == 4 and {module.weight.dtype for module in wide} == {torch.float32}
    seen: list[Tensor] = []
    for module in wide:
        module.register_forward_hook(lambda module, given, output: seen.append(output.abs().max()))
    inputs = ragged(exact, rows=6)
    expected = gradients(exact.train(), inputs)
    assert_no_worse_than_plain(model.train(), inputs, expected, 0.1)
    assert max(seen) > 70_000


def exactly(model):
    exact_rms_norms(model)
    return model


def runs_by_rule(model) -> bool:
    """Returns whether every lean layer has run by its rule."""
    layers = [module for module in model.modules() if isinstance(module, LeanLayer)]
    rules = [rule for layer in layers for rule in layer.bound()._rules.values()]
    return len(rules) >= len(layers) > 0 and not any(isinstance(rule, str) for rule in rules)


@pytest.mark.parametrize("family", ["t5", "umt5"])
def test_t5_runs_by_the_rule_under_autocast_and_as_transformers_loads_it(family):
    exact = exactly(adapted(family, "lora"))
    inputs = ragged(exact, rows=6)
    expected = gradients(exact, inputs)
    narrow, loaded = (copy.deepcopy(exact).float() for _ in range(2))
    cast_frozen_matrices(narrow, torch.float16)
    for name, parameter in loaded.named_parameters():
        if not name.endswith("wo.weight") and not parameter.requires_grad:
            parameter.data = parameter.data.half()
    for model, autocast in ((narrow, True), (loaded, False)):
        plain = distance(gradients(model, inputs, narrow=autocast), expected)
        for tier in (1, 2, 3, 4, 5):
            lean = pk.lean(copy.deepcopy(model), tier)
            assert distance(gradients(lean, inputs, narrow=autocast), expected) <= 2 * plain < 0.05, (autocast, tier)
            assert runs_by_rule(lean)


def test_sums_of_t5_that_overflow_are_cut_and_have_no_gradient():
    """In the first layers, whose stream is fp16: as the plain model does, whose gradients these are."""
    model = adapted("t5", "lora", dtype=torch.float32)
    with torch.no_grad():
        for stack in (model.encoder, model.decoder):
            for part in stack.block[0].layer[:-1]:
                attention = part.SelfAttention if hasattr(part, "SelfAttention") else part.EncDecAttention
                attention.o.weight[:4] *= 2e4
    cast_frozen_matrices(model, torch.float16)
    seen: list[Tensor] = []
    norms = [block.layer[-1].layer_norm for block in (model.encoder.block[0], model.decoder.block[0])]
    hooks = [norm.register_forward_pre_hook(lambda norm, given: seen.append(given[0])) for norm in norms]
    inputs = ragged(model, rows=6)
    expected = gradients(model, inputs, narrow=True)
    assert len(seen) == 2 and all(0 < (h.abs() == 64504).double().mean() < 0.2 for h in seen)
    for hook in hooks:
        hook.remove()
    for tier in (1, 3, 5):
        lean = pk.lean(copy.deepcopy(model), tier)
        assert distance(gradients(lean, inputs, narrow=True), expected) < 0.01, tier
        assert runs_by_rule(lean)


def test_tiers_of_t5_in_fp16_drop_the_same():
    config = TrainConfig(method="lora", method_args={"dropout": 0.25}, precision="fp16", dropout=0.25)
    model = prepare_model(build("t5"), config).train()
    inputs = ragged(model, rows=6)
    found = []
    for tier in (1, 3, 5):
        torch.manual_seed(3)
        found.append(gradients(pk.lean(copy.deepcopy(model), tier), inputs, narrow=True))
    assert distance(found[1], found[0]) < 1e-3 and distance(found[2], found[0]) < 1e-3
