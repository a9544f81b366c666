"""AdamW with moments of 8 bits: its bytes, its steps beside AdamW's, its checkpoints, and when a plan may choose it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from methods.models import build
from petl_mt.cli import main
from petl_mt.config import TrainConfig
from petl_mt.runs import RunFolder
from petl_mt.runs.checkpoint import Checkpoints
from petl_mt.train import train
from petl_mt.train.optimizer import make_optimizer, undecayed
from petl_mt.train.setup import set_up
from test_resume import Killed, assert_same_run, kill_at
from torch import nn

import petl_kernels as pk
from petl_kernels.planning.resident import OPTIMIZER_BYTES, SMALLEST_8BIT

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra 8bit)")

# matrices on both sides of the smallest that is rounded, one that no block divides, and vectors
SHAPES = [(64, 64), (63, 65), (37, 129), (16, 300), (8192,), (100,)]


@pytest.fixture(autouse=True, scope="module")
def wide_parent(tmp_path_factory, text):
    """A parent whose LoRA matrices are large enough to be rounded."""
    out = tmp_path_factory.mktemp("wide") / "run"
    config = TrainConfig(
        model="new", out=str(out), train=[text["train"]], valid=[text["valid"]], vocab_size=60, d_model=256, layers=1,
        heads=4, ffn=64, steps=2, batch_tokens=256, max_length=40, eval_every=2, beam=1,
    )  # fmt: skip
    train(config, quiet=True)
    return out


@pytest.fixture
def wide(settings, wide_parent) -> dict:
    return {**settings, "model": str(wide_parent / "model"), "method_args": {"rank": 20, "dropout": 0.1}}


def made(name: str, **settings) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    vectors = [p for p in parameters if p.dim() <= 1]
    return parameters, make_optimizer(parameters, vectors, TrainConfig(**{"lr": 1e-2, **settings}), name)


def steps(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    torch.manual_seed(1)
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def test_bytes_of_state_are_those_that_a_plan_counts():
    parameters, optimizer = made("adamw8bit")
    steps(parameters, optimizer)
    tables = 2 * 4 * 256
    assert state_bytes(optimizer) == tables + sum(map(OPTIMIZER_BYTES["adamw8bit"], parameters))
    rounded = [state["state1"].dtype == torch.uint8 for state in optimizer.state.values()]
    sizes = [parameter.numel() for parameter in optimizer.state]
    assert rounded == [size >= SMALLEST_8BIT for size in sizes] and len(set(rounded)) == 2
    large = nn.Parameter(torch.empty(1024, 1024, device="meta"))
    assert OPTIMIZER_BYTES["adamw8bit"](large) / large.numel() == 2.03125
    assert OPTIMIZER_BYTES["adamw"](large) / large.numel() == 8


@pytest.mark.gpu
@pytest.mark.slow  # the run of the fixture above compiles what it needs
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_on_a_gpu_needs_nothing_beside_its_state():
    parameters = [nn.Parameter(torch.randn(4096, 1024, device="cuda"))]
    optimizer = make_optimizer(parameters, [], TrainConfig(lr=1e-2), "adamw8bit")
    steps(parameters, optimizer, 1)
    assert state_bytes(optimizer) == 2 * 4 * 256 + OPTIMIZER_BYTES["adamw8bit"](parameters[0])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < parameters[0].nbytes / 100


def test_steps_are_nearly_those_of_adamw():
    exact, rounded = made("adamw", weight_decay=0.1), made("adamw8bit", weight_decay=0.1)
    before = [parameter.detach().clone() for parameter in exact[0]]
    for parameters, optimizer in (exact, rounded):
        steps(parameters, optimizer, 5)
    for old, a, b in zip(before, exact[0], rounded[0], strict=True):
        moved = (a - old).norm()
        assert (a - b).norm() < (0.05 if a.numel() >= SMALLEST_8BIT else 1e-5) * moved


@pytest.mark.parametrize(("method", "kept"), [(pk.IA3(), "ia3_l"), (pk.SSF(), "ssf"), (pk.LoRA(rank=1), "none")])
def test_scales_have_no_weight_decay(method, kept):
    """LoRA of rank 1 has matrices of one row, and (IA)³ vectors of two dimensions."""
    model = pk.adapt(build("m2m100"), method)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = undecayed(model)
    assert len(found) == (0 if kept == "none" else len(trained))


@pytest.mark.parametrize(("method", "told"), [("ia3", True), ("bitfit", False)])
def test_a_run_whose_factors_decayed_goes_on_without_and_says_so(settings, monkeypatch, capsys, method, told):
    settings |= {"method": method, "method_args": {}, "weight_decay": 0.1, "steps": 2}
    train(TrainConfig(**settings), quiet=True)
    load = Checkpoints.load

    def of_an_earlier_version(self, *given) -> dict:
        return {key: value for key, value in load(self, *given).items() if key != "vectors_decay"}

    line = "weight decay has drawn its factors to 0 up to step 2, and leaves them now"
    monkeypatch.setattr(Checkpoints, "load", of_an_earlier_version)
    train(TrainConfig(**{**settings, "steps": 4}), resume=True)
    assert (line in capsys.readouterr().err) == told
    monkeypatch.undo()
    train(TrainConfig(**{**settings, "steps": 6}), resume=True)
    assert line not in capsys.readouterr().err


def test_weight_decay_is_for_matrices_and_the_rate_is_that_of_the_step():
    parameters, optimizer = made("adamw8bit", weight_decay=0.5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    before = [parameter.detach().clone() for parameter in parameters]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    steps(parameters, optimizer)
    assert all(map(torch.equal, before, parameters))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.state.clear()
    optimizer.step()
    for old, new in zip(before, parameters, strict=True):
        torch.testing.assert_close(new.detach(), old * (0.95 if old.dim() > 1 else 1.0))


def test_a_checkpoint_goes_on_with_the_same_bits(tmp_path):
    class Holder(nn.Module):
        def __init__(self, parameters):
            super().__init__()
            self.parts = nn.ParameterList(parameters)

    parameters, optimizer = made("adamw8bit")
    steps(parameters, optimizer)
    path = Checkpoints(tmp_path).save(Holder(parameters), optimizer, {"step": 3}, best=True)
    others, restored = made("adamw8bit")
    assert Checkpoints(tmp_path).load(path, Holder(others), restored) == {"step": 3}
    for parameter, other in zip(parameters, others, strict=True):
        found, wanted = restored.state[other], optimizer.state[parameter]
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
            assert same and type(found[name]) is type(value), name
    assert state_bytes(restored) == state_bytes(optimizer)
    for pair in ((parameters, optimizer), (others, restored)):
        steps(*pair, 2)
    assert all(map(torch.equal, parameters, others))


@pytest.mark.slow
def test_killed_and_resumed(wide, tmp_path, monkeypatch):
    wide |= {"optimizer": "adamw8bit"}
    train(TrainConfig(**{**wide, "out": str(tmp_path / "whole")}), quiet=True)
    kill_at(monkeypatch, 5)
    with pytest.raises(Killed):
        train(TrainConfig(**wide), quiet=True)
    monkeypatch.undo()
    train(TrainConfig(**wide), resume=True, quiet=True)
    assert_same_run(wide["out"], tmp_path / "whole")


@pytest.mark.slow
def test_a_run_learns_as_with_adamw(wide, tmp_path):
    exact = train(TrainConfig(**{**wide, "out": str(tmp_path / "exact")}), quiet=True)
    rounded = train(TrainConfig(**{**wide, "optimizer": "adamw8bit"}), quiet=True)
    assert rounded.losses == pytest.approx(exact.losses, rel=0.02) and rounded.losses != exact.losses


def plan_flags(wide: dict) -> list[str]:
    flags = ["--model", wide["model"], "--src-lang", "en", "--tgt-lang", "de", "--method", "lora"]
    return [*flags, "--method-arg", "rank=20", "--batch-tokens", "128", "--max-length", "40"]


@pytest.mark.slow
def test_a_run_uses_what_its_plan_says(wide, tmp_path):
    path = tmp_path / "plan.json"
    flags = [*plan_flags(wide), "--memory", "64MiB", "--device", "cpu", "--json", str(path)]
    for optimizer in ("adamw", "adamw8bit"):
        assert main(["plan", *flags, "--optimizer", optimizer]) == 0
        assert json.loads(path.read_text())["optimizer"] == optimizer
        out = str(tmp_path / optimizer)
        config = TrainConfig(**{**wide, "out": out, "memory": "64MiB", "plan": str(path), "allow": ["8bit-optimizer"]})
        loop = set_up(config, RunFolder(Path(out)), resuming=False, quiet=True)
        assert isinstance(loop.optimizer.optimizer, bitsandbytes.optim.AdamW8bit) == (optimizer == "adamw8bit")
        assert loop.config.optimizer == "adamw"
