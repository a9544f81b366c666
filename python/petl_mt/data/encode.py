"""Tokenising: each line once, with the model's own tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from petl_kernels.errors import InputError

from .corpus import Corpus, Ragged
from .text import Text, has_text

ENCODE_AT_ONCE = 50_000  # lines; their ids are Python lists for a moment


@dataclass
class Counts:
    """The lines of one pair, and how many of them are left out."""

    name: str
    lines: int
    empty: int  # one side or both without text
    too_long: int  # one side or both over max_length tokens
    tokens: int = 0  # target tokens that are trained on or scored

    @property
    def kept(self) -> int:
        return self.lines - self.empty - self.too_long

    def line(self) -> str:
        """Returns the counts as a line of the log."""
        return (
            f"{self.name}: {self.kept:,} of {self.lines:,} pairs, {self.tokens:,} target tokens; "
            f"left out {self.empty:,} empty, {self.too_long:,} over-long"
        )


def encode_pairs(
    texts: list[Text],
    languages: dict,
    max_length: int,
    use: str = "",
    told: Callable[[int], None] = lambda lines: None,
) -> tuple[Corpus, list[Counts]]:
    """Returns (one corpus of all pairs, counts of each); empty and over-long pairs of lines are left out and counted.

    languages: ``petl_kernels.interop.languages.LanguagePair`` by a pair's name. max_length: in tokens. use: "train" or
    "valid", which stands before the pair's name in the counts. told: is called with the number of pairs of lines that
    are done. Raises InputError where none is left.
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
