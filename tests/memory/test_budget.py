from __future__ import annotations

import pytest
import torch

from petl_kernels.errors import InputError
from petl_kernels.memory.budget import SLACK, fit_micro_batch
from petl_kernels.memory.peak import peak_bytes

CPU = torch.device("cpu")
LONGEST = 16


class Step:
    """A toy step: one linear, `LONGEST` tokens a sentence."""

    def __init__(self):
        self.weight = torch.randn(64, 64, requires_grad=True)

    def __call__(self, sentences: int) -> None:
        x = torch.randn(sentences * LONGEST, 64)
        (x @ self.weight).relu().sum().backward()

    def living(self):
        return [t for t in (self.weight, self.weight.grad) if t is not None]


def fit(memory: int, batch_tokens: int = 4096):
    step = Step()
    return step, fit_micro_batch(step, step.living, 0, memory, batch_tokens, LONGEST, CPU)


def test_a_large_budget_needs_no_accumulation():
    _, found = fit(2**30)
    assert (found.micro_tokens, found.accumulate) == (4096, 1)


@pytest.mark.parametrize("memory", [120_000, 400_000, 1_234_567])
def test_a_small_budget_is_kept_with_as_few_micro_batches_as_can_be(memory):
    step, found = fit(memory)
    sentences = 4096 // LONGEST

    def peak(accumulate: int) -> int:
        return peak_bytes(lambda: step(-(-sentences // accumulate)), step.living(), CPU)

    assert found.accumulate > 1
    assert peak(found.accumulate) == found.peak_bytes <= (1 - SLACK) * memory < peak(found.accumulate - 1)


def test_optimizer_state_counts():
    step = Step()
    without = fit_micro_batch(step, step.living, 0, 400_000, 4096, LONGEST, CPU)
    with_state = fit_micro_batch(step, step.living, 200_000, 400_000, 4096, LONGEST, CPU)
    assert with_state.accumulate > without.accumulate


def test_a_budget_below_one_sentence_is_refused_with_the_least_that_works():
    with pytest.raises(InputError, match="expected at least that") as error:
        fit(40_000)
    step = Step()
    step(1)
    least = peak_bytes(lambda: step(1), step.living(), CPU) / (1 - SLACK)
    assert f"{least / 1024:.3g} KiB" in str(error.value)
