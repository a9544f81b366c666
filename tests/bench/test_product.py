"""bench/product on this machine with a tiny model: the whole way works, and what does not is told."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time

import pytest
import torch

from bench.product import program as programs
from bench.product import whole_way as way
from bench.product.budgets import checkpoint, under_budgets
from bench.product.program import Program, Run, line_of
from bench.product.text import make_text
from petl_kernels.errors import InputError

TINY = (1, 32, 48, 2, 5000)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("model"), TINY, "cpu")


@pytest.fixture
def program(tmp_path):
    (tmp_path / "runs").mkdir()
    return Program(tmp_path / "runs", tmp_path / "part" / "product.json", {"device": "cpu"}, limit=120)


def written(program: Program) -> list[dict]:
    return json.loads(program.results.read_text())["runs"]


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Files of somebody's own text."""
    folder = tmp_path_factory.mktemp("own")
    for language, words in {"en": "one two three four five six", "de": "eins zwei drei vier fünf sechs"}.items():
        line = words.split()
        text = "".join(" ".join(line[i % 6 :] + line[: i % 6][: i % 4]) + "\n" for i in range(120))
        (folder / f"text.{language}").write_text(text)
    return [str(folder / f"text.{language}") for language in ("en", "de")]


@pytest.mark.slow
def test_the_whole_way(program, model, lines, tmp_path, capfd):
    text = make_text(tmp_path, lines, "en-de", 100, 6)
    flags = ["--batch-tokens", "128", "--max-length", "24", "--beam", "1", "--precision", "fp32"]
    way.whole_way(program, model, text, "2GiB", 12, flags)
    runs = {run["name"]: run for run in written(program)}
    assert list(runs) == ["train, killed", "train, resumed", "translate", "score", "merge"]
    assert not any(run["wrong"] for run in runs.values()), [run["wrong"] for run in runs.values()]
    assert runs["train, killed"]["code"] == -signal.SIGKILL
    resumed = runs["train, resumed"]
    assert resumed["figures"]["updates done again"] >= 1 and resumed["figures"]["seconds an update"] > 0
    assert 0 < resumed["peak"] <= resumed["taken"] <= resumed["figures"]["memory"] == 2 << 30
    assert runs["score"]["figures"]["BLEU"].startswith("BLEU")
    assert capfd.readouterr().out.count("\n") == 5


@pytest.mark.slow
def test_budgets_and_what_goes_wrong(program, model, lines, tmp_path):
    """A run that is refused is told in one line; what is known before it stays."""
    text = make_text(tmp_path, lines, "en-de", 100, 6)
    flags = ["--batch-tokens", "128", "--max-length", "24", "--steps", "4", "--precision", "fp32"]
    under_budgets(program, model, text, ("2GiB", "64XB"), (False,), flags)
    fits, refused = written(program)
    assert fits["wrong"] == "" and fits["figures"]["planned peak"] <= 2 << 30
    assert refused["code"] == 2 and "64XB" in refused["wrong"] and refused["wrong"].startswith("exit code 2: petl-mt")
    assert "WRONG" in line_of(refused) and "WRONG" not in line_of(fits)


@pytest.fixture
def instead(monkeypatch):
    """Another program in the place of petl-mt, in this process' children, which fork and do not start anew."""

    def put(main):
        from petl_mt import cli

        monkeypatch.setattr(programs, "context", lambda: multiprocessing.get_context("fork"))
        monkeypatch.setattr(programs, "_peaks", lambda: (0, 0))  # CUDA does not live through a fork
        monkeypatch.setattr(cli, "main", main)

    return put


def test_a_run_that_hangs_is_ended_and_a_crash_is_told(program, instead):
    program.limit = 0.5
    ends = {
        "hangs": lambda: time.sleep(60),
        "dies": lambda: os.kill(os.getpid(), signal.SIGTERM),
        "raises": lambda: 1 / 0,
    }
    instead(lambda words: ends[words[0]]() or 0)
    for name in ends:
        program(name, [name])
    assert [run["wrong"] for run in written(program)] == [
        "not done after 0 s",
        "exit code -15: nothing said",
        "exit code 1: ZeroDivisionError: division by zero",
    ]


def test_a_resumed_run_with_other_losses_is_wrong(tmp_path):
    run = Run("train, resumed", "")
    figures = {
        "plan.json": {"seconds": 1.0, "peak": 5, "memory": 9, "micro_batches": 1, "tiers": [1, 2], "streamed": 0}
    }
    figures["result.json"] = {"target_tokens_per_second": 7.5, "steps": 4}
    for name, content in figures.items():
        (tmp_path / name).write_text(json.dumps(content))
    after = {1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0}
    metrics = [{"step": step, "loss": loss, "seconds": float(step)} for step, loss in after.items()]
    metrics.insert(2, {"step": 2, "valid_loss": 4.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics) + '{"step": 5, "lo')
    assert way._resumed(tmp_path, {1: 5.0, 2: 4.0, 3: 3.0}, 4, run) == ""
    assert run.figures["updates done again"] == 1 and run.figures["seconds an update"] == 1.0
    assert "loss of update 3: 3.1 before" in way._resumed(tmp_path, {1: 5.0, 2: 4.0, 3: 3.1}, 4, run)
    assert "expected 1 to 5" in way._resumed(tmp_path, {1: 5.0, 2: 4.0, 3: 3.0}, 5, run)
    run.taken = 10
    assert way._resumed(tmp_path, {1: 5.0, 2: 4.0, 3: 3.0}, 4, run) == "10 B taken; expected at most 9 B"


def test_text_without_babel_and_wrong_files(tmp_path, lines, monkeypatch):
    monkeypatch.setitem(sys.modules, "petl_mt.demo.text", None)
    text = make_text(tmp_path, None, "en-fi", 50, 5)
    assert "Babel" in text.name and text.languages == ("en", "fi")
    sides = [[path.read_text().splitlines() for path in files] for files in (text.train, text.test)]
    assert [len(lines) for side in sides for lines in side] == [50, 50, 5, 5]
    assert all(len(a.split()) == len(b.split()) >= 2 for a, b in zip(*sides[0], strict=True))
    short = tmp_path / "short"
    short.write_text("one line\n")
    with pytest.raises(InputError, match="120 and 1 lines"):
        make_text(tmp_path, [lines[0], str(short)], "en-de", 50, 5)


def test_a_merge_that_changes_nothing_is_wrong(model, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "rest.safetensors")
    for path in model.glob("*.safetensors"):
        save_file(load_file(path), tmp_path / path.name)
    assert way._merged(tmp_path, model) == "no weight differs from the base's"
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + torch.nan}, tmp_path / "rest.safetensors")
    assert way._merged(tmp_path, model) == "a weight is no number"
    (tmp_path / "rest.safetensors").unlink()
    assert "is missing" in way._merged(tmp_path, model)
