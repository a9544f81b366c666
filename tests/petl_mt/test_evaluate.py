"""Validation loss, beam search in the right language and order, scores with signatures."""

from __future__ import annotations

import pytest
import sacrebleu
import torch
from petl_mt.config import Pair
from petl_mt.data import encode_pairs, read_pair
from petl_mt.evaluate import shortened, translate, validation_loss
from petl_mt.scores import bleu_tokenizer, score_lines

from petl_kernels.errors import InputError
from petl_kernels.interop.hf import load_pretrained
from petl_kernels.interop.languages import LanguagePair


@pytest.fixture(scope="module")
def loaded(parent):
    return load_pretrained(parent / "model")


@pytest.fixture(scope="module")
def language(loaded):
    return LanguagePair(*loaded, "en", "de")


def test_validation_loss_is_that_of_transformers(loaded, language, text):
    model, _ = loaded
    source, target = read_pair(text["valid"])
    corpus, _ = encode_pairs([(text["valid"], source, target)], {"en-de": language}, 40)
    total, tokens = 0.0, 0
    for s, t in zip(language.encode_source(source), language.encode_target(target), strict=True):
        loss = model(input_ids=torch.tensor([s]), labels=torch.tensor([t])).loss
        total, tokens = total + loss.item() * len(t), tokens + len(t)
    model.train()
    told = []
    found = validation_loss(model, corpus, batch_tokens=60, start=2, told=told.append)
    assert len(told) > 1 and told == sorted(told) and told[-1] == len(corpus)
    assert model.training
    model.eval()
    assert found == pytest.approx(total / tokens, rel=1e-5)


def test_dropout_is_back_after_an_evaluation_that_did_not_fit(loaded, language, text, monkeypatch):
    model, _ = loaded
    source, target = read_pair(text["valid"])
    corpus, _ = encode_pairs([(text["valid"], source, target)], {"en-de": language}, 40)

    def fail(*_, **__):
        assert not model.training
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model, "generate", fail)
    monkeypatch.setattr("petl_mt.evaluate.sequence_loss", fail)
    model.train()
    for evaluate in (
        lambda: validation_loss(model, corpus, batch_tokens=60, start=2),
        lambda: translate(model, language, source),
    ):
        with pytest.raises(torch.OutOfMemoryError):
            evaluate()
        assert model.training
    model.eval()


def test_order_and_lines_are_kept(loaded, language, text):
    model, _ = loaded
    source, _ = read_pair(text["test"])
    source = [*source, "", "  ", source[0]]
    together, cut = translate(model, language, source, beam=3, max_length=40, limit=240)
    alone = [translate(model, language, [line], beam=3, max_length=40)[0][0] for line in source]
    assert together == alone and cut == 0
    assert together[-3:-1] == ["", ""] and together[-1] == together[0] != ""
    assert len(set(together)) > 3
    assert translate(model, language, [])[0] == []


def test_beam_search_begins_in_the_target_language(loaded, language, monkeypatch):
    model, tokenizer = loaded
    outputs, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **given: outputs.append(generate(**given)) or outputs[-1])
    for code in ("de", "sw"):
        translate(model, LanguagePair(model, tokenizer, "en", code), ["one two", "tree"], beam=2, max_length=10)
        assert outputs[-1][:, 1].tolist() == [tokenizer.get_lang_id(code)] * 2


def test_long_sources_are_cut_and_counted(loaded, language, monkeypatch):
    model, _ = loaded
    seen, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **given: seen.append(given["input_ids"]) or generate(**given))
    lines, cut = translate(model, language, ["one " * 50, "two"], beam=1, max_length=9)
    assert cut == 1 and len(lines) == 2
    longest = max(seen, key=lambda ids: ids.shape[1])[-1].tolist()
    assert (
        len(longest) == 9 and longest[-1] == language.eos_token_id and longest[0] == language.encode_source(["a"])[0][0]
    )


def test_a_source_is_cut_to_any_length():
    """The beginning stays, with the marks at the end: one, or two where one of them is a language's."""
    ids = [9, 1, 2, 3, 0]
    assert [shortened(ids, most, 1) for most in range(1, 7)] == [[0], [9, 0], [9, 1, 0], [9, 1, 2, 0], ids, ids]
    assert [shortened(ids, most, 2) for most in range(1, 6)] == [[0], [3, 0], [9, 3, 0], [9, 1, 3, 0], ids]


def test_lines_that_nobody_sees_are_empty(loaded, language):
    """The order and the number of lines stay. Unicode counts some of these characters as letters."""
    lines = ["one two", "\u200b", "tree", "\ufeff\u00a0", "\u00ad", "three", "\u3164", "\x7f", "\u202a\u202c"]
    results, cut = translate(loaded[0], language, lines, beam=1, max_length=20)
    seen = [0, 2, 5]
    assert cut == 0 and [i for i, line in enumerate(results) if line] == seen
    assert [results[i] for i in seen] == translate(loaded[0], language, [lines[i] for i in seen], 1, 20)[0]


def test_what_normalisation_removes_is_counted_as_empty():
    class Letters:
        pad_token_id = 1

        def encode_source(self, texts):  # whose normalisation takes q away
            return [[ord(c) for c in text if c != "q"] + [2] for text in texts]

        encode_target = encode_source

    texts = [(Pair("en", "de", "s", "t"), ["ab", "qq", "c", "\u200b", "d"], ["x", "y", "q", "z", "w"])]
    corpus, (count,) = encode_pairs(texts, {"en-de": Letters()}, max_length=5)
    assert (len(corpus), count.empty, count.too_long, count.kept, count.tokens) == (2, 3, 0, 2, 4)


def test_sources_longer_than_the_positions_are_cut(loaded, language, monkeypatch):
    """An mBART or Marian reads no more tokens than it has positions for; this M2M-100 stands in for one."""
    model, _ = loaded
    seen, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **given: seen.append(given) or generate(**given))
    monkeypatch.setattr("petl_mt.evaluate.positions", lambda config: 9)
    lines, cut = translate(model, language, ["one " * 50, "two"], beam=1, max_length=400)
    assert cut == 1 and all(lines)
    assert max(given["input_ids"].shape[1] for given in seen) == 9
    assert max(given["max_new_tokens"] for given in seen) == 9


def test_scores_are_sacrebleus():
    hypotheses, references = (
        ["the cat sat on a mat", "hello there world"],
        ["the cat sat on the mat", "hello there, world"],
    )
    scores = score_lines(hypotheses, references, "en")
    assert scores.bleu == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [references]).score, abs=1e-4)
    assert scores.chrf == pytest.approx(sacrebleu.corpus_chrf(hypotheses, [references]).score, abs=1e-4)
    assert (
        "tok:13a" in scores.bleu_signature and "nc:6" in scores.chrf_signature and "version:" in scores.chrf_signature
    )
    assert scores.lines()[0] == f"BLEU {scores.bleu:.2f} {scores.bleu_signature}"


CODES = {
    "zh": "zh zho chi cmn yue lzh wuu nan zho_Hans zho_Hant zh_CN zh-TW zh-HK zh-Hant-TW ZH zh-yue zh-cmn-Hans "
    "yue_Hant __zh__ <2zh> >>cmn_Hans<< >>zho<<",
    "char": "ja jpn jpn_Jpan ja_XX __ja__ th tha tha_Thai th_TH <2th> lo lao lao_Laoo km khm khm_Khmr my bur mya "
    "mya_Mymr my_MM >>jpn_Hani<< bo tib bod bod_Tibt dz dzo dzo_Tibt shn_Mymr",
    "13a": "de ger deu eng_Latn ko kor kor_Hang ko_KR vi ar id jv zh_Latn <2zh_Latn> nan_Latn ja_Latn sr_Latn tlx xx",
}


@pytest.mark.parametrize("tokenizer", CODES)
def test_languages_without_spaces_have_their_tokenizer(tokenizer):
    assert {code: bleu_tokenizer(code) for code in CODES[tokenizer].split()} == dict.fromkeys(
        CODES[tokenizer].split(), tokenizer
    )


@pytest.mark.parametrize(
    ("language", "line", "tokenizer"),
    [
        ("ja", "今日は良い天気です", "char"),
        ("chi", "今天天气很好", "zh"),
        ("Chinese", "今天天气很好, OK", "zh"),  # no code: the text says it
        ("xx", "今日は良い天気です", "char"),
        ("thai", "สวัสดีครับ", "char"),
        ("xx", "two words, and 天", "13a"),
        ("en", "今天天气很好", "13a"),
    ],
)
def test_the_signature_says_the_tokenizer(language, line, tokenizer):
    scores = score_lines([line + "了"], [line], language)
    assert f"tok:{tokenizer}|" in scores.bleu_signature
    assert tokenizer == "13a" or 0 < scores.bleu < 100


@pytest.mark.parametrize("name", ["13b", "ja-mecab"])
def test_tokenizers_that_cannot_run_are_refused(name):
    with pytest.raises(InputError, match=f"bleu_tokenize '{name}'.*: expected one of none, zh, 13a"):
        score_lines(["a"], ["a"], "en", name)
