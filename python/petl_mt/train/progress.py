"""The progress of a run, which its checkpoints keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Progress:
    """Everything that a checkpoint needs beside tensors."""

    step: int = 0  # updates done
    epoch: int = 0
    batch: int = 0  # of this epoch, the next one
    best_loss: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    target_tokens: int = 0
    seconds: float = 0.0  # in training steps
    saved_bytes_per_token: float | None = None
    plain_saved_bytes_per_token: float | None = None
    overflows: int = 0  # updates that were skipped, in fp16
    loss_scale: dict[str, Any] | None = None  # in fp16, see ``LossScale.state``
    vectors_decay: bool = True  # as in runs of earlier versions, whose weight decay took (IA)³'s factors, too
    packed: bool | None = None  # whether batches are packed rows; decided once, when the run begins
