"""Sentence pairs as text has them, drawn from a fixed seed, in batches of like lengths as petl_mt makes them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from petl_mt.data import Batch, Corpus, PackedBatch, Ragged

PAD, START, FIRST_WORD = 1, 2, 4  # of M2M-100's configs


@dataclass(frozen=True)
class Data:
    """``updates`` ragged batches of at most ``batch_tokens`` padded tokens a side, sentences of at most ``longest``."""

    batch_tokens: int
    longest: int
    updates: int
    multiple: int = 1


def batches(data: Data, words: int) -> list[Batch]:
    corpus, chosen = _drawn(data, words)
    return [corpus.collate(indices, data.multiple) for indices in chosen]


def packed_batches(data: Data, words: int) -> list[PackedBatch]:
    """The sentences of ``batches`` without padding."""
    corpus, chosen = _drawn(data, words)
    return [corpus.packed(indices, START) for indices in chosen]


def worst_batch(data: Data, words: int) -> Batch:
    """Every sentence as long as they get: what has to fit, too."""
    rows = max(1, data.batch_tokens // data.longest)
    ids = torch.randint(FIRST_WORD, words, (rows, data.longest), generator=torch.Generator().manual_seed(0))
    return Batch.of(ids, ids, np.arange(rows), PAD)


def packed(batch: Batch) -> PackedBatch:
    """``batch``, which has no padding, as one row."""
    pairs = list(zip(batch.source.numpy(), batch.labels.numpy(), strict=True))
    return PackedBatch.of(pairs, batch.indices, START)


def _drawn(data: Data, words: int) -> tuple[Corpus, list[np.ndarray]]:
    """(the sentences, the indices of those in each batch)

    Source lengths are log-normal with a median of 28 tokens, targets within some 20% of them: of all batches in order
    of length, ``data.updates`` at even distances.
    """
    generator = np.random.default_rng(0)
    count = 32 * data.updates * max(1, data.batch_tokens // data.longest)
    source = generator.lognormal(math.log(28), 0.6, count)
    target = source * generator.lognormal(0.0, 0.2, count)
    sides = [np.clip(np.rint(lengths), 4, data.longest).astype(int) for lengths in (source, target)]
    ragged = [Ragged(generator.integers(FIRST_WORD, words, n).tolist() for n in lengths) for lengths in sides]
    corpus = Corpus(*ragged, pad=PAD)
    found = corpus.batch_indices(data.batch_tokens, data.multiple)
    return corpus, [found[(2 * i + 1) * len(found) // (2 * data.updates)] for i in range(data.updates)]
