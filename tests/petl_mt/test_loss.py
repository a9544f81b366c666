from __future__ import annotations

import numpy as np
import pytest
import torch
from petl_mt.data import IGNORE, Batch
from petl_mt.loss import sequence_loss, shift_right
from transformers import M2M100ForConditionalGeneration
from transformers.models.m2m_100.modeling_m2m_100 import shift_tokens_right


@pytest.fixture(scope="module")
def model(parent):
    return M2M100ForConditionalGeneration.from_pretrained(parent / "model").eval()


def batch_of(source: list[list[int]], labels: list[list[int]]) -> Batch:
    return Batch.of(torch.tensor(source), torch.tensor(labels), np.arange(len(source)), pad=1)


def test_decoder_input_is_the_labels_one_later():
    labels = torch.tensor([[7, 8, 2], [9, 2, IGNORE]])
    assert shift_right(labels, start=2, pad=1).tolist() == [[2, 7, 8], [2, 9, 2]]
    assert torch.equal(shift_right(labels, 2, 1), shift_tokens_right(labels, 1, 2))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_the_formula(model, smoothing):
    batch = batch_of([[30, 6, 7, 2], [30, 9, 2, 1]], [[31, 8, 2], [31, 2, IGNORE]])
    logits = model(
        input_ids=batch.source,
        attention_mask=(batch.source != 1).long(),
        decoder_input_ids=torch.tensor([[2, 31, 8], [2, 31, 2]]),
    ).logits
    log_p = logits.double().log_softmax(-1)
    expected = 0.0
    for row, column in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]:
        here = log_p[row, column]
        expected -= (1 - smoothing) * here[batch.labels[row, column]] + smoothing * here.mean()
    assert sequence_loss(model, batch, 2, 1, smoothing).item() == pytest.approx(expected.item(), rel=1e-5)


def test_padding_changes_nothing(model):
    alone = batch_of([[30, 6, 2]], [[31, 8, 2]])
    padded = batch_of([[30, 6, 2, 1, 1]], [[31, 8, 2, IGNORE]])
    losses = [sequence_loss(model, batch, 2, 1, 0.1).item() for batch in (alone, padded)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
