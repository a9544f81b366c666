"""Words that ``add_tokens`` gave a tokenizer: ids of their own in text, and back.

Tokenizers of the tokenizers library find them themselves. Those in Python (Marian's, M2M-100's) do one sentence at a
time, so that ``encode`` cuts all sentences at their words first, by the same rules, and SentencePiece takes all that is
between them at once. Where a tokenizer drops the space before a word, ``decode`` puts one there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from petl_kernels.errors import InputError

Rows = list[list[int]]

_MARKS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Of T5's and mT5's pretraining, and of Gemma's.
_RESERVED = re.compile(r"\u2581?<extra_id_\d+>|<unused\d+>|<(start|end)_of_turn>|<2mass>|\[@BOS@\]")


class AddedWords:
    """The words that were added to ``tokenizer``, special ones too: all added tokens but the family's own, which mark a
    sentence or are reserved for pretraining, and ``others``, its language tokens.

    Raises InputError for a word whose id is that of a language or of another piece too.
    """

    def __init__(self, tokenizer: Any, others: Mapping[str, int]) -> None:
        own = {getattr(tokenizer, f"{mark}_token", None) for mark in _MARKS} | set(others)
        added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if str(token) not in own}
        added = {i: token for i, token in added.items() if not _RESERVED.fullmatch(str(token))}
        self._tokens = {str(token): token for token in added.values()}
        self.ids = {str(token): i for i, token in added.items()}
        special = set(tokenizer.all_special_ids)
        self._special = [str(token) for i, token in added.items() if token.special or i in special]
        taken = {i: piece for piece, i in {**getattr(tokenizer, "encoder", {}), **others}.items()}
        for word, i in self.ids.items():
            if taken.get(i, word) != word:
                raise InputError(
                    f"tokenizer: the added word {word!r} has the id {i}, which {taken[i]!r} has; expected one of "
                    "its own (M2M-100's languages have to be named as extra special tokens before words are added)"
                )
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if self.ids else None
        self._glued: set[int] = set()  # words before which the encoding keeps no space

    def __bool__(self) -> bool:
        return bool(self.ids)

    def holds_special(self, text: str) -> bool:
        """Returns whether ``text`` has a word that was added as a special token."""
        return any(word in text for word in self._special)

    def learn_spaces(self, encode: Callable[[list[str]], Rows]) -> None:
        """Finds out which words are encoded the same with and without a space before them."""
        words = list(self.ids)
        (before,) = encode(["a"])
        for word, row in zip(words, encode([f"a {word}" for word in words]), strict=True):
            if row == [*before, self.ids[word]]:
                self._glued.add(self.ids[word])

    def encode(self, texts: list[str], encode: Callable[[list[str]], Rows]) -> Rows:
        """Returns the ids of ``texts``, with ``encode`` for what stands between words."""
        pattern = self._pattern
        if pattern is None:
            return encode(texts)
        split = [self._split(pattern, text) if pattern.search(text) else [text] for text in texts]
        between = iter(encode([part for parts in split for part in parts if part not in self.ids]))

        def ids(part: str) -> list[int]:
            return [self.ids[part]] if part in self.ids else next(between)

        return [[i for part in parts for i in ids(part)] for parts in split]

    def _split(self, pattern: re.Pattern[str], text: str) -> list[str]:
        """Returns ``text`` cut at words as transformers' tokenizers in Python do: the leftmost, longest word first, and
        then what each word's settings do to the text beside it."""
        parts = [part for part in pattern.split(text) if part]
        for i, word in enumerate(parts):
            if word not in self.ids:
                continue
            token = self._tokens[word]
            left, right = parts[i - 1] if i else "", parts[i + 1] if i + 1 < len(parts) else ""
            if token.rstrip and right:
                parts[i + 1] = right.lstrip()
            if token.lstrip and left:
                parts[i - 1] = left.rstrip()
            if token.single_word and left and left[-1] != " ":
                parts[i - 1], parts[i] = parts[i - 1] + word, ""
            elif token.single_word and right and right[0] != " ":
                parts[i + 1], parts[i] = word + parts[i + 1], ""
        return [part for part in parts if part]

    def decode(self, rows: Iterable[list[int]], decode: Callable[[Rows], list[str]]) -> list[str]:
        """Returns the texts of ``rows``, with ``decode`` for what is between words that the encoding glues to it."""
        rows = list(rows)
        if not self._glued:
            return decode(rows)
        split = [self._split_ids(row) for row in rows]
        between = iter(decode([part for parts in split for part in parts]))
        return [" ".join(filter(None, (next(between) for _ in parts))) for parts in split]

    def _split_ids(self, row: list[int]) -> Rows:
        parts: Rows = [[]]
        for i in row:
            if i in self._glued:
                parts += [[i], []]
            else:
                parts[-1].append(i)
        return [part for part in parts if part]
