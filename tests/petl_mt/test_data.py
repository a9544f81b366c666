"""Reading, counting, batches."""

from __future__ import annotations

import bz2
import gzip
import lzma

import numpy as np
import pytest
from petl_mt.config import Pair
from petl_mt.data import (
    IGNORE,
    Corpus,
    Position,
    Ragged,
    TrainBatches,
    decode_lines,
    encode_pairs,
    has_text,
    read_lines,
    read_pair,
)

from petl_kernels.errors import InputError


def test_lines_end_at_newline_only(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffeins\u2028zwei\r\n\n drei\u0085vier \nfünf".encode())
    assert read_lines(path) == ["eins\u2028zwei", "", " drei\u0085vier ", "fünf"]


def test_gzip_is_known_by_its_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(gzip.compress(b"one\ntwo\n"))
    assert read_lines(path) == ["one", "two"]
    path.write_bytes(gzip.compress(b"one\ntwo\n")[:-9])
    with pytest.raises(InputError, match="a.txt: damaged gzip file"):
        read_lines(path)


def test_line_ends_change_no_count(tmp_path):
    """Windows' line ends on one side, a lone carriage return or other separators inside a line, no end at the end."""
    (tmp_path / "a").write_bytes("one\r\n\r\nt\u2028w\ro\u0085 \x0b\x0c\x1cx\r\nthree".encode())
    (tmp_path / "b").write_bytes(b"eins\n\nzwei\ndrei\n")
    source, target = read_pair(Pair("en", "de", str(tmp_path / "a"), str(tmp_path / "b")))
    assert len(source) == len(target) == 4 and source[0] == "one" and source[1] == "" and source[3] == "three"
    with pytest.raises(InputError, match="standard input: is gzip; expected UTF-8 text"):
        decode_lines(gzip.compress(b"one\n"), "standard input")
    assert decode_lines(b"", "standard input") == []


@pytest.mark.parametrize("code", [0x200B, 0xFEFF, 0xA0, 0xAD, 0x200E, 0x202E, 0x2060, 0x3000, 0x7F, 1, 0x115F, 0xFE0F,
                                  0x180E, 0x3164, 0x2800, 0xE0100, 0x2028, 0x85])  # fmt: skip
def test_what_nobody_sees_is_no_text(code):
    assert not has_text(chr(code)) and not has_text(f" {chr(code)}\t{chr(code)}")
    assert has_text(f"{chr(code)}a") and has_text("。") and has_text("\u0301") and not has_text("")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.txt: empty"),
        (b"\n \n", "a.txt: empty"),
        (b"good\nalso good\nb\xe4d\n", r"a.txt: line 3 is not UTF-8 \(byte 0xe4\)"),
        (b"cut off \xc3", r"a.txt: line 1 is not UTF-8 \(byte 0xc3\)"),
        (b"\xef\xbb\xbf", "a.txt: empty"),
        ("\u200b\n\u00a0\u00ad\n".encode(), "a.txt: empty"),
        ("one\ntwo\n".encode("utf-16"), r"a.txt: is UTF-16; .*line 1 is not UTF-8 \(byte 0xff\)"),
        ("one\ntwo\n".encode("utf-16-le"), r"a.txt: line 1 is no text \(byte 0x00\)"),
        ("one\ntwo\n".encode("utf-32"), r"a.txt: is UTF-32; "),
        (lzma.compress(b"one\ntwo\n"), "a.txt: is xz; expected UTF-8 text"),
        (bz2.compress(b"one\ntwo\n"), "a.txt: is bzip2; expected UTF-8 text"),
        (b"one\rtwo\rthree\r", "a.txt: its lines end with carriage returns alone; expected line feeds"),
    ],
)
def test_unreadable_text_is_refused(tmp_path, content, message):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_lines(path)


def test_missing_and_unequal_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere.txt: No such file or directory"):
        read_lines(tmp_path / "nowhere.txt")
    (tmp_path / "a").write_text("1\n2\n3\n")
    (tmp_path / "b").write_text("1\n2\n")
    with pytest.raises(InputError, match="a has 3 lines and .*b has 2"):
        read_pair(Pair("en", "de", str(tmp_path / "a"), str(tmp_path / "b")))


class Letters:
    """One token a letter, and an end."""

    pad_token_id = 1

    def encode_source(self, texts):
        return [[ord(c) for c in text] + [2] for text in texts]

    encode_target = encode_source


def test_left_out_pairs_are_counted():
    source = ["abc", "", "abcdefgh", "ab", "   ", "a"]
    target = ["xy", "x", "y", "xyzxyzxyz", "z", "z"]
    texts = [(Pair("en", "de", "s", "t"), source, target)]
    corpus, counts = encode_pairs(texts, {"en-de": Letters()}, max_length=5, use="train")
    count = counts[0]
    assert (count.name, count.lines, count.empty, count.too_long, count.kept, count.tokens) == (
        "train en-de",
        6,
        2,
        2,
        2,
        5,
    )
    assert len(corpus) == 2 and [chr(i) for i in corpus.sources[0][:-1]] == ["a", "b", "c"]
    assert "2 of 6 pairs" in count.line() and "2 empty, 2 over-long" in count.line()
    with pytest.raises(InputError, match="no sentence pair is left: .*0 of 6 pairs"):
        encode_pairs(texts, {"en-de": Letters()}, max_length=1)


def corpus_of(lengths: list[tuple[int, int]]) -> Corpus:
    return Corpus(Ragged([[5] * s for s, _ in lengths]), Ragged([[6] * t for _, t in lengths]), pad=1)


@pytest.fixture
def corpus() -> Corpus:
    draw = np.random.default_rng(3)
    return corpus_of([tuple(row) for row in draw.integers(1, 33, size=(257, 2))])


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("budget", [33, 100, 1000])
def test_batches_keep_to_the_budget_and_lose_nothing(corpus, budget, multiple):
    batches = corpus.batch_indices(budget, multiple, np.random.default_rng(0))
    assert sorted(np.concatenate(batches)) == list(range(257))
    for indices in batches:
        batch = corpus.collate(indices, multiple)
        width = max(batch.source.shape[1], batch.labels.shape[1])
        assert width * len(indices) <= max(budget, width)
        assert batch.source.shape[1] % multiple == 0
    if budget == 1000:  # sentences of like length together: little padding
        assert sum(len(b) * corpus.lengths[b].max() for b in batches) < 1.15 * corpus.lengths.sum()


def test_collate_pads_each_side_its_own_way():
    batch = corpus_of([(3, 1), (1, 2)]).collate(np.array([1, 0]))
    assert batch.source.tolist() == [[5, 1, 1], [5, 5, 5]]
    assert batch.labels.tolist() == [[6, 6], [6, IGNORE]]
    assert batch.target_tokens == 3


def test_order_follows_from_seed_and_epoch(corpus):
    def order(seed: int, epoch: int) -> list[list[int]]:
        return [list(indices) for indices in TrainBatches(corpus, 100, seed).epoch_indices(epoch)]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)


def test_any_position_can_be_gone_back_to(corpus):
    batches, position, seen = TrainBatches(corpus, 300, seed=1), Position(), []
    for _ in range(len(batches.epoch_indices(0)) + 3):
        seen.append(((position.epoch, position.batch), list(batches.take(position).indices)))
    assert seen[-1][0] == (1, 2)
    again = TrainBatches(corpus, 300, seed=1)
    for place, indices in reversed(seen):
        assert list(again.take(Position(*place)).indices) == indices
