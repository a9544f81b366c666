"""Packed rows in the trainer: the same updates as padded batches, without padding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from petl_mt.config import TrainConfig
from petl_mt.data import Corpus, PackedBatch, Position, Ragged, TrainBatches
from petl_mt.runs import RunFolder
from petl_mt.runs.log import RunLog
from petl_mt.train.loop import run_training
from petl_mt.train.setup import Setup, set_up

from petl_kernels.errors import InputError


@pytest.fixture
def tiny(text, tmp_path) -> dict:
    """A run of four updates of a model that is made for it, evaluated twice."""
    new = {"vocab_size": 60, "d_model": 16, "layers": 1, "heads": 2, "ffn": 24, "dropout": 0.0}
    loop = {"steps": 4, "eval_every": 2, "batch_tokens": 128, "max_length": 40, "beam": 1, "accumulate": 2}
    return {
        "model": "new",
        "out": str(tmp_path / "run"),
        "train": [text["train"]],
        "valid": [text["valid"]],
        **new,
        **loop,
    }


def training(settings: dict, resuming: bool = False, **changes) -> Setup:
    config = TrainConfig(**{**settings, **changes})
    return set_up(config, RunFolder(Path(config.out)), resuming=resuming, quiet=True)


def run(settings: dict, resuming: bool = False, **changes) -> Setup:
    loop = training(settings, resuming, **changes)
    run_training(loop)
    return loop


def metrics(loop: Setup) -> list[dict]:
    lines = (loop.folder.path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """The lines that runs log."""
    lines = []
    monkeypatch.setattr(RunLog, "say", lambda self, line: lines.append(line))
    return lines


def padded(monkeypatch) -> None:
    monkeypatch.setattr("petl_mt.train.batching.packing_obstacle", lambda model: "a test")


def test_packed_runs_are_padded_runs_without_padding(tiny, tmp_path, monkeypatch, said):
    packed = run(tiny)
    with monkeypatch.context() as patch:
        padded(patch)
        other = run(tiny, out=str(tmp_path / "padded"))
    assert packed.step_log.losses == pytest.approx(other.step_log.losses, rel=1e-5)
    found, expected = (
        [line["valid_loss"] for line in metrics(loop) if "valid_loss" in line] for loop in (packed, other)
    )
    assert len(found) == 2 and found == pytest.approx(expected, rel=1e-4)
    assert packed.progress.target_tokens == other.progress.target_tokens
    assert {line["padding"] for line in metrics(packed) if "padding" in line} == {0}
    assert any(line["padding"] > 0.01 for line in metrics(other) if "padding" in line)
    assert [line for line in said if line.startswith("batches")] == [
        "batches are packed rows, without padding",
        "batches are padded: a test",
    ]


@pytest.mark.slow
def test_micro_batches_are_rows_of_at_most_so_many_tokens(tiny, tmp_path):
    whole, parts = run(tiny), training(tiny, out=str(tmp_path / "parts"))
    parts.update.micro_tokens = 48  # as a plan says
    batch = parts.batches.take(Position(0, 0))
    assert 1 < len(found := [part.source.numel() for part in parts.update._micro_batches(batch)])
    assert max(found) <= 48 and sum(found) == batch.source.numel()
    run_training(parts)
    assert whole.step_log.losses == pytest.approx(parts.step_log.losses, rel=1e-5)


def test_a_run_goes_on_as_it_began(tiny, monkeypatch, said):
    """A run of an earlier version has padded batches; a run with packed rows cannot go on without them."""
    tiny |= {"dropout": 0.1}
    with monkeypatch.context() as patch:
        padded(patch)
        loop = run(tiny)
    (latest,) = {path.resolve() for path in loop.folder.checkpoints.glob("latest")}
    saved = json.loads((latest / "progress.json").read_text())
    assert saved.pop("packed") is False
    (latest / "progress.json").write_text(json.dumps(saved))
    (latest / "checksums.json").unlink()
    more = run(tiny, resuming=True, steps=6)
    assert more.batches.start is None and not more.progress.packed
    assert "batches are padded: the run began so" in said


def test_packed_runs_are_not_resumed_padded(tiny, monkeypatch):
    run(tiny)
    padded(monkeypatch)
    with pytest.raises(InputError, match="the run began with packed rows, which cannot go on .a test."):
        run(tiny, resuming=True, steps=6)


def test_tier_0_trains_padded_batches(tiny, said):
    loop = run(tiny, tier=0, steps=2)
    assert "batches are padded: model.encoder.layers.0: not lean" in said and loop.batches.start is None


def corpus(lengths: list[tuple[int, int]]) -> Corpus:
    draw = np.random.default_rng(2)
    sides = ([draw.integers(3, 50, sizes[side]).tolist() for sizes in lengths] for side in (0, 1))
    return Corpus(*map(Ragged, sides), pad=1)


def test_packed_batches_are_the_sentences_of_padded_ones():
    draw = np.random.default_rng(1)
    text = corpus([tuple(draw.integers(1, 12, 2)) for _ in range(40)])
    batches = TrainBatches(text, 60, seed=3)
    for indices in batches.epoch_indices(0)[:4]:
        rows, packed = text.collate(indices), text.packed(indices, 2)
        assert packed.target_tokens == rows.target_tokens
        assert text.tokens(indices) == packed.source.numel() + packed.labels.numel()
        assert packed.source[0].tolist() == [t for row in rows.source.tolist() for t in row if t != 1]
        assert packed.labels[0].tolist() == [t for row in rows.labels.tolist() for t in row if t != -100]
        parts = list(packed.parts(20))
        assert all(max(part.source.numel(), part.labels.numel()) <= 20 or len(part.indices) == 1 for part in parts)
        assert np.concatenate([part.indices for part in parts]).tolist() == indices.tolist()
        for name in ("input_ids", "labels", "decoder_input_ids"):
            joined = torch.cat([torch.as_tensor(part.row[name]) for part in parts], 1)
            assert torch.equal(joined.as_subclass(torch.Tensor), packed.row[name].as_subclass(torch.Tensor))
        for part in parts:
            again = PackedBatch.of([(text.sources[i], text.targets[i]) for i in part.indices], part.indices, 2)
            assert part.row["longest"] == again.row["longest"] and part.target_tokens == again.target_tokens
            assert part.row["cu_seqlens"].tolist() == again.row["cu_seqlens"].tolist()
