"""A toy language pair, its files, and a small parent trained on it."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from petl_mt.config import Pair, TrainConfig
from petl_mt.train import budget, train

from petl_kernels.planning import planner

# A machine that brings its own packages may lack Babel, which writes the demo's text.
collect_ignore = [] if importlib.util.find_spec("babel") else ["test_demo.py", "test_demo_text.py", "test_study.py"]

ENGLISH = "one two three four five six red green blue big small house tree river stone bird".split()
GERMAN = "eins zwei drei vier fünf sechs rot grün blau groß klein Haus Baum Fluss Stein Vogel".split()


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def plans_made_once():
    """Keeps plans: one takes seconds, and most runs under a budget here train one model in one way."""
    made, make = {}, budget.make_plan

    def once(model, *given, **options):
        parameters = [(name, p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()]
        rates = [(name, getattr(m, "dropout", None), getattr(m, "p", None)) for name, m in model.named_modules()]
        patched = planner.check_device, planner.measure_rates  # by some tests
        key = repr((type(model), model.config.to_json_string(), parameters, rates, given, options, patched))
        if key not in made:
            made[key] = make(model, *given, **options)
        return made[key]

    budget.make_plan = once
    yield
    budget.make_plan = make


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs the rows of a study as calls: a process for each costs seconds, and one test has them."""
    monkeypatch.setattr("petl_mt.study.run.in_own_process", lambda function, *arguments: function(*arguments))


def toy_lines(count: int, seed: int) -> tuple[list[str], list[str]]:
    """Returns sentences of 1 to 7 words, and the same sentences word by word in the other language."""
    draw = random.Random(seed)
    rows = [[draw.randrange(len(ENGLISH)) for _ in range(draw.randint(1, 7))] for _ in range(count)]
    return [" ".join(ENGLISH[i] for i in row) for row in rows], [" ".join(GERMAN[i] for i in row) for row in rows]


def write(path: Path, lines: list[str]) -> str:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> dict[str, Pair]:
    """Files of the toy language: train (200 lines), valid (17) and test (11)."""
    folder = tmp_path_factory.mktemp("text")
    pairs = {}
    for seed, (name, count) in enumerate({"train": 200, "valid": 17, "test": 11}.items()):
        english, german = toy_lines(count, seed)
        files = write(folder / f"{name}.en", english), write(folder / f"{name}.de", german)
        pairs[name] = Pair("en", "de", *files)
    return pairs


def turned(pair: Pair) -> Pair:
    return Pair(pair.tgt_lang, pair.src_lang, pair.target, pair.source)


@pytest.fixture(scope="session")
def parent(text, tmp_path_factory) -> Path:
    """The run folder of a small model, trained from scratch both ways: by the first of several workers, for all."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with open(shared / "parent.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "parent").exists():
            train_parent(text, shared / "making" / "run")
            (shared / "making").rename(shared / "parent")
    return shutil.copytree(shared / "parent", tmp_path_factory.mktemp("parent") / "copy", symlinks=True) / "run"


def train_parent(text: dict[str, Pair], out: Path) -> None:
    config = TrainConfig(
        model="new",
        out=str(out),
        train=[text["train"], turned(text["train"])],
        valid=[text["valid"]],
        vocab_size=60,
        d_model=32,
        layers=1,
        heads=2,
        ffn=48,
        steps=300,
        batch_tokens=512,
        max_length=40,
        lr=1e-2,
        warmup=30,
        eval_every=150,
        beam=2,
        dropout=0.0,
    )
    train(config, quiet=True)


@pytest.fixture
def settings(parent, text, tmp_path) -> dict:
    return settings_of(parent, text, tmp_path / "run")


def settings_of(parent: Path, text: dict[str, Pair], out: Path) -> dict:
    """Returns the keyword arguments of a short run on the parent with LoRA, dropout on."""
    return {
        "model": str(parent / "model"),
        "out": str(out),
        "train": [text["train"]],
        "valid": [text["valid"]],
        "method": "lora",
        "method_args": {"rank": 2, "dropout": 0.1},
        "steps": 8,
        "batch_tokens": 128,
        "max_length": 40,
        "lr": 1e-2,
        "eval_every": 3,
        "beam": 1,
        "dropout": 0.1,
    }
