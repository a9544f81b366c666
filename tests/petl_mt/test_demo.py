"""The demo with a tiny parent and two steps a row; the parent that ships, where it is in the tree."""

from __future__ import annotations

import json

import pytest
import torch
from petl_mt import cli
from petl_mt.config import TrainConfig
from petl_mt.demo import make_parent
from petl_mt.demo.demo import Plan, run_demo
from petl_mt.demo.text import LANGUAGES, parallel_lines
from petl_mt.models.new_model import make_model, train_vocabulary

from petl_kernels.errors import InputError
from petl_kernels.interop.hf import load_pretrained

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parent")
    lines = [line for row in parallel_lines(("en", "de", "fi", "tr"), "train", 200, 1) for line in row]
    tokenizer = train_vocabulary(lines, 300, 1.0, seed=1)
    torch.manual_seed(0)
    model = make_model(TrainConfig(d_model=16, layers=1, heads=2, ffn=32), tokenizer)
    model.save_pretrained(folder / "large")
    tokenizer.save_pretrained(folder / "large")
    make_parent.shrink(folder / "large", folder / "small")
    return folder


@pytest.fixture
def plan():
    grids = {"en-fi": ("full", "adapter=10%", "prefix=0.0001%"), "en-tr": ("bitfit",)}
    return Plan(grids=grids, steps=2, train=30, test=3, own=2, batch_tokens=256, beam=1)


@pytest.mark.slow
def test_demo(parent, plan, tmp_path, capsys):
    results = run_demo(tmp_path, plan=plan, model=parent / "small")
    assert [row.name for row in results["en-fi"]] == ["no adaptation", "full", "adapter 10%", "prefix 0.0001%"]
    assert [row.status for row in results["en-tr"]] == ["done", "done"]
    for pair in ("en-fi", "en-tr"):
        stored = json.loads((tmp_path / pair / "study.json").read_text())
        assert len(stored["rows"]) == len(results[pair]) and stored["config"]["steps"] == 2
        assert (tmp_path / pair / "study.md").exists() and (tmp_path / pair / "study.png").exists()
    shown = capsys.readouterr().out
    assert "own pair en-de" in shown and "BLEU nrefs:1" in shown and "written:" in shown
    source = (tmp_path / "text" / "test.en-fi.en").read_text(encoding="utf-8").splitlines()
    assert source[0] in shown and "reference" in shown

    assert run_demo(tmp_path, plan=plan, model=parent / "small") == results  # nothing is run twice


@pytest.mark.slow
def test_steps_shrink_to_the_minutes(parent, plan, tmp_path, capsys):
    plan.steps, plan.grids = 100_000, {"en-tr": ("bitfit",)}
    rows = run_demo(tmp_path, ("en-tr",), minutes=0.05, plan=plan, model=parent / "small")["en-tr"]
    assert 4 <= rows[1].steps < 100_000
    assert f"{rows[1].steps} steps instead of 100000" in capsys.readouterr().out.replace("\n", " ")


def test_shrunk_parent_is_the_same_model_in_half_the_bytes(parent):
    large, small = (load_pretrained(parent / name)[0].state_dict() for name in ("large", "small"))
    assert large.keys() == small.keys()
    for key, tensor in large.items():
        torch.testing.assert_close(small[key], tensor.half().float(), rtol=0, atol=0)
    sizes = [(parent / name / "model.safetensors").stat().st_size for name in ("large", "small")]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.skipif(not (make_parent.PARENT / "config.json").exists(), reason="the parent is not in this tree")
def test_parent_that_ships():
    files = list(make_parent.parent_folder().iterdir())
    assert sum(file.stat().st_size for file in files) <= 16 * 2**20
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pkl")]
    model, tokenizer = load_pretrained(make_parent.parent_folder())
    assert 6e6 < sum(p.numel() for p in model.parameters()) < 7e6
    for language in LANGUAGES:  # every language of the text has its pieces
        lines = [line for (line,) in parallel_lines((language,), "test", 50, 9)]
        ids = tokenizer(lines)["input_ids"]
        assert sum(row.count(tokenizer.unk_token_id) for row in ids) == 0, language


def test_missing_parent_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(make_parent, "PARENT", tmp_path / "parent")
    with pytest.raises(InputError, match="demo parent .*: not there; make it as"):
        make_parent.parent_folder()


def test_command_refuses_wrong_minutes(capsys):
    for minutes in ("0", "nan", "inf", "-inf"):
        assert cli.main(["demo", f"--minutes={minutes}"]) == 2
        line = f"petl-mt demo: minutes {minutes}: expected more than 0, and an end\n"
        assert capsys.readouterr().err == line
    assert cli.main(["demo", "--out", ""]) == 2
    assert capsys.readouterr().err == "petl-mt demo: out '': expected a folder\n"
