"""The text generator: the same seed gives the same text, lines are aligned, and no content crosses the splits."""

from __future__ import annotations

import functools
import random
import re

import pytest
from petl_mt.demo import text
from petl_mt.demo.text import LANGUAGES, Draw, parallel_lines, render, split_of

from petl_kernels.errors import InputError


def test_same_seed_same_text_and_another_seed_another():
    assert parallel_lines(("en", "fi"), "train", 200, 3) == parallel_lines(("en", "fi"), "train", 200, 3)
    assert parallel_lines(("en", "fi"), "train", 200, 3) != parallel_lines(("en", "fi"), "train", 200, 4)


def test_text_is_as_recorded():
    """The parent was trained on this text: a change of the generator (or of CLDR) should be seen."""
    sentence = next(s for s in text.sentences("test", 1) if len(s.phrases) == 3)
    assert sentence.text("en") == RECORDED["en"]
    assert sentence.text("fi") == RECORDED["fi"]


def test_help_of_a_python_without_docstrings(monkeypatch, capsys):
    monkeypatch.setattr(text, "__doc__", None)  # as under python -OO
    with pytest.raises(SystemExit):
        text.main(["--help"])
    assert "--vocabulary" in capsys.readouterr().out


def test_every_kind_of_phrase_is_written_in_every_language():
    draw = Draw(random.Random(5), "train")
    slots = sorted({slot for template in text.TEMPLATES for slot in re.findall(r"\{(\w+)\}", template)})
    kinds = set()
    for slot in slots:
        for _ in range(60):
            phrase = getattr(draw, slot)()
            kinds.add(phrase.kind)
            for language in LANGUAGES:
                line = render(phrase, language)
                assert line and line == " ".join(line.split()), (phrase, language)
                # what a missing entry of CLDR would leave behind
                assert not re.search(r"[{}]|None|(duration|length|mass|volume|area|power|digital|speed)-", line), line
    assert kinds == set(text.RENDER)


SCRIPTS = {"ru": "А-я", "ar": "\u0600-\u06ff", "hi": "\u0900-\u097f", "ja": "\u3040-\u30ff\u4e00-\u9fff"}


@pytest.mark.parametrize("language", [language for language in LANGUAGES if language != "en"])
def test_lines_are_in_the_language(language):
    rows = parallel_lines(("en", language), "train", 300, 1)
    assert sum(english == other for english, other in rows) < 0.05 * len(rows)
    if language in SCRIPTS:
        assert sum(bool(re.search(f"[{SCRIPTS[language]}]", other)) for _, other in rows) > 0.9 * len(rows)


def test_lengths_and_variety():
    rows = parallel_lines(("en", "tr"), "train", 2000, 1)
    lengths = [len(english.split()) for english, _ in rows]
    assert min(lengths) >= 3 and max(lengths) <= 25
    assert sum(length > 10 for length in lengths) > 200
    assert len({english for english, _ in rows}) == len({turkish for _, turkish in rows}) == 2000


@functools.cache
def training_lines(pair: str) -> list[tuple[str, str]]:
    return parallel_lines(("en", "fi"), "train", 3000, f"1 {pair}")


@pytest.mark.slow
def test_no_test_line_stands_in_training_text():
    train = [row for pair in ("en-fi", "en-de") for row in training_lines(pair)]
    for split in ("valid", "test"):
        held_out = parallel_lines(("en", "fi"), split, 300, 1)
        for side in (0, 1):
            assert not {row[side] for row in train} & {row[side] for row in held_out}


def test_combinations_belong_to_one_split_whatever_the_seed():
    def neighbours(split):
        pairs = set()
        for sentence, _ in zip(text.sentences(split, split), range(3000), strict=False):
            for phrase in sentence.phrases:
                if phrase.kind in ("countries", "languages", "cities"):
                    codes = phrase.content[0]
                    pairs |= {frozenset(pair) for pair in zip(codes, codes[1:], strict=False)}
        return pairs

    train, test = neighbours("train"), neighbours("test")
    assert train and test and not train & test


def test_words_of_the_test_text_are_training_words():
    train = training_lines("en-fi")
    test = parallel_lines(("en", "fi"), "test", 200, 1)
    for side in (0, 1):
        known = {word for row in train for word in re.findall(r"[^\W\d]+", row[side])}
        words = [word for row in test for word in re.findall(r"[^\W\d]+", row[side])]
        assert sum(word in known for word in words) > 0.99 * len(words)


def test_split_shares():
    splits = [split_of(f"amount {n} mass-gram") for n in range(4000)]
    assert 0.66 < splits.count("train") / 4000 < 0.74
    assert 0.16 < splits.count("test") / 4000 < 0.24


def test_command_writes_aligned_files(tmp_path):
    text.main(["--out", str(tmp_path), "--pairs", "en-fi,en-tr", "--train", "50", "--valid", "7", "--test", "9",
               "--vocabulary", "20", "--seed", "2"])  # fmt: skip

    def lines(name):
        return (tmp_path / name).read_text(encoding="utf-8").splitlines()

    for split, count in (("train", 50), ("valid", 7), ("test", 9)):
        for pair, languages in (("en-fi", ("en", "fi")), ("en-tr", ("en", "tr"))):
            assert [len(lines(f"{split}.{pair}.{language}")) for language in languages] == [count, count]
    assert lines("test.en-fi.en") == lines("test.en-tr.en")
    assert lines("train.en-fi.en") != lines("train.en-tr.en")
    assert {len(lines(f"vocabulary.{language}")) for language in LANGUAGES} == {20}


def test_unknown_language_is_refused():
    with pytest.raises(InputError, match="no demo text in language 'xx': expected one of en, de"):
        parallel_lines(("en", "xx"), "train", 1, 1)


RECORDED = {
    "en": "Jul 8 – 10, 1980 (13 years, 19 months): 69 Danish kroner",
    "fi": "8.–10. heinäkuuta 1980 (13 vuotta ja 19 kuukautta): 69 Tanskan kruunua",
}
