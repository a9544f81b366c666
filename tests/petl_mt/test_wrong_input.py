"""Wrong input: one clear line, exit code 2, nothing half-written."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from petl_mt.cli import main
from petl_mt.config import TrainConfig
from petl_mt.train import train

from petl_kernels.methods import METHODS
from petl_kernels.planning import chooser

NOT_MERGED = [method for method, variant in METHODS.items() if variant.config.cannot_merge]


@pytest.fixture
def refusal(capfd):
    """Runs the program; returns its one line after checking the exit code."""

    def run(*flags: str) -> str:
        capfd.readouterr()
        assert main(list(flags)) == 2
        lines = capfd.readouterr().err.splitlines()
        if lines[0].startswith("vocabulary: "):  # it is said before pieces are learnt, which shows how many there are
            lines.pop(0)
        assert len(lines) == 1 and lines[0].startswith(f"petl-mt {flags[0]}: ")
        return lines[0]

    return run


@pytest.fixture
def wrong_train(refusal, settings, tmp_path):
    """Trains with wrong flags; returns the line, after checking that nothing was written."""
    pair = settings["train"][0]

    def run(**changes) -> str:
        values = {
            "--model": settings["model"], "--train": [pair.source, pair.target], "--src-lang": "en", "--tgt-lang": "de",
            "--method": "lora", "--steps": "2", "--batch-tokens": "128", "--max-length": "40",
            "--out": settings["out"],
        }  # fmt: skip
        values |= {"--" + name.replace("_", "-"): value for name, value in changes.items()}
        before = sorted(tmp_path.rglob("*"))
        flags = [
            part for name, value in values.items() for part in (name, *([value] if isinstance(value, str) else value))
        ]
        line = refusal("train", *flags)
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return run


def test_files(wrong_train, text, tmp_path):
    good = text["train"]
    empty, latin, short = tmp_path / "empty", tmp_path / "latin", tmp_path / "short"
    empty.write_bytes(b"")
    latin.write_bytes(b"one\ntwo\nd\xfcnn\n")
    short.write_bytes(b"one\n")
    assert "/nowhere: No such file" in wrong_train(train=[good.source, str(tmp_path / "nowhere")])
    assert "/empty: empty" in wrong_train(train=[str(empty), good.target])
    assert "/latin: line 3 is not UTF-8 (byte 0xfc)" in wrong_train(train=[good.source, str(latin)])
    line = wrong_train(train=[good.source, str(short)])
    assert "train.en has 200 lines and" in line and "short has 1:" in line
    assert "/empty: empty" in wrong_train(valid=[str(empty), good.target])
    assert "Is a directory" in wrong_train(train=[str(tmp_path), good.target])
    assert "no sentence pair is left" in wrong_train(max_length="2")


def test_models(wrong_train, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    assert "no such folder" in wrong_train(model=str(tmp_path / "nowhere"))
    assert "'gpt2' is not supported" in wrong_train(model=str(other))
    assert "vocab_size 100000: expected at most" in wrong_train(model="new", method="full", vocab_size="100000")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"src_lang": "xq"}, "'xq'"),
        ({"tgt_lang": "den"}, "'den' for this model, near: "),
        ({"method": "lorra"}, "method 'lorra': unknown; expected lora"),
        ({"method": "adaptr"}, "expected adapter"),
        ({"method_arg": "rank=100"}, "rank 100"),
        ({"method_arg": "rank=0"}, "rank 0"),
        ({"method_arg": "targets=[q_prj]"}, "q_proj"),
        ({"method_arg": "rnk=3"}, "unknown setting 'rnk', expected rank"),
        ({"method_arg": "rank"}, "method-arg 'rank': expected KEY=VALUE"),
        ({"params": "0%"}, "'0%'"),
        ({"params": "-3%"}, "'-3%'"),
        ({"params": "101%"}, "'101%'"),
        ({"params": "90M"}, "more than 100%"),
        ({"params": "0.001%"}, "the nearest it can is"),
        ({"method": "bitfit", "params": "50%"}, "the nearest it can is"),
        ({"bleu_tokenize": "14a", "valid": None}, "bleu_tokenize '14a'"),
        ({"steps": "-1"}, "steps -1: expected at least 1"),
        ({"memory": "lots"}, "'lots'"),
        pytest.param(
            {"memory": "1KB"},
            "KiB with --allow quantized,8bit-optimizer,bf16-gradients; expected at least that",
            marks=pytest.mark.repeat,  # each of 18 ways to round is counted; test_a_budget_that_nothing_fits has two
        ),
        ({"config": "nowhere.yaml"}, "nowhere.yaml: No such file"),
        ({"pair": ["en-de", "a", "b"]}, "--train and --pair: expected one of the two"),
    ],
)
def test_options(wrong_train, text, change, message):
    if "valid" in change:
        change = {**change, "valid": [text["valid"].source, text["valid"].target]}
    assert message in wrong_train(**change)


@pytest.mark.slow
def test_a_budget_that_nothing_fits(wrong_train, monkeypatch):
    monkeypatch.setattr(chooser, "APPROXIMATIONS", ("8bit-optimizer", "bf16-gradients"))
    line = wrong_train(memory="1KB", tier="4")
    assert "KiB with --allow 8bit-optimizer,bf16-gradients; expected at least that" in line


def test_a_pair_without_two_languages(refusal, text):
    assert "pair 'ende': expected two language codes" in refusal("train", "--pair", "ende", "a", "b")


def test_an_output_folder_that_is_taken(refusal, wrong_train, settings, parent, tmp_path):
    before = {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()}
    assert "holds another run" in wrong_train(out=str(parent))
    assert {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()} == before
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("x")
    assert "is not empty" in wrong_train(out=str(tmp_path / "taken"))
    assert "is a file" in wrong_train(out=str(tmp_path / "taken" / "thesis.tex"))
    assert "exists and is not empty" in refusal("merge", "--run", str(parent), "--out", str(tmp_path / "taken"))


def test_a_folder_that_cannot_be_written(refusal, settings, text):
    pair = text["train"]
    line = refusal(
        "train", "--model", settings["model"], "--train", pair.source, pair.target, "--src-lang", "en",
        "--tgt-lang", "de", "--out", "/proc/run", "--steps", "1",
    )  # fmt: skip
    assert "/proc/run" in line


def test_runs_that_are_none(refusal, tmp_path, settings):
    assert "no config.yaml" in refusal("translate", "--run", str(tmp_path))
    assert "no config.yaml" in refusal("merge", "--run", str(tmp_path / "nowhere"), "--out", str(tmp_path / "m"))
    train(TrainConfig(**{**settings, "steps": 1, "valid": []}), quiet=True)
    shutil.rmtree(Path(settings["out"]) / "adapter")
    shutil.rmtree(Path(settings["out"]) / "checkpoints")
    assert "has not finished" in refusal("translate", "--run", settings["out"])


def test_corrupt_and_foreign_adapters(refusal, settings, tmp_path):
    train(TrainConfig(**{**settings, "steps": 1, "valid": []}), quiet=True)
    weights = Path(settings["out"]) / "adapter" / "adapter_model.safetensors"
    good = weights.read_bytes()
    flags = ["merge", "--run", settings["out"], "--out", str(tmp_path / "merged")]
    weights.write_bytes(good[: len(good) // 2])
    assert "adapter_model.safetensors" in refusal(*flags)
    weights.write_bytes(good)
    description = weights.with_name("adapter_config.json")
    values = json.loads(description.read_text())
    description.write_text(json.dumps({**values, "r": 3}))
    assert "shape" in refusal(*flags)
    description.write_text(json.dumps({**values, "peft_type": "OFT"}))
    assert "OFT" in refusal(*flags)
    description.write_text("{")
    assert "adapter_config.json" in refusal(*flags)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "method", [m if m in ("adapter", "prefix") else pytest.param(m, marks=pytest.mark.repeat) for m in NOT_MERGED]
)
def test_methods_that_cannot_be_merged(refusal, settings, tmp_path, method):
    train(TrainConfig(**{**settings, "method": method, "method_args": {}, "steps": 1, "valid": []}), quiet=True)
    assert "petl-mt merge" not in (Path(settings["out"]) / "README.md").read_text()
    assert "merge" in refusal("merge", "--run", settings["out"], "--out", str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "method",
    [
        method if method in ("full", "lora") else pytest.param(method, marks=pytest.mark.repeat)
        for method in sorted(set(METHODS) - set(NOT_MERGED))
    ],
)
def test_all_others_can(settings, tmp_path, method):
    train(TrainConfig(**{**settings, "method": method, "method_args": {}, "steps": 1, "valid": []}), quiet=True)
    assert main(["merge", "--run", settings["out"], "--out", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_standard_input_that_is_not_utf8(refusal, parent, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"good\n\xff\n")))
    line = refusal("translate", "--run", str(parent), "--src-lang", "en", "--tgt-lang", "de")
    assert "standard input: line 2 is not UTF-8 (byte 0xff)" in line


def test_no_number_for_a_loss(refusal, settings, capfd):
    pair = settings["train"][0]
    flags = [
        "train", "--model", settings["model"], "--train", pair.source, pair.target,
        "--src-lang", "en", "--tgt-lang", "de", "--method", "lora",
        "--steps", "30", "--eval-every", "1", "--batch-tokens", "128", "--max-length", "40",
        "--lr", "1e38", "--warmup", "0", "--out", settings["out"],
    ]  # fmt: skip
    assert main(flags) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("petl-mt train: training stopped at step ") and "the last good checkpoint is" in line


def test_numbers_that_nothing_can_use(wrong_train, refusal):
    assert "seed -1: expected 0 to 2^63 - 1" in wrong_train(seed="-1")
    assert "seed 99999999999999999999: expected 0 to" in wrong_train(seed="99999999999999999999")
    assert "weight_decay inf: expected 0 or above" in wrong_train(weight_decay="inf")
    assert "clip inf: expected 0 (off) or above" in wrong_train(clip="inf")
    assert "method-arg 'rank=[1': expected KEY=VALUE" in wrong_train(method_arg="rank=[1")
    for name, value in (("beam", "-3"), ("beam", "0"), ("max-length", "0"), ("batch-tokens", "-1")):
        line = refusal("translate", "--run", "nowhere", f"--{name}={value}")
        assert f"{name.replace('-', '_')} {value}: expected at least 1" in line


def test_nothing_to_resume(refusal, tmp_path):
    line = refusal("train", "--resume", "--out", str(tmp_path / "none"))
    assert line.endswith("none: no run to resume; expected a run's folder, or --model for a new one")
    assert not (tmp_path / "none").exists()
