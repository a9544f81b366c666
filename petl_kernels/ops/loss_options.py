"""Options of the vocabulary loss, as its two ways share them (``ops/loss_by_rows.py``, ``ops/loss_by_words.py``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

ALL_ROWS = -1  # for ``counted``: the op finds out which rows count


@dataclass(frozen=True)
class LossOptions:
    """The numbers and names of one loss, in the order of the ops' schemas; ``linear_cross_entropy`` describes them."""

    label_smoothing: float
    smoothing: str
    logit_scale: float
    ignore_index: int
    chunk_bytes: int
    counted: int
    softcap: float = 0.0

    def weights(self, words: int) -> tuple[float, float]:
        """Returns a and c of the formula for a table of so many words."""
        if self.smoothing == "uniform" or not self.label_smoothing:
            return 1 - self.label_smoothing, self.label_smoothing / words
        others = self.label_smoothing / (words - 1)
        return 1 - self.label_smoothing - others, others


class Needs(NamedTuple):
    """The gradients of the vocabulary loss that are needed."""

    hidden: bool
    weight: bool
    bias: bool


NOTHING = Needs(False, False, False)
