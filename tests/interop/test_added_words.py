"""Words, languages and vocabularies that are not as the family's first checkpoint had them."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AddedToken

from petl_kernels.errors import InputError
from petl_kernels.interop import languages
from petl_kernels.interop.hf import load_pretrained
from petl_kernels.interop.languages import LanguagePair

from .conftest import make_model, make_tokenizer

CODES = {"nllb": ("eng_Latn", "deu_Latn"), "mbart50": ("en_XX", "de_DE")}
FAMILIES = ("m2m100", "nllb", "mbart50", "mbart25", "marian", "marian-many", "t5", "mt5", "madlad", "byt5")
PLAIN, OTHERS = "ZZTERM", ("ZZTERMINAL", "QQ", "Lstr", "鱼")
TEXTS = [
    "house ZZTERM tree",
    "houseZZTERMtree",
    "ZZTERM",
    "ZZTERM ZZTERMINAL dog, ZZTERM.",
    "house QQ tree",
    "houseQQ QQtree",
    "dog Lstr tree",
    "cat 鱼 sun",
    " QQ ",
    "zzterm",
    "the <ent1> dog<ent1>",  # a special one
    "the big dog",
    "",
]


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """extended(family) -> a tokenizer that was given words, saved and read again."""
    made = {}

    def get(family: str):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            tokenizer = make_tokenizer(family, folder)
            if family == "m2m100":  # as its checkpoints have them
                files = str(folder / "vocab.json"), str(folder / "sentencepiece.bpe.model")
                languages = list(tokenizer.lang_token_to_id)
                tokenizer = transformers.M2M100Tokenizer(*files, extra_special_tokens=languages)
            tokenizer.add_tokens([PLAIN, "ZZTERMINAL", "鱼"])
            tokenizer.add_tokens(["<ent1>"], special_tokens=True)
            tokenizer.add_tokens([AddedToken("QQ", single_word=True), AddedToken("Lstr", lstrip=True, rstrip=True)])
            tokenizer.save_pretrained(folder / "saved")
            made[family] = transformers.AutoTokenizer.from_pretrained(folder / "saved")
        return made[family]

    return get


def rows_of(tokenizer) -> int:
    return 1 + max([*tokenizer.get_vocab().values(), *getattr(tokenizer, "lang_token_to_id", {"": 0}).values()])


def pair_of(family, tokenizer):
    return LanguagePair(make_model(family, rows_of(tokenizer)), tokenizer, *CODES.get(family, ("en", "de")))


@pytest.mark.parametrize("family", FAMILIES)
def test_added_words_are_the_tokenizers_own_ids(extended, family):
    tokenizer = extended(family)
    pair = pair_of(family, tokenizer)
    if family == "m2m100":
        tokenizer.tgt_lang = "de"
    own = tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    targets = tokenizer(text_target=TEXTS, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_tokens_to_ids(PLAIN) in own[0]
    head, tail = pair._source_head, pair.source_tail
    assert pair.encode_source(TEXTS) == [head + row + tail for row in own]
    assert pair.encode_target(TEXTS) == [pair._target_head + row + pair._target_tail for row in targets]


@pytest.mark.parametrize("family", FAMILIES)
def test_added_words_come_back_with_their_spaces(extended, family):
    pair = pair_of(family, extended(family))
    texts = ["house ZZTERM tree", "ZZTERM", "dog Lstr tree", "the QQ", "ZZTERM ZZTERMINAL", "the dog", "", "cat 鱼 sun"]
    texts.append("the <ent1> dog")
    rows = pair.encode_target(texts)
    assert pair.decode(rows) == texts
    assert pair.decode(torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, -100)) == texts


def test_special_text_beside_a_word_stays_text(extended):
    for family in FAMILIES:
        pair = pair_of(family, extended(family))
        (row,) = pair.encode_source(["</s> ZZTERM <pad>"])
        assert row.count(pair.eos_token_id) == 1 and pair.pad_token_id not in row
        assert pair.tokenizer.convert_tokens_to_ids(PLAIN) in row


def test_a_word_with_the_id_of_another_is_refused(make, tmp_path):
    model, _ = make("m2m100")
    tokenizer = make_tokenizer("m2m100", tmp_path)
    tokenizer.add_tokens([PLAIN])  # its languages are no special tokens here: transformers gives away a taken id
    with pytest.raises(InputError, match=r"added word 'ZZTERM' has the id \d+, which '.+' has"):
        LanguagePair(model, tokenizer, "en", "de")


@pytest.mark.parametrize(
    ("family", "code", "token", "special"),
    [
        ("m2m100", "tyv", "__tyv__", True),
        ("m2m100", "tyv", "__tyv__", False),
        ("m2m100", "sr_Latn", "__sr_Latn__", True),
        ("nllb", "tyv_Cyrl", "tyv_Cyrl", True),
        ("nllb", "tyv", "tyv_Cyrl", False),
        ("mbart50", "tyv_RU", "tyv_RU", True),
        ("mbart50", "tyv", "tyv_RU", False),
        ("marian-many", "tyv", ">>tyv<<", True),
        ("madlad", "tyv", "<2tyv>", False),
    ],
)
def test_a_new_language_is_one_like_the_others(extended, tmp_path, family, code, token, special):
    tokenizer = extended(family)
    tokenizer.save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens([token], special_tokens=special)
    new = tokenizer.convert_tokens_to_ids(token)
    assert new == rows_of(tokenizer) - 1
    model = make_model(family, rows_of(tokenizer))
    if family.startswith("mbart"):
        model.config.decoder_start_token_id = 2
    pair = LanguagePair(model, tokenizer, CODES.get(family, ("en",))[0], code)
    assert pair.tgt_token == token
    source, target = pair.encode_source(["dog ZZTERM"])[0], pair.encode_target(["dog ZZTERM"])[0]
    if family in ("marian-many", "madlad"):
        assert source.count(new) == 1 and new not in target
    else:
        assert pair.forced_bos_token_id == target[0] == new and new not in source
        out = model.generate(torch.tensor([source]), max_new_tokens=3, **pair.generate_kwargs())
        assert out[0, 1] == new
    assert pair.decode([[*target, new]]) == ["dog ZZTERM"]
    other = LanguagePair(model, tokenizer, code, CODES.get(family, ("", "de"))[1])
    assert family in ("marian-many", "madlad") or new in other.encode_source(["dog"])[0]


@pytest.fixture
def separate(make, tmp_path):
    model, tokenizer = make("marian-separate")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return load_pretrained(tmp_path)


def test_marian_with_a_vocabulary_for_each_side(separate):
    model, tokenizer = separate
    pair = LanguagePair(model, tokenizer, "en", "de")
    texts = ["the big dog", "Haus rot", "", "mti wa zzz </s>"]
    assert pair.encode_source(texts[:3]) == tokenizer(texts[:3])["input_ids"]
    rows = pair.encode_target(texts)
    assert rows[:3] == tokenizer(text_target=texts[:3])["input_ids"]
    assert all(0 <= i < 60 for row in rows for i in row) and all(row.count(0) == 1 for row in rows)
    assert max(i for row in pair.encode_source(texts) for i in row) >= 60
    assert pair.decode(rows)[:3] == texts[:3]
    start, pad = model.config.decoder_start_token_id, model.config.pad_token_id
    assert pair.decode([[start, *row, pad, pad] for row in rows])[:3] == texts[:3]
    every = torch.arange(2, 59)  # each piece of the target's vocabulary, whatever special ids the source's has
    pieces = [{i: piece for piece, i in tokenizer.target_encoder.items()}[i] for i in every.tolist()]
    assert pair.decode([[start, *every.tolist(), 0]]) == [tokenizer.spm_target.decode_pieces(pieces)]
    batch = {"input_ids": torch.tensor([pair.encode_source(["the dog"])[0]]), "labels": torch.tensor([rows[0]])}
    assert torch.isfinite(model(**batch).loss)


def test_a_vocabulary_for_each_side_needs_the_targets_pieces(separate, monkeypatch):
    model, tokenizer = separate
    pair = LanguagePair(model, tokenizer, "en", "de")
    monkeypatch.setattr(languages, "pieces_of", lambda tokenizer, target: None)
    with pytest.raises(InputError, match=r"^transformers \S+ has no spm_source of MarianTokenizer: a vocabulary for "):
        pair.decode([[2, 3, 0]])
    with pytest.raises(InputError, match=r"^transformers \S+ has no spm_source of MarianTokenizer: a vocabulary for "):
        pair.encode_target(["a"])


def test_separate_vocabularies_that_cannot_be_right_are_refused(separate, make):
    model, tokenizer = separate
    with pytest.raises(InputError, match="share_encoder_decoder_embeddings"):
        LanguagePair(make("marian")[0], tokenizer, "en", "de")
    model.config.eos_token_id = 7
    with pytest.raises(InputError, match="end of sentence has the id 0; expected the model's 7"):
        LanguagePair(model, tokenizer, "en", "de")
    model.config.eos_token_id = 0
    tokenizer.add_tokens([PLAIN])
    with pytest.raises(InputError, match="words were added, 'ZZTERM' first"):
        LanguagePair(model, tokenizer, "en", "de")
