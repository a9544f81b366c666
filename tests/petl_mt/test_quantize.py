"""``petl-mt quantize``: training on its folder is training on the checkpoint that is quantized when it is read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from petl_mt import checks
from petl_mt.cli import main
from petl_mt.config import TrainConfig
from petl_mt.inference import Translator
from petl_mt.runs import RunFolder
from petl_mt.train import train
from safetensors.torch import load_file
from test_memory import saved_plan

from petl_kernels.errors import InputError
from petl_kernels.interop.hf import load_pretrained
from petl_kernels.planning.plan import Plan
from petl_kernels.weights.quantized import storages_of

pytest.importorskip("petl_kernels._C")


@pytest.fixture
def quantized(parent, tmp_path) -> Path:
    out = tmp_path / "quantized"
    assert main(["quantize", str(parent / "model"), str(out), "--storage", "int8"]) == 0
    return out


@pytest.fixture
def settings(settings, quantized) -> dict:
    return settings | {"model": str(quantized), "method_args": {"rank": 2}, "dropout": 0.0, "steps": 2, "eval_every": 2}


def trained(out: Path) -> dict:
    return load_file(RunFolder(out).checkpoints / "latest" / "trained.safetensors")


@pytest.mark.slow
def test_a_run_with_and_without_a_budget(settings, parent, text, tmp_path, capsys):
    train(TrainConfig(**settings), quiet=True)
    tight = {**settings, "out": str(tmp_path / "tight"), "memory": "2MiB", "tier": 1}
    train(TrainConfig(**tight), quiet=True)
    plan = Plan.load(tmp_path / "tight" / "plan.json")
    assert (plan.storage, plan.tables, plan.streamed) == ("int8", "int8", 0) and plan.peak <= 2**21
    # the same checkpoint, rounded when it is read: the same plan and the same bits
    rounding = {**tight, "model": str(parent / "model"), "out": str(tmp_path / "rounding"), "allow": ["quantized"]}
    given = {key: value for key, value in rounding.items() if key != "tier"}
    train(TrainConfig(**given, plan=str(tmp_path / "tight" / "plan.json")), quiet=True)
    ours, theirs = trained(tmp_path / "tight"), trained(tmp_path / "rounding")
    assert ours and all((ours[name] == theirs[name]).all() for name in theirs)
    lines = ["one two", "red house"]
    plain = list(Translator(tmp_path / "run").stream(lines))
    within = Translator(tmp_path / "run", memory="64MiB")
    assert storages_of(within.model) == ("int8", "int8") and list(within.stream(lines)) == plain
    # there are no original weights to merge into
    capsys.readouterr()
    assert main(["merge", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 2
    assert "a quantized checkpoint; expected --into quantized" in capsys.readouterr().err
    into = ["--into", "quantized"]
    assert main(["merge", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "merged"), *into]) == 0
    assert storages_of(load_pretrained(tmp_path / "merged")[0].requires_grad_(False)) == ("dense", "dense")


@pytest.mark.parametrize("method", ["full", "cross-attention"])
def test_a_method_that_trains_quantized_weights_is_refused(settings, method):
    wrong = {**settings, "method": method, "method_args": {}}
    with pytest.raises(InputError, match=f"method {method}: trains .* holds in int8; expected the checkpoint that was"):
        train(TrainConfig(**wrong), quiet=True)


def test_what_is_wrong_is_one_line(quantized, parent, tmp_path, capsys, monkeypatch):
    model, out = str(parent / "model"), str(tmp_path / "again")

    def refused(*flags: str) -> str:
        capsys.readouterr()
        assert main(["quantize", *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "is quantized already" in refused(str(quantized), out)
    assert "exists and is not empty" in refused(model, str(quantized))
    assert "no such folder" in refused(str(tmp_path / "none" / "model"), out)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 100))
    assert "100 B are free on its disk; expected" in refused(model, out)
    assert not Path(out).exists()


@pytest.mark.slow
def test_layers_of_a_quantized_checkpoint_are_not_streamed_on_a_cpu(settings, parent, tmp_path):
    """The least budget is told; a plan that streams, of the checkpoint that was quantized, is refused."""
    with pytest.raises(InputError, match=r"^memory 100 KiB: .* expected at least"):
        train(TrainConfig(**settings, memory="100KiB", tier=4), quiet=True)
    dense = {**settings, "model": str(parent / "model")}
    path = saved_plan(dense, tmp_path / "plan.json", "2MiB", streamed=2)
    with pytest.raises(InputError, match=r"plan .*: for weights in dense; the checkpoint has them in int8; expected a"):
        train(TrainConfig(**settings, memory="2MiB", plan=path), quiet=True)
