"""bench/step/bench_step.py with a tiny model: every implementation takes a step beside the same frozen weights."""

from __future__ import annotations

import pytest
import torch
from fake_graphs import Recorder

import petl_kernels as pk
from bench.random_model import frozen_model, random_weights
from bench.run import turns
from bench.shapes import m2m_config
from bench.step import bench_step
from bench.step.bench_step import BF16, CARD, PEERS, QUICK, Text
from bench.step.sentences import Data

CONFIG = m2m_config(1, 32, 64, 2, 200)


@pytest.fixture(scope="module")
def weights():
    return random_weights(CONFIG, "cpu")


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    monkeypatch.setattr(bench_step, "WORDS", 200)


@pytest.mark.parametrize("implementation", bench_step.IMPLEMENTATIONS)
def test_a_step(weights, implementation):
    if implementation in PEERS:
        pytest.importorskip("peft")
    net = bench_step.IMPLEMENTATIONS[implementation](frozen_model(CONFIG, weights)).train()
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    frozen = {p.data_ptr() for p in net.parameters() if not p.requires_grad}
    assert frozen == {tensor.data_ptr() for tensor in weights.values()}  # no implementation has copies of its own
    assert sum(p.numel() for p in trained.values()) == 3 * 2 * 2 * 16 * 32  # attentions, q and v, A and B
    for text in (Text((), 1, rows=2, length=5), Text((), 1, data=Data(64, 16, updates=2))):
        bench_step.step_of(net, text.inputs(implementation, "cpu"))()


def test_both_sides_have_the_same_sentences_of_real_lengths():
    text = Text((), 1, data=Data(256, 64, updates=2))
    ours, peft = text.inputs("ours", "cpu"), text.inputs("PEFT, defaults", "cpu")
    for row, batch in zip(ours, peft, strict=True):
        assert row["labels"][0].tolist() == batch["labels"][batch["labels"] != -100].tolist()
        assert row["input_ids"].shape[1] == int(batch["attention_mask"].sum()) < batch["input_ids"].numel()
    assert text.tokens == (sum(r["input_ids"].numel() for r in ours), sum(r["labels"].numel() for r in ours))


def test_what_decides_most_comes_first():
    assert BF16[:3] == ("ours", "PEFT, bf16 adapters", "PEFT, defaults")
    assert QUICK[:3] == ("ours", "ours, fp32", "PEFT, fp32")
    assert CARD[:4] == ("ours", "ours, graph", "PEFT, bf16 adapters", "PEFT, defaults")


def test_a_captured_step(weights, monkeypatch):
    """Its gradients are those of the same rows as they come, each step adding them once more."""
    monkeypatch.setattr(bench_step, "CudaGraphs", lambda device: Recorder())
    text = Text((), 1, data=Data(64, 16, updates=2))
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(bench_step.with_tier(frozen_model(CONFIG, weights), 1).float().eval())
    with_graph, plain = nets
    step = bench_step.captured_step_of(with_graph, text.inputs("ours, graph", "cpu"))
    for _ in range(3):
        step()
    for row in text.inputs("ours", "cpu"):
        plain(**row).loss.backward()
    for found, expected in zip(*map(pk.trainable_parameters, (with_graph, plain)), strict=True):
        torch.testing.assert_close(found.grad, 3 * expected.grad, rtol=1e-4, atol=1e-6)


def test_steps_take_turns():
    taken = []
    found = turns.seconds_in_turn({name: lambda n=name: taken.append(n) for name in "ab"}, 3, 1, "cpu")
    assert taken == list("ab") * 4 and [len(each) for each in found.values()] == [3, 3]


def test_a_ratio_is_the_median_of_those_of_the_rounds():
    """Of a machine that becomes four times slower, between rounds and not within them."""
    assert turns.ratio([2.0, 4.0, 8.0], [1.0, 2.0, 16.0]) == 2.0
