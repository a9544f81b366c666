"""A vocabulary and a model from nothing, in a folder that transformers loads."""

from __future__ import annotations

import pytest
import torch
from conftest import toy_lines
from petl_mt.config import Pair, TrainConfig
from petl_mt.models.load import load_model
from petl_mt.models.new_model import make_model, train_vocabulary
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from petl_kernels.errors import InputError
from petl_kernels.interop.languages import LanguagePair

LINES = [line for side in toy_lines(300, 1) for line in side]


@pytest.fixture(scope="module")
def tokenizer():
    return train_vocabulary([*LINES, "10\u00a0000\u202f€ ", "ＡＢＣ ½ ﬁn"] * 2, 70, 1.0, seed=1)


def small(tokenizer, **sizes):
    torch.manual_seed(1)
    return make_model(TrainConfig(**{"d_model": 32, "layers": 1, "heads": 2, **sizes}), tokenizer)


def test_ids_are_fairseqs(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    assert len(tokenizer.encoder) == 70
    assert tokenizer.get_lang_id("sw") in range(70, 170) and len(tokenizer.lang_token_to_id) == 100


@pytest.mark.parametrize("line", ["eins zwei groß", "10\u00a0000\u202f€", "ＡＢＣ ½ ﬁn", "Haus  Baum"])
def test_text_comes_back_as_it_was(tokenizer, line):
    pair = LanguagePair(small(tokenizer), tokenizer, "en", "de")
    ids = pair.encode_target([line])[0]
    assert ids[0] == tokenizer.get_lang_id("de") and ids[-1] == 2 and 3 not in ids
    assert pair.decode([ids]) == [" ".join(line.split(" ")).replace("  ", " ")]


def test_the_same_seed_gives_the_same_vocabulary_and_weights(tokenizer, tmp_path):
    again = train_vocabulary([*LINES, "10\u00a0000\u202f€ ", "ＡＢＣ ½ ﬁn"] * 2, 70, 1.0, seed=1)
    for name, one in (("a", tokenizer), ("b", again)):
        one.save_pretrained(tmp_path / name)
    for file in ("sentencepiece.bpe.model", "vocab.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    one, other = small(tokenizer), small(again)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_transformers_loads_the_folder(tokenizer, tmp_path):
    model = small(tokenizer).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, words = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    words.src_lang, words.tgt_lang = "en", "de"
    inputs = words(["one two"], text_target=["eins zwei"], return_tensors="pt")
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert inputs["input_ids"][0].tolist() == LanguagePair(model, tokenizer, "en", "de").encode_source(["one two"])[0]


def test_sizes_and_ties(tokenizer):
    model = small(tokenizer, ffn=56, layers=2, dropout=0.3, attention_dropout=0.2)
    config = model.config
    assert (config.encoder_layers, config.decoder_layers, config.encoder_ffn_dim) == (2, 2, 56)
    assert (config.dropout, config.attention_dropout, config.encoder_layerdrop) == (0.3, 0.2, 0.0)
    assert model.lm_head.weight is model.model.shared.weight
    assert len(tokenizer) <= model.lm_head.weight.shape[0] == 178


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"heads": 5}, "heads 5: expected a divisor of d_model"), ({"d_model": 33, "heads": 3}, "even")],
)
def test_impossible_sizes_are_refused(tokenizer, sizes, message):
    with pytest.raises(InputError, match=message):
        small(tokenizer, **sizes)


@pytest.mark.parametrize(("size", "message"), [(5, "vocab_size 5: "), (5000, "vocab_size 5000: expected at most ")])
def test_impossible_vocabulary_sizes_are_refused(size, message):
    with pytest.raises(InputError, match=message) as refusal:
        train_vocabulary(LINES, size, 1.0, seed=1)
    assert "\n" not in str(refusal.value)


def test_the_largest_size_that_is_named_works():
    with pytest.raises(InputError) as refusal:
        train_vocabulary(LINES, 5000, 1.0, seed=1)
    most = int(str(refusal.value).split("at most ")[1].split()[0])
    assert len(train_vocabulary(LINES, most, 1.0, seed=1).encoder) == most


def test_learning_a_vocabulary_is_announced(monkeypatch, capsys, tmp_path):
    for made in ("train_vocabulary", "make_model"):
        monkeypatch.setattr(f"petl_mt.models.load.{made}", lambda *_: None)
    pair = Pair("en", "de", "s", "t")
    for quiet, said in ((False, "vocabulary: learning 90 pieces from 3 lines\n"), (True, "")):
        config = TrainConfig(model="new", out=str(tmp_path), vocab_size=90)
        load_model(config, None, [(pair, ["a", "b"], ["c"])], quiet)
        assert capsys.readouterr().err == said
