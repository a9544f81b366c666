"""The loss of a batch, for training and evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

from petl_kernels.layers.loss.lean_loss import LeanLoss, loss_of_logits

from .data import IGNORE, Batch, PackedBatch


def shift_right(labels: Tensor, start: int, pad: int) -> Tensor:
    """Returns decoder inputs: ``start`` and then the labels without their last column, padding as ``pad``."""
    shifted = torch.cat([labels.new_full((labels.shape[0], 1), start), labels[:, :-1]], dim=1)
    return shifted.masked_fill_(shifted == IGNORE, pad)


def sequence_loss(model, batch: Batch | PackedBatch, start: int, pad: int, label_smoothing: float = 0.0) -> Tensor:
    """Returns the sum over target tokens of (1 - ε)·(-log p(y)) + ε·mean over the vocabulary of -log p, in fp32.

    start, pad: the ids that decoder inputs begin with and that padding has. No logits are kept where the model's loss
    is lean (``petl_kernels.lean``), which a packed batch needs.
    """
    options = {"label_smoothing": label_smoothing, "reduction": "sum", "counted": batch.target_tokens}
    if isinstance(batch, PackedBatch):
        return model(**batch.row, **options).loss
    inputs = {
        "input_ids": batch.source,
        "attention_mask": (batch.source != pad).long() if batch.padded else None,
        # filled up with what follows no label: the source's padding may be no word of the target
        "decoder_input_ids": shift_right(batch.labels, start, start),
        "use_cache": False,
    }
    if isinstance(model, LeanLoss):
        # mixed in before the class of a model, which can be called
        return model(**inputs, labels=batch.labels, **options).loss  # pyright: ignore[reportCallIssue]
    return loss_of_logits(model(**inputs).logits, batch.labels, label_smoothing, reduction="sum")
