"""Batches of tokenised sentence pairs: padded, or packed into rows without padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from petl_kernels.layers.packed import IGNORE, filled, pack
from petl_kernels.step.graphs import row_sentences, row_tokens


@dataclass(frozen=True)
class Batch:
    """Padded sentence pairs.

    source, labels: int64 (sentences, length); padding is the model's pad in source, ``IGNORE`` in labels. Counts are
    made while the tensors are on the host, since reading them from a device would make the host wait.
    """

    source: Tensor
    labels: Tensor
    indices: np.ndarray  # of the sentence pairs in their corpus
    target_tokens: int
    padded: bool  # whether source has padding

    @classmethod
    def of(cls, source: Tensor, labels: Tensor, indices: np.ndarray, pad: int) -> Batch:
        """Returns the batch of tensors on the host, with its counts; pad: the id of padding in ``source``."""
        return cls(source, labels, indices, int((labels != IGNORE).sum()), bool((source == pad).any()))

    def part(self, rows: slice, pad: int) -> Batch:
        """Returns the batch of some of the sentences."""
        return Batch.of(self.source[rows], self.labels[rows], self.indices[rows], pad)

    def to(self, device: torch.device) -> Batch:
        """Returns the batch on ``device``; copies to CUDA go by way of pinned memory, and nothing waits for them."""
        source, labels = _moved(self.source, device), _moved(self.labels, device)
        return Batch(source, labels, self.indices, self.target_tokens, self.padded)


@dataclass(frozen=True)
class PackedBatch:
    """Sentence pairs in one row without padding.

    row: the result of ``petl_kernels.pack``, with decoder inputs. source (1, T), labels (1, T'): int64.
    """

    row: dict
    indices: np.ndarray
    target_tokens: int

    @classmethod
    def of(cls, pairs: list[tuple[np.ndarray, np.ndarray]], indices: np.ndarray, start: int) -> PackedBatch:
        """Returns the batch of (source, target) token ids; start: the id that decoder inputs begin with."""
        row = pack([(source, target, np.concatenate(([start], target[:-1]))) for source, target in pairs])
        return cls(row, indices, row["labels"].numel())

    @property
    def source(self) -> Tensor:
        return self.row["input_ids"]

    @property
    def labels(self) -> Tensor:
        return self.row["labels"]

    def parts(self, tokens: int) -> Iterator[PackedBatch]:
        """Yields the same sentences in rows of at most ``tokens`` a side, but of one sentence at least."""
        ends = self._ends()
        first, count = 0, len(self.indices)
        for last in range(1, count + 1):
            if last == count or any(side[last + 1] - side[first] > tokens for side in ends):
                yield self._part(slice(first, last), ends)
                first = last

    def _ends(self) -> list[list[int]]:
        return [self.row["cu_seqlens"].tolist(), self.row["decoder_cu_seqlens"].tolist()]

    def _part(self, sentences: slice, ends: list[list[int]]) -> PackedBatch:
        if sentences == slice(0, len(self.indices)):
            return self
        cuts = [side[sentences.start : sentences.stop + 1] for side in ends]
        source, target = (slice(side[0], side[-1]) for side in cuts)
        row = {
            "input_ids": self.source[:, source],
            "labels": self.labels[:, target],
            "decoder_input_ids": self.row["decoder_input_ids"][:, target],
            "cu_seqlens": self.row["cu_seqlens"][sentences.start : sentences.stop + 1] - source.start,
            "decoder_cu_seqlens": self.row["decoder_cu_seqlens"][sentences.start : sentences.stop + 1] - target.start,
            "longest": max(stop - start for side in cuts for start, stop in pairwise(side)),
        }
        return PackedBatch(row, self.indices[sentences], row["labels"].numel())

    def filled(self, most: int) -> PackedBatch:
        """Returns the row filled up with sentences without labels, so that rows of up to ``most`` have few shapes."""
        tokens = row_tokens(self.source.numel(), most), row_tokens(self.labels.numel(), most)
        missing = tokens[0] - self.source.numel(), tokens[1] - self.labels.numel()
        count = len(self.row["cu_seqlens"]) - 1 + max(-(-size // self.row["longest"]) for size in missing)
        row = filled(self.row, tokens, row_sentences(count, max(tokens)))
        return PackedBatch(row, self.indices, self.target_tokens)

    def to(self, device: torch.device) -> PackedBatch:
        """Returns the batch on ``device``; copies to CUDA go by way of pinned memory, and nothing waits for them."""
        row = {name: value if name == "longest" else _moved(value, device) for name, value in self.row.items()}
        return PackedBatch(row, self.indices, self.target_tokens)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
