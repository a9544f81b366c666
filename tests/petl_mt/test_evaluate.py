"""Validation loss, beam search in the right language and order, scores with signatures."""

from __future__ import annotations

import pytest
import sacrebleu
import torch
from petl_mt.data import encode_pairs, read_pair
from petl_mt.evaluate import bleu_tokenizer, score_lines, translate, validation_loss

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
    found = validation_loss(model, corpus, batch_tokens=60, start=2)
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


@pytest.mark.parametrize(
    ("language", "tokenizer"),
    [("de", "13a"), ("eng_Latn", "13a"), ("ja", "char"), ("jpn_Jpan", "char"), ("ja_XX", "char"), ("__ja__", "char"),
     ("zh", "zh"), ("zho_Hans", "zh"), ("zh_CN", "zh"), ("<2th>", "char")],
)  # fmt: skip
def test_languages_without_spaces_have_their_tokenizer(language, tokenizer):
    assert bleu_tokenizer(language) == tokenizer
    if tokenizer == "char":
        scores = score_lines(["今日は良い天気です"], ["今日は良い天気でした"], language)
        assert 0 < scores.bleu < 100 and "tok:char" in scores.bleu_signature


@pytest.mark.parametrize("name", ["13b", "ja-mecab"])
def test_tokenizers_that_cannot_run_are_refused(name):
    with pytest.raises(InputError, match=f"bleu_tokenize '{name}'.*: expected one of none, zh, 13a"):
        score_lines(["a"], ["a"], "en", name)
