"""The demo's parent in two precisions: what is trained, and what the lines say."""

from __future__ import annotations

import json

import pytest
from petl_mt.config_file import load_yaml

from bench.parent_precision import RECIPE, compare, of_shipped

TINY = {
    "vocab_size": 900,
    "character_coverage": 0.98,
    "d_model": 16,
    "layers": 1,
    "ffn": 16,
    "heads": 2,
    "steps": 2,
    "warmup": 1,
    "batch_tokens": 128,
    "beam": 1,
    "max_length": 40,
}


@pytest.mark.slow
def test_each_precision_trains_with_each_seed_and_is_scored_both_ways(tmp_path, capsys):
    found = compare(tmp_path, ["en-de"], [1, 2], load_yaml(RECIPE) | TINY, lines=30, tests=2)
    assert [*found] == [("fp32", 1), ("fp16", 1), ("fp32", 2), ("fp16", 2)]
    assert all([*scores] == ["en-de", "de-en"] for scores in found.values())
    losses = {}
    for precision, seed in found:
        out = tmp_path / f"{precision}-{seed}"
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[precision, seed] = [line["loss"] for line in lines if "loss" in line]
        assert any("loss_scale" in line for line in lines) == (precision == "fp16")
    assert abs(losses["fp16", 1][0] - losses["fp32", 1][0]) < 0.01 < abs(losses["fp32", 2][0] - losses["fp32", 1][0])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("fp32 seed 1, 0 skipped: BLEU en-de ") and "nrefs:1|bs:1000|seed:12345|" in said[0]
    assert [line.partition(":")[0] for line in said[4:]] == ["en-de", "de-en"] and "fp16 - fp32 " in said[5]


@pytest.mark.slow
def test_the_parent_that_ships_is_trained_whole_in_one_direction(tmp_path):
    few = {"steps": 1, "warmup": 0, "batch_tokens": 128, "beam": 1}
    settings = of_shipped(load_yaml(RECIPE)) | few
    assert (settings["method"], settings["lr"], settings["dropout"]) == ("full", 2e-3, 0.05)
    found = compare(tmp_path, ["en-fi"], [1], settings, lines=2, tests=1)
    assert [*found["fp16", 1]] == ["en-fi"]
