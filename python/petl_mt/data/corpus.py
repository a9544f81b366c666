"""Tokenised sentence pairs, and the order in which a run trains on them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .batches import IGNORE, Batch, PackedBatch


class Ragged:
    """A list of integer sequences in one flat array."""

    def __init__(self, rows: Iterable[Sequence[int]] = ()) -> None:
        self._flat, self._lengths = array("i"), array("q")
        for row in rows:
            self.append(row)

    def append(self, row: Sequence[int]) -> None:
        self._flat.extend(row)
        self._lengths.append(len(row))

    @property
    def nbytes(self) -> int:
        return len(self._flat) * self._flat.itemsize + len(self._lengths) * self._lengths.itemsize

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.frombuffer(self._lengths, dtype=np.int64) if self._lengths else np.zeros(0, dtype=np.int64)

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate(([0], np.cumsum(self.lengths)))

    @cached_property
    def _ids(self) -> np.ndarray:
        return np.frombuffer(self._flat, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._ids[self._starts[index] : self._starts[index + 1]]

    def padded(self, indices: np.ndarray, pad: int, width: int) -> Tensor:
        """Returns the rows ``indices`` as int64 (rows, width), filled up with ``pad``."""
        result = np.full((len(indices), width), pad, dtype=np.int64)
        for row, index in enumerate(indices):
            result[row, : self.lengths[index]] = self[index]
        return torch.from_numpy(result)


class Corpus:
    """Tokenised sentence pairs, of one language pair or several."""

    def __init__(self, sources: Ragged, targets: Ragged, pad: int) -> None:
        self.sources, self.targets, self.pad = sources, targets, pad
        self.lengths = np.maximum(self.sources.lengths, self.targets.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """The bytes of both sides and of the lengths."""
        return self.sources.nbytes + self.targets.nbytes + self.lengths.nbytes

    def batch_indices(
        self,
        batch_tokens: int,
        multiple: int = 1,
        rng: np.random.Generator | None = None,
        costs: np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """Returns batches as indices: longest sentence, rounded up to ``multiple``, × sentences <= batch_tokens.

        costs: a number for each sentence that rises with its length, and replaces it. With ``rng`` sentences of one
        length mix anew and batches come in random order; without it they come by length.
        """
        order = np.arange(len(self)) if rng is None else rng.permutation(len(self))
        order = order[np.lexsort((self.sources.lengths[order], self.lengths[order]))]
        padded = -(-self.lengths[order] // multiple) * multiple if costs is None else costs[order]
        batches, first = [], 0
        while first < len(order):
            # Lengths rise, so the size of a batch that ends at i grows with i: the first i over budget ends it.
            most = max(1, int(batch_tokens // padded[first]))
            sizes = padded[first : first + most] * np.arange(1, min(most, len(order) - first) + 1)
            count = max(1, int(np.searchsorted(sizes, batch_tokens, side="right")))
            batches.append(order[first : first + count])
            first += count
        if rng is not None:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        return batches

    def collate(self, indices: np.ndarray, multiple: int = 1) -> Batch:
        """Returns the sentence pairs ``indices``, padded to widths that are multiples of ``multiple``."""

        def width(side: Ragged) -> int:
            return -(-int(side.lengths[indices].max()) // multiple) * multiple

        source = self.sources.padded(indices, self.pad, width(self.sources))
        labels = self.targets.padded(indices, IGNORE, width(self.targets))
        return Batch.of(source, labels, indices, self.pad)

    def packed(self, indices: np.ndarray, start: int) -> PackedBatch:
        """Returns the sentence pairs ``indices`` without padding; start: the id that decoder inputs begin with."""
        return PackedBatch.of([(self.sources[i], self.targets[i]) for i in indices], indices, start)

    def tokens(self, indices: np.ndarray) -> int:
        """Returns the tokens of the sentence pairs ``indices``, of both sides."""
        return int(self.sources.lengths[indices].sum() + self.targets.lengths[indices].sum())


@dataclass
class Position:
    """The next batch to train on."""

    epoch: int = 0
    batch: int = 0


class TrainBatches:
    """The endless sequence of training batches, decided by (seed, epoch) alone: any position can be gone back to.

    Which sentences are in a batch is the same whether it is padded or, with ``start``, packed.
    """

    start: int | None = None  # the id that decoder inputs begin with, where batches are packed rows

    def __init__(self, corpus: Corpus, batch_tokens: int, seed: int, multiple: int = 1) -> None:
        self.corpus, self.batch_tokens, self.seed, self.multiple = corpus, batch_tokens, seed, multiple
        self._epoch, self._indices = -1, []

    def epoch_indices(self, epoch: int) -> list[np.ndarray]:
        """Returns the batches of an epoch, as indices of sentence pairs."""
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._indices = self.corpus.batch_indices(self.batch_tokens, self.multiple, rng)
            self._epoch = epoch
        return self._indices

    def take(self, position: Position) -> Batch | PackedBatch:
        """Returns the batch at ``position``, which moves on by one."""
        batch = self.of(self.epoch_indices(position.epoch)[position.batch])
        position.batch += 1
        if position.batch == len(self._indices):
            position.epoch, position.batch = position.epoch + 1, 0
        return batch

    def of(self, indices: np.ndarray, padded: bool = False) -> Batch | PackedBatch:
        """Returns the sentences ``indices`` as a run trains on them, or padded."""
        if padded or self.start is None:
            return self.corpus.collate(indices, self.multiple)
        return self.corpus.packed(indices, self.start)
