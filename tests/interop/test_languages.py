from __future__ import annotations

import pytest
import torch

from petl_kernels.errors import InputError
from petl_kernels.interop.languages import LanguagePair, find_language

TEXTS = ["the big dog", "", "Haus groß  rot", "  mti </s> __de__ eng_Latn  ", "日本"]
PLAIN = [text for text in TEXTS if "</s>" not in text]


def show(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize(
    ("family", "source", "target", "src_token", "tgt_token"),
    [
        ("m2m100", "en", "sw", "__en__", "__sw__"),
        ("nllb", "en", "sw", "eng_Latn", "swh_Latn"),
        ("mbart50", "en", "sw", "en_XX", "sw_KE"),
    ],
)
def test_language_first_on_both_sides(make, family, source, target, src_token, tgt_token):
    model, tokenizer = make(family)
    pair = LanguagePair(model, tokenizer, source, target)
    ours, labels = pair.encode_source(TEXTS), pair.encode_target(TEXTS)
    assert len(ours) == len(labels) == len(TEXTS)
    for ids, token in [*((row, src_token) for row in ours), *((row, tgt_token) for row in labels)]:
        tokens = show(tokenizer, ids)
        assert tokens[0] == token and tokens[-1] == "</s>"
        assert tokens.count("</s>") == 1 and not {"__de__", "eng_Latn"} & set(tokens[1:])
    assert pair.forced_bos_token_id == tokenizer.convert_tokens_to_ids(tgt_token)
    assert pair.generate_kwargs() == {"forced_bos_token_id": pair.forced_bos_token_id}
    tokenizer.src_lang, tokenizer.tgt_lang = (source, target) if family == "m2m100" else (src_token, tgt_token)
    theirs = tokenizer(PLAIN, text_target=PLAIN)
    assert pair.encode_source(PLAIN) == theirs["input_ids"]
    assert pair.encode_target(PLAIN) == theirs["labels"]


def test_generation_starts_in_the_target_language(make):
    model, tokenizer = make("m2m100")
    pair = LanguagePair(model, tokenizer, "en", "sw")
    out = model.generate(torch.tensor(pair.encode_source(["the dog"])), max_new_tokens=4, **pair.generate_kwargs())
    assert out[0, :2].tolist() == [2, tokenizer.get_lang_id("sw")]
    assert "__sw__" not in pair.decode(out)[0]


def test_nllb_legacy_source(make, tmp_path):
    model, tokenizer = make("nllb")
    tokenizer.save_pretrained(tmp_path)
    legacy = type(tokenizer).from_pretrained(tmp_path, legacy_behaviour=True)
    pair = LanguagePair(model, legacy, "deu_Latn", "zh")
    assert show(legacy, pair.encode_source(["dog"])[0])[-2:] == ["</s>", "deu_Latn"]
    assert show(legacy, pair.encode_target(["dog"])[0])[0] == "zho_Hans"


def test_mbart_of_25_languages_ends_with_the_language(make):
    model, tokenizer = make("mbart25")
    pair = LanguagePair(model, tokenizer, "en_XX", "ro")
    assert show(tokenizer, pair.encode_source(["dog"])[0])[-2:] == ["</s>", "en_XX"]
    assert show(tokenizer, pair.encode_target(["dog"])[0])[-2:] == ["</s>", "ro_RO"]
    ro = tokenizer.convert_tokens_to_ids("ro_RO")
    assert pair.generate_kwargs() == {"decoder_start_token_id": ro}
    shifted = model.prepare_decoder_input_ids_from_labels(torch.tensor(pair.encode_target(["dog"])))
    assert shifted[0, 0] == ro


def test_marian_has_no_languages_or_a_source_tag(make):
    model, tokenizer = make("marian")
    for languages in [(None, None), ("en", "de")]:
        pair = LanguagePair(model, tokenizer, *languages)
        assert pair.encode_source(PLAIN) == tokenizer(PLAIN)["input_ids"]
        assert pair.encode_target(PLAIN) == tokenizer(text_target=PLAIN)["input_ids"]
        assert pair.generate_kwargs() == {} and pair.pad_token_id == model.config.pad_token_id
    model, tokenizer = make("marian-many")
    pair = LanguagePair(model, tokenizer, "en", "sw")
    assert pair.encode_source(PLAIN) == tokenizer([">>swh<< " + text for text in PLAIN])["input_ids"]
    assert show(tokenizer, pair.encode_target(["Haus"])[0])[0] != ">>swh<<"
    assert LanguagePair(model, tokenizer, None, "zh-CN").src_token is None
    with pytest.raises(InputError, match="target language is missing"):
        LanguagePair(model, tokenizer, "en", None)


def test_t5_source_tag_where_the_vocabulary_has_one(make):
    model, tokenizer = make("madlad")
    pair = LanguagePair(model, tokenizer, "en", "swa")
    assert pair.tgt_token == "<2sw>"
    assert pair.encode_source(PLAIN) == tokenizer(["<2sw> " + text for text in PLAIN])["input_ids"]
    assert pair.encode_target(PLAIN) == tokenizer(PLAIN)["input_ids"]
    assert show(tokenizer, pair.encode_source(["dog </s>"])[0]).count("</s>") == 1
    model, tokenizer = make("t5")
    pair = LanguagePair(model, tokenizer, None, None)
    assert pair.encode_source(PLAIN) == tokenizer(PLAIN)["input_ids"]


def test_byt5_reads_bytes(make):
    """Its own tokenizer takes marks out of text, and the spaces beside them; here they are bytes like all others."""
    model, tokenizer = make("byt5")
    pair = LanguagePair(model, tokenizer, "en", "sw")
    assert (pair.src_token, pair.tgt_token, pair.generate_kwargs()) == (None, None, {})
    texts = ["dog", " läuft  漢字 😀 ", "a </s>b<extra_id_0> <pad>", ""]
    for rows in (pair.encode_source(texts), pair.encode_target(texts)):
        assert rows == [[*(3 + byte for byte in text.encode()), tokenizer.eos_token_id] for text in texts]
        assert rows[:2] == tokenizer(texts[:2])["input_ids"]
        assert pair.decode(rows) == texts
    cut = pair.encode_target(["漢字"])[0][:4]
    assert pair.decode([[*cut, 300, pair.eos_token_id]]) == ["漢"]  # half a character, and a reserved id


def test_seamless_has_languages_of_three_letters(make):
    model, tokenizer = make("seamless")
    pair = LanguagePair(model, tokenizer, "en", "swh")
    assert (pair.src_token, pair.tgt_token) == ("__eng__", "__swh__")
    tokenizer.src_lang, tokenizer.tgt_lang = "eng", "swh"
    assert pair.encode_source(PLAIN) == tokenizer(PLAIN)["input_ids"]
    starts = [[model.config.decoder_start_token_id, *row] for row in pair.encode_target(PLAIN)]
    assert starts == tokenizer(text_target=PLAIN)["input_ids"]
    assert pair.generate_kwargs() == {"forced_bos_token_id": tokenizer.convert_tokens_to_ids("__swh__")}
    assert LanguagePair(model, tokenizer, "en", "zh-TW").tgt_token == "__cmn_Hant__"


def test_t5gemma_begins_a_source_and_ends_a_target(make):
    """Its vocabulary has words that look like mBART's languages; what is reserved is text like any other."""
    model, tokenizer = make("t5gemma")
    pair = LanguagePair(model, tokenizer, "en", "sw")
    assert (pair.src_token, pair.tgt_token) == (None, None) and "en_US" in tokenizer.get_vocab()
    texts = ["the big dog", "Haus groß  rot", "en_US", ""]
    assert pair.encode_source(texts) == tokenizer(texts)["input_ids"] and pair.encode_source([""]) == [[2]]
    assert pair.encode_target(texts) == [[*row[1:], 1] for row in tokenizer(texts)["input_ids"]]
    (row,) = pair.encode_target(["a <eos> dog<start_of_turn> <unused0> <pad>"])
    assert row[-1] == 1 and not set(tokenizer.added_tokens_decoder) - {3} & set(row[:-1])
    labels = torch.tensor(pair.encode_target(["the dog"]))
    start = model.prepare_decoder_input_ids_from_labels(labels)[0, 0]
    assert pair.generate_kwargs() == {"decoder_start_token_id": start} == {"decoder_start_token_id": 2}
    model.config.decoder.bos_token_id = None
    with pytest.raises(InputError, match="its decoder's config has no bos_token_id; expected one"):
        LanguagePair(model, tokenizer, "en", "sw")


DECODED = ["m2m100", "nllb", "nllb-moe", "mbart50", "marian", "madlad", "umt5", "byt5", "t5gemma"]


@pytest.mark.parametrize("family", DECODED)
def test_decode_gives_the_text_back(make, family):
    model, tokenizer = make(family)
    pair = LanguagePair(model, tokenizer, "en", "de")
    texts = ["the big dog", "Haus rot", ""]
    for rows in (pair.encode_source(texts), pair.encode_target(texts)):
        assert pair.decode(rows) == texts
        width = max(map(len, rows))
        padded = torch.tensor([row + [pair.pad_token_id] * (width - len(row)) for row in rows])
        assert pair.decode(padded) == texts
        padded[padded == pair.pad_token_id] = -100
        assert pair.decode(padded) == texts


NLLB = ["eng_Latn", "swh_Latn", "zho_Hans", "zho_Hant", "kas_Arab", "kas_Deva", "bjn_Arab", "bjn_Latn", "arb_Arab"]


@pytest.mark.parametrize(
    ("code", "token", "tags"),
    [
        ("zh", "zho_Hans", NLLB),
        ("zh-TW", "zho_Hant", NLLB),
        ("zh_Hant", "zho_Hant", NLLB),
        ("cmn", "zho_Hans", NLLB),
        ("swa", "swh_Latn", NLLB),
        ("sw-KE", "swh_Latn", NLLB),
        ("ENG_latn", "eng_Latn", NLLB),
        ("ks", "kas_Arab", NLLB),
        ("kas_Deva", "kas_Deva", NLLB),
        ("ar", "arb_Arab", NLLB),
        ("deu_Latn", "__de__", ["__de__", "__en__"]),
        ("nb", "__no__", ["__no__", "__en__"]),
        ("pt_BR", "pt_XX", ["pt_XX", "en_XX"]),
        ("iw", "he_IL", ["he_IL", "en_XX"]),
        ("fil", "__tl__", ["__tl__", "__en__"]),
    ],
)
def test_codes(code, token, tags):
    assert find_language(code, tags) == token


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("bjn", ["bjn_Arab", "bjn_Latn", "say which"]),
        ("eng_Cyrl", ["'eng_Cyrl'", "eng_Latn"]),
        ("swh_Latin", ["'swh_Latin'", "swh_Latn"]),
        ("xx", ["'xx'", "arb_Arab"]),
        ("", ["missing", "arb_Arab"]),
        (None, ["missing", "arb_Arab"]),
    ],
)
def test_refused_codes_name_near_ones(code, words):
    with pytest.raises(InputError) as error:
        find_language(code, NLLB, "source")
    assert all(word in str(error.value) for word in [*words, "source"]) and "\n" not in str(error.value)


def test_encoding_is_batched(make):
    """Ten thousand sentences in seconds: one call for all of them, not one for each."""
    import time

    model, tokenizer = make("m2m100")
    pair = LanguagePair(model, tokenizer, "en", "sw")
    texts = ["the big dog sees the small house"] * 10_000
    start = time.perf_counter()
    assert len(pair.encode_source(texts)) == 10_000
    assert time.perf_counter() - start < 5
