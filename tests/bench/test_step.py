"""bench/step/bench_step.py with a tiny model: every implementation takes a step beside the same frozen weights."""

from __future__ import annotations

import sys

import pytest
import torch

from .conftest import CHECKOUT

sys.path.insert(0, str(CHECKOUT / "bench" / "step"))

import bench_step  # noqa: E402
from random_model import frozen_model, random_weights  # noqa: E402
from shapes import m2m_config  # noqa: E402

CONFIG = m2m_config(1, 32, 64, 2, 200)


@pytest.fixture(scope="module")
def weights():
    return random_weights(CONFIG, "cpu")


@pytest.mark.parametrize("implementation", bench_step.IMPLEMENTATIONS)
def test_a_step(weights, implementation):
    if implementation in bench_step.PEERS:
        pytest.importorskip("peft")
    net = bench_step.IMPLEMENTATIONS[implementation](frozen_model(CONFIG, weights)).train()
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    frozen = {p.data_ptr() for p in net.parameters() if not p.requires_grad}
    assert frozen == {tensor.data_ptr() for tensor in weights.values()}  # no implementation has copies of its own
    assert sum(p.numel() for p in trained.values()) == 3 * 2 * 2 * 16 * 32  # attentions, q and v, A and B
    source, labels = torch.randint(4, 200, (2, 2, 5))
    bench_step.step_of(net, source, labels)()


def test_what_decides_most_comes_first():
    assert list(bench_step.IMPLEMENTATIONS)[:2] == ["ours", "PEFT, bf16 adapters"]
