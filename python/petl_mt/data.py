"""Parallel text: reading, checking, tokenising once, and batches by a token budget."""

from __future__ import annotations

import gzip
import re
import unicodedata
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from petl_kernels.errors import InputError
from petl_kernels.layers.packed import IGNORE, filled, pack
from petl_kernels.step.graphs import row_sentences, row_tokens

from .config import Pair

ENCODE_AT_ONCE = 50_000  # lines; their ids are Python lists for a moment

# First bytes of what is no UTF-8 text, and how an error names it. gzip is read in files.
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
# Characters that show nothing although Unicode counts them as letters, marks or symbols: fillers, joiners, selectors.
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
_UNSEEN_CATEGORIES = {"Cc", "Cf", "Zs", "Zl", "Zp"}  # control, format, spaces


def has_text(line: str) -> bool:
    """Whether anything of ``line`` can be seen: not so of spaces, controls, zero-width and joining characters alone."""
    return any(unicodedata.category(c) not in _UNSEEN_CATEGORIES and not _UNSEEN.match(c) for c in line)


def read_lines(path: str | Path) -> list[str]:
    """The lines of a UTF-8 text file, plain or gzip (by its first bytes), without their ends.

    A line ends at "\\n" or "\\r\\n" only: other separators of Unicode stand inside sentences. Raises InputError that
    names the file, and the line where there is one: unreadable, empty, not UTF-8, another kind of file.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: damaged gzip file: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; expected a text file") from None
    lines = decode_lines(data, str(path))
    if not any(map(has_text, lines)):
        raise InputError(f"{path}: empty; expected one sentence a line")
    return lines


def decode_lines(data: bytes, name: str, first: int = 1) -> list[str]:
    """The lines of UTF-8 text; ``name`` is what an error calls it, ``first`` the number of its first line there.

    Raises InputError as ``read_lines`` does.
    """
    problem = "no text"
    try:
        text = data.decode("utf-8")
        at = data.find(b"\x00")
    except UnicodeDecodeError as error:
        at, problem = error.start, "not UTF-8"
    if at >= 0:
        kinds = (f"is {kind}; expected UTF-8 text: " for start, kind in _MAGIC.items() if data.startswith(start))
        line = data.count(b"\n", 0, at) + first
        raise InputError(f"{name}: {next(kinds, '')}line {line} is {problem} (byte 0x{data[at]:02x})")
    if "\r" in text.strip() and "\n" not in text:
        raise InputError(f"{name}: its lines end with carriage returns alone; expected line feeds")
    lines = (text.removeprefix("\ufeff") if first == 1 else text).split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.rstrip("\r") for line in lines]


def read_pair(pair: Pair) -> tuple[list[str], list[str]]:
    """Both sides of a pair; refused unless they have the same number of lines."""
    source, target = read_lines(pair.source), read_lines(pair.target)
    if len(source) != len(target):
        raise InputError(
            f"{pair.source} has {len(source)} lines and {pair.target} has {len(target)}: "
            "expected files aligned line by line"
        )
    return source, target


@dataclass
class Counts:
    """What became of the lines of one pair."""

    name: str
    lines: int
    empty: int  # one side or both without text
    too_long: int  # one side or both over max_length tokens
    tokens: int = 0  # target tokens that are trained on or scored

    @property
    def kept(self) -> int:
        return self.lines - self.empty - self.too_long

    def line(self) -> str:
        return (
            f"{self.name}: {self.kept:,} of {self.lines:,} pairs, {self.tokens:,} target tokens; "
            f"left out {self.empty:,} empty, {self.too_long:,} over-long"
        )


class Ragged:
    """A list of integer sequences in one flat array."""

    def __init__(self, rows: Iterable[Sequence[int]] = ()) -> None:
        self._flat, self._lengths = array("i"), array("q")
        for row in rows:
            self.append(row)

    def append(self, row: Sequence[int]) -> None:
        self._flat.extend(row)
        self._lengths.append(len(row))

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
        """Rows ``indices`` as int64 (rows, width), filled up with ``pad``."""
        result = np.full((len(indices), width), pad, dtype=np.int64)
        for row, index in enumerate(indices):
            result[row, : self.lengths[index]] = self[index]
        return torch.from_numpy(result)


@dataclass(frozen=True)
class Batch:
    """source, labels: int64 (sentences, length); padding is the model's pad in source, ``IGNORE`` in labels.

    What the host has to know of them it counts while it has them: asking a device would make it wait.
    """

    source: Tensor
    labels: Tensor
    indices: np.ndarray
    target_tokens: int
    padded: bool  # whether source has padding

    @classmethod
    def of(cls, source: Tensor, labels: Tensor, indices: np.ndarray, pad: int) -> Batch:
        return cls(source, labels, indices, int((labels != IGNORE).sum()), bool((source == pad).any()))

    def part(self, rows: slice, pad: int) -> Batch:
        return Batch.of(self.source[rows], self.labels[rows], self.indices[rows], pad)

    def to(self, device: torch.device) -> Batch:
        """On a CUDA device by way of pinned memory, without waiting for the copy."""
        source, labels = _moved(self.source, device), _moved(self.labels, device)
        return Batch(source, labels, self.indices, self.target_tokens, self.padded)


@dataclass(frozen=True)
class PackedBatch:
    """The sentences of a ``Batch`` without padding: ``row`` is what ``petl_kernels.pack`` makes of them.

    Decoder inputs are part of it. ``source`` (1, T) and ``labels`` (1, T') are int64.
    """

    row: dict
    indices: np.ndarray
    target_tokens: int

    @classmethod
    def of(cls, pairs: list[tuple[np.ndarray, np.ndarray]], indices: np.ndarray, start: int) -> PackedBatch:
        """start: the id that decoder inputs begin with."""
        row = pack([(source, target, np.concatenate(([start], target[:-1]))) for source, target in pairs])
        return cls(row, indices, row["labels"].numel())

    @property
    def source(self) -> Tensor:
        return self.row["input_ids"]

    @property
    def labels(self) -> Tensor:
        return self.row["labels"]

    def parts(self, tokens: int) -> Iterator[PackedBatch]:
        """The same sentences in rows of at most ``tokens`` a side, but of one sentence at least."""
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
        """On a CUDA device by way of pinned memory, without waiting for the copy."""
        row = {name: value if name == "longest" else _moved(value, device) for name, value in self.row.items()}
        return PackedBatch(row, self.indices, self.target_tokens)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class Corpus:
    """Tokenised sentence pairs, of one language pair or several."""

    def __init__(self, sources: Ragged, targets: Ragged, pad: int) -> None:
        self.sources, self.targets, self.pad = sources, targets, pad
        self.lengths = np.maximum(self.sources.lengths, self.targets.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def plan(
        self,
        batch_tokens: int,
        multiple: int = 1,
        rng: np.random.Generator | None = None,
        costs: np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """Batches of sentence indices: longest sentence, rounded up to ``multiple``, × sentences <= batch_tokens.

        costs: of each sentence, rising with its length, in the place of that length.
        With ``rng`` sentences of one length mix anew and batches come in random order; without, by length.
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
        def width(side: Ragged) -> int:
            return -(-int(side.lengths[indices].max()) // multiple) * multiple

        source = self.sources.padded(indices, self.pad, width(self.sources))
        labels = self.targets.padded(indices, IGNORE, width(self.targets))
        return Batch.of(source, labels, indices, self.pad)

    def packed(self, indices: np.ndarray, start: int) -> PackedBatch:
        """What ``collate`` gives, without padding; start: the id that decoder inputs begin with."""
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
        self._epoch, self._plan = -1, []

    def plan(self, epoch: int) -> list[np.ndarray]:
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._plan = self.corpus.plan(self.batch_tokens, self.multiple, rng)
            self._epoch = epoch
        return self._plan

    def take(self, position: Position) -> Batch | PackedBatch:
        """The batch at ``position``, which moves on by one."""
        batch = self.of(self.plan(position.epoch)[position.batch])
        position.batch += 1
        if position.batch == len(self._plan):
            position.epoch, position.batch = position.epoch + 1, 0
        return batch

    def of(self, indices: np.ndarray, padded: bool = False) -> Batch | PackedBatch:
        """Returns the sentences ``indices`` as a run trains on them, or padded."""
        if padded or self.start is None:
            return self.corpus.collate(indices, self.multiple)
        return self.corpus.packed(indices, self.start)


Text = tuple[Pair, list[str], list[str]]


def encode_pairs(
    texts: list[Text],
    languages: dict,
    max_length: int,
    use: str = "",
    told: Callable[[int], None] = lambda lines: None,
) -> tuple[Corpus, list[Counts]]:
    """One corpus of all pairs; empty and over-long pairs are left out and counted.

    ``languages`` maps a pair's name to its ``petl_kernels.interop.languages.LanguagePair``; ``use`` ("train",
    "valid") goes before the pair's name in the counts; ``told`` is called with the number of
    pairs of lines that are done.
    """
    sources, targets, counts, pad = Ragged(), Ragged(), [], 0
    for pair, source, target in texts:
        language = languages[pair.name]
        pad = language.pad_token_id
        (no_source,), (no_target,) = language.encode_source([""]), language.encode_target([""])
        lines = [i for i in range(len(source)) if has_text(source[i]) and has_text(target[i])]
        count = Counts(f"{use} {pair.name}".strip(), len(source), len(source) - len(lines), 0)
        for first in range(0, len(lines), ENCODE_AT_ONCE):
            some = lines[first : first + ENCODE_AT_ONCE]
            source_ids = language.encode_source([source[i] for i in some])
            target_ids = language.encode_target([target[i] for i in some])
            for s, t in zip(source_ids, target_ids, strict=True):
                if s == no_source or t == no_target:  # the tokenizer's normalisation has left nothing
                    count.empty += 1
                    continue
                if len(s) > max_length or len(t) > max_length:
                    count.too_long += 1
                    continue
                sources.append(s)
                targets.append(t)
                count.tokens += len(t)
            told(sum(c.lines for c in counts) + first + len(some))
        counts.append(count)
    if not len(sources):
        raise InputError("no sentence pair is left: " + "; ".join(c.line() for c in counts))
    return Corpus(sources, targets, pad), counts
