"""Text to train on and to translate: of files, or made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from petl_mt.demo.make_parent import parent_folder

from petl_kernels.errors import InputError


@dataclass(frozen=True)
class Text:
    """Holds files of lines that belong together; name: what they are."""

    name: str
    languages: tuple[str, str]
    train: tuple[Path, Path]
    test: tuple[Path, Path]

    def flags(self, files: tuple[Path, Path]) -> list[str]:
        languages = ["--src-lang", self.languages[0], "--tgt-lang", self.languages[1]]
        return ["--train", *map(str, files), *languages]


def make_text(folder: Path, files: Sequence[str] | None, languages: str, count: int, tests: int) -> Text:
    """Returns ``count`` lines to train on and ``tests`` others: of ``files`` (the last for the tests), or made."""
    source, _, target = languages.partition("-")
    if files:
        sides = [Path(path).read_text(encoding="utf-8").splitlines() for path in files]
        if len(sides[0]) != len(sides[1]) or len(sides[0]) <= tests:
            raise InputError(f"{files[0]} and {files[1]}: {len(sides[0])} and {len(sides[1])} lines; expected as many")
        return _written(folder, "the files given", (source, target), sides, count, tests)
    try:
        from petl_mt.demo.text import write_pair
    except ImportError:
        name = "words of the parent's vocabulary in any order (Babel, which writes the demo's text, is missing)"
        return _written(folder, name, (source, target), _drawn(count + tests), count, tests)
    made = write_pair(folder, languages, count, 0, tests, seed=1)
    return Text("the demo's", (source, target), made["train"], made["test"])


def _written(
    folder: Path, name: str, languages: tuple[str, str], sides: list[list[str]], count: int, tests: int
) -> Text:
    files = {}
    for split, part in {"train": slice(0, min(count, len(sides[0]) - tests)), "test": slice(-tests, None)}.items():
        files[split] = tuple(folder / f"{split}.{language}" for language in languages)
        for path, lines in zip(files[split], sides, strict=True):
            path.write_text("".join(line + "\n" for line in lines[part]), encoding="utf-8")
    return Text(name, languages, files["train"], files["test"])


def _drawn(count: int) -> list[list[str]]:
    """Draws two sides of as many words in each line: log-normal around 14, at most 40."""
    vocabulary = json.loads((parent_folder() / "vocab.json").read_text(encoding="utf-8"))
    words = sorted(piece[1:] for piece in vocabulary if piece.startswith("▁") and piece[1:].isalpha())
    draw = np.random.default_rng(0)
    lengths = np.clip(np.rint(draw.lognormal(np.log(14), 0.5, count)), 2, 40).astype(int)
    return [[" ".join(draw.choice(words, length)) for length in lengths] for _ in range(2)]
