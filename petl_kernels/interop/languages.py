"""Sentences to token ids and back, by each model family's own convention.

| family             | source         | labels         | generation                    |
| ------------------ | -------------- | -------------- | ----------------------------- |
| M2M-100, mBART-50  | lang X eos     | lang X eos     | forced BOS = target language  |
| NLLB, NLLB-MoE     | lang X eos     | lang X eos     | forced BOS = target language  |
| SeamlessM4T        | lang X eos     | lang X eos     | forced BOS = target language  |
| NLLB, legacy       | X eos lang     | lang X eos     | forced BOS = target language  |
| mBART (25 langs)   | X eos lang     | X eos lang     | decoder start = target language |
| Marian             | [>>xxx<<] X eos | X eos         | -                             |
| T5, mT5, MADLAD    | [<2xx>] X eos  | X eos          | -                             |
| UMT5, Aya-101      | X eos          | X eos          | -                             |
| ByT5               | X eos          | X eos          | -                             |

X is the sentence in pieces, in ByT5 its UTF-8 bytes. Text never becomes a special token: a sentence that holds the
characters "</s>" has those characters as its pieces, or <unk> where the tokenizer has no way to spell them. Words that
``add_tokens`` added are text, with the tokenizer's own ids, special ones too; they stay in what is decoded. A language
token that was added to a vocabulary is one like the others.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from petl_kernels.errors import InputError
from petl_kernels.interop.added_words import AddedWords
from petl_kernels.models.transformers_names import (
    byte_offset,
    ends_with_language,
    gone,
    has_pieces_apart,
    has_words_like_languages,
    language_ids,
    marks_of,
    pieces_of,
    start_of_decoder,
    target_ids,
)


def _table(text: str) -> dict[str, str]:
    """Returns the pairs of ``text``, "a:b c:d"."""
    return dict(entry.split(":") for entry in text.split())


# ISO 639-1 code and FLORES-200 code (ISO 639-3 and the script that is usual for the language).
_FLORES = _table(
    """
    af:afr_Latn ak:aka_Latn am:amh_Ethi ar:arb_Arab as:asm_Beng ay:ayr_Latn az:azj_Latn ba:bak_Cyrl be:bel_Cyrl
    bg:bul_Cyrl bm:bam_Latn bn:ben_Beng bo:bod_Tibt bs:bos_Latn ca:cat_Latn cs:ces_Latn cy:cym_Latn da:dan_Latn
    de:deu_Latn dz:dzo_Tibt ee:ewe_Latn el:ell_Grek en:eng_Latn eo:epo_Latn es:spa_Latn et:est_Latn eu:eus_Latn
    fa:pes_Arab ff:fuv_Latn fi:fin_Latn fj:fij_Latn fo:fao_Latn fr:fra_Latn ga:gle_Latn gd:gla_Latn gl:glg_Latn
    gn:grn_Latn gu:guj_Gujr ha:hau_Latn he:heb_Hebr hi:hin_Deva hr:hrv_Latn ht:hat_Latn hu:hun_Latn hy:hye_Armn
    id:ind_Latn ig:ibo_Latn is:isl_Latn it:ita_Latn ja:jpn_Jpan jv:jav_Latn ka:kat_Geor kg:kon_Latn ki:kik_Latn
    kk:kaz_Cyrl km:khm_Khmr kn:kan_Knda ko:kor_Hang kr:knc_Latn ks:kas_Arab ku:kmr_Latn ky:kir_Cyrl lb:ltz_Latn
    lg:lug_Latn li:lim_Latn ln:lin_Latn lo:lao_Laoo lt:lit_Latn lv:lvs_Latn mg:plt_Latn mi:mri_Latn mk:mkd_Cyrl
    ml:mal_Mlym mn:khk_Cyrl mr:mar_Deva ms:zsm_Latn mt:mlt_Latn my:mya_Mymr no:nob_Latn ne:npi_Deva nl:nld_Latn
    nn:nno_Latn ny:nya_Latn oc:oci_Latn om:gaz_Latn or:ory_Orya pa:pan_Guru pl:pol_Latn ps:pbt_Arab pt:por_Latn
    qu:quy_Latn rn:run_Latn ro:ron_Latn ru:rus_Cyrl rw:kin_Latn sa:san_Deva sc:srd_Latn sd:snd_Arab sg:sag_Latn
    si:sin_Sinh sk:slk_Latn sl:slv_Latn sm:smo_Latn sn:sna_Latn so:som_Latn sq:als_Latn sr:srp_Cyrl ss:ssw_Latn
    st:sot_Latn su:sun_Latn sv:swe_Latn sw:swh_Latn ta:tam_Taml te:tel_Telu tg:tgk_Cyrl th:tha_Thai ti:tir_Ethi
    tk:tuk_Latn tl:tgl_Latn tn:tsn_Latn tr:tur_Latn ts:tso_Latn tt:tat_Cyrl tw:twi_Latn ug:uig_Arab uk:ukr_Cyrl
    ur:urd_Arab uz:uzn_Latn vi:vie_Latn wo:wol_Latn xh:xho_Latn yi:ydd_Hebr yo:yor_Latn zh:zho_Hans zu:zul_Latn
    nso:nso_Latn
    """
)
# Other codes for the same languages: macrolanguages and members, bibliographic and withdrawn codes, models' own.
_ALIASES = _table(
    """
    alb:sq ara:ar arm:hy aym:ay aze:az baq:eu bre:br bur:my chi:zh cmn:zh cze:cs dut:nl ekk:et fas:fa fil:tl fre:fr
    fry:fy ful:ff geo:ka ger:de gre:el gug:gn ice:is in:id iw:he ji:yi jw:jv kau:kr kng:kg kur:ku lav:lv mac:mk
    mao:mi may:ms mlg:mg mo:ro mol:ro mon:mn msa:ms nb:no nep:ne nor:no ns:nso ori:or orm:om pbu:ps per:fa pus:ps
    que:qu rum:ro scc:sr scr:hr slo:sk sqi:sq src:sc swa:sw tib:bo uzb:uz wel:cy yid:yi
    """
)
_ALIASES |= {flores.split("_")[0]: short for short, flores in _FLORES.items()}
_SCRIPTS = {short: flores.split("_")[1] for short, flores in _FLORES.items()}
# Scripts of languages that no model here has a code for, or that have no short one; all are written without spaces.
_MORE_SCRIPTS = _table(
    """
    yue:Hant nan:Hant hak:Hant lzh:Hant och:Hant ltc:Hant wuu:Hans gan:Hans hsn:Hans cjy:Hans cdo:Hans mnp:Hans
    cpx:Hans czh:Hans czo:Hans csp:Hans ryu:Jpan ain:Jpan nod:Lana shn:Mymr mnw:Mymr ksw:Mymr rki:Mymr kht:Mymr
    khb:Talu tts:Thai sou:Thai adx:Tibt lbj:Tibt khg:Tibt sip:Tibt
    """
)
_REGION_SCRIPTS = {
    **{("zh", region): "hans" for region in ("cn", "sg", "my")},
    **{("zh", region): "hant" for region in ("tw", "hk", "mo")},
}

# config.model_type of models with a language token on both sides
LANGUAGE_FIRST = ("m2m_100", "mbart", "nllb-moe", "seamless_m4t", "seamless_m4t_v2")
_TAG_FORMS = {  # how each family writes a language as one token
    "m2m100": re.compile(r"__([a-z]{2,3}(?:[-_][A-Za-z]+)*)__"),
    "nllb": re.compile(r"([a-z]{3}_[A-Z][a-z]{3})"),
    "mbart": re.compile(r"([a-z]{2}_[A-Z]{2})"),
    "marian": re.compile(r">>([^<>\s]+)<<"),
    "t5": re.compile(r"<2([a-z]{2,3}(?:[-_][A-Za-z_-]+)?)>"),
}
_ADDED_FORMS = _TAG_FORMS | {"mbart": re.compile(r"([a-z]{2,3}_[A-Z]{2})")}  # of languages that somebody has added


class LanguagePair:
    """One translation direction of one model.

    `src_lang` and `tgt_lang`: a short code ("en", "sw", "zh-TW"), an ISO 639-3 code ("swa") or the model's own form
    ("eng_Latn", "en_XX", "__en__", "<2en>", ">>deu<<"). Models that know no languages (a Marian of one pair, plain T5)
    take any code or None and use neither.

    Attributes: `src_token`, `tgt_token` (the language tokens in use, or None), `forced_bos_token_id`,
    `decoder_start_token_id` (None: the model's own), `pad_token_id`, `eos_token_id`, `source_tail` (the marks behind a
    source: the end of the sentence, and a language tag in models that have it there).
    Raises InputError for a language that the model does not have, naming near ones.
    """

    def __init__(self, model, tokenizer, src_lang: str | None = None, tgt_lang: str | None = None):
        self.tokenizer = tokenizer
        self.pad_token_id: int = tokenizer.pad_token_id
        self.eos_token_id: int = tokenizer.eos_token_id
        self.forced_bos_token_id: int | None = None
        self.decoder_start_token_id: int | None = None
        self.src_token = self.tgt_token = None
        self._source_head: list[int] = []
        self._target_head: list[int] = []
        self.source_tail: list[int] = [self.eos_token_id]
        self._target_tail = [self.eos_token_id]

        tags = language_tokens(tokenizer)
        self._skip = set(tokenizer.all_special_ids) | set(tags.values())
        self._words = AddedWords(tokenizer, tags)
        self._skip -= set(self._words.ids.values())
        if self._words:
            self._words.learn_spaces(lambda texts: self._pieces(texts, target=False))
        self._start_token_id: int | None = None
        self._targets = target_ids(tokenizer)
        if self._targets is not None:
            self._use_separate_vocabularies(model, self._targets)
        if model.config.model_type == "t5gemma":
            self._mark_as_gemma(model.config)
        if model.config.model_type in LANGUAGE_FIRST:
            self._tag_both_sides(tags, src_lang, tgt_lang)
        elif tags:
            self.tgt_token = find_language(tgt_lang, tags, "target")
            self._source_head = [*self._source_head, *self._prefix(self.tgt_token, tags)]

    def _tag_both_sides(self, tags: dict[str, int], src_lang: str | None, tgt_lang: str | None) -> None:
        self.src_token = find_language(src_lang, tags, "source")
        self.tgt_token = find_language(tgt_lang, tags, "target")
        source, target = tags[self.src_token], tags[self.tgt_token]
        if ends_with_language(self.tokenizer):
            self.source_tail = [self.eos_token_id, source]
        else:
            self._source_head = [source]
        if type(self.tokenizer).__name__.startswith("MBartTokenizer"):
            self._target_tail = [self.eos_token_id, target]  # the model moves the last token to the front
            self.decoder_start_token_id = target
        else:  # NLLB's legacy form too: generation is forced to begin with the language, so training must be
            self._target_head = [target]
            self.forced_bos_token_id = target

    def _mark_as_gemma(self, config: Any) -> None:
        """Sets up a source as the tokenizer marks it, with a begin and no end, and the id that the decoder begins
        with, of the decoder's own configuration. Raises InputError where it has none."""
        before, behind = marks_of(self.tokenizer)
        if before or behind:
            self._source_head, self.source_tail = before, behind
        self.decoder_start_token_id = start_of_decoder(config)
        if self.decoder_start_token_id is None:
            raise InputError("model: its decoder's config has no bos_token_id; expected one (T5Gemma has 2)")

    def _use_separate_vocabularies(self, model, targets: dict[str, int]) -> None:
        """Sets up a Marian with a vocabulary for each side: labels and what is generated are ids of the target's.

        Raises InputError where the model ends with another id than the target's end of sentence, or has one table.
        """
        name, config = type(self.tokenizer).__name__, model.config
        if self._words:
            raise InputError(
                f"tokenizer {name}: words were added, {next(iter(self._words.ids))!r} first, and it has a vocabulary "
                "for each side; expected none, since their ids are of one side"
            )
        if getattr(config, "share_encoder_decoder_embeddings", True):
            raise InputError(
                f"tokenizer {name}: has a vocabulary for each side; expected a model with "
                "share_encoder_decoder_embeddings false"
            )
        special = {str(token) for token in self.tokenizer.all_special_tokens}
        end = targets.get(self.tokenizer.eos_token)
        if end is None or end != config.eos_token_id:
            raise InputError(
                f"tokenizer {name}: the target's end of sentence has the id {end}; expected the model's "
                f"{config.eos_token_id} (eos_token_id)"
            )
        self._skip = {i for piece, i in targets.items() if piece in special}
        self._target_tail, self._start_token_id = [end], config.decoder_start_token_id

    def _prefix(self, token: str, tags: dict[str, int]) -> list[int]:
        if has_pieces_apart(self.tokenizer):
            return [tags[token]]
        return self.tokenizer(token, add_special_tokens=False)["input_ids"]

    def encode_source(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns token ids for the encoder, language and end of sentence included; no padding, no truncation."""
        return [self._source_head + ids + self.source_tail for ids in self._pieces(texts, target=False)]

    def encode_target(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns labels, the ids that the decoder is to produce: language and end of sentence included."""
        return [self._target_head + ids + self._target_tail for ids in self._pieces(texts, target=True)]

    def decode(self, sequences: Iterable) -> list[str]:
        """Returns the text of each sequence of ids (lists or a 2-d tensor), without language and special tokens."""
        rows = [row.tolist() if hasattr(row, "tolist") else row for row in sequences]
        if self._targets is not None:
            rows = [self._sentence(list(row)) for row in rows]
        rows = [[token for token in row if token >= 0 and token not in self._skip] for row in rows]
        if self._targets is not None:
            return self._decode_targets(rows, self._targets)
        return self._words.decode(rows, partial(self.tokenizer.batch_decode, clean_up_tokenization_spaces=False))

    def _sentence(self, row: list[int]) -> list[int]:
        """Returns what stands between start and end: padding's id may be that of a piece of the target's words."""
        row = row[1:] if row[:1] == [self._start_token_id] else row
        end = self._target_tail[0]
        return row[: row.index(end)] if end in row else row

    def _decode_targets(self, rows: list[list[int]], targets: dict[str, int]) -> list[str]:
        pieces = pieces_of(self.tokenizer, target=True)
        if pieces is None:
            raise gone(f"spm_source of {type(self.tokenizer).__name__}", "a vocabulary for each side")
        model, names = pieces[0], {i: piece for piece, i in targets.items()}
        return [model.decode_pieces([names[i] for i in row if i in names]) for row in rows]

    def generate_kwargs(self) -> dict[str, int]:
        """Returns what `model.generate` needs to begin in the target language."""
        both = {
            "forced_bos_token_id": self.forced_bos_token_id,
            "decoder_start_token_id": self.decoder_start_token_id,
        }
        return {key: value for key, value in both.items() if value is not None}

    def _pieces(self, texts: Sequence[str], target: bool) -> list[list[int]]:
        tokenizer, texts = self.tokenizer, list(texts)
        if not texts:
            return []
        pieces = pieces_of(tokenizer, target)
        if pieces is not None:  # SentencePiece takes all sentences at once
            model, encoder = pieces
            encoder = {**encoder, **self._words.ids} if self._words else encoder
            return self._words.encode(texts, lambda some: _by_sentencepiece(model, encoder, tokenizer.unk_token, some))
        if target and self._targets is not None:  # a call of the tokenizer gives ids of the source's vocabulary
            raise gone(f"spm_source of {type(self.tokenizer).__name__}", "a vocabulary for each side")
        offset = byte_offset(tokenizer)
        if offset is not None:
            return self._words.encode(texts, partial(_by_bytes, offset))
        rows = self._by_tokenizer(texts, split_special=True)
        if special := [i for i, text in enumerate(texts) if self._words.holds_special(text)]:
            for i, row in zip(
                special, self._by_tokenizer([texts[i] for i in special], split_special=False), strict=True
            ):
                rows[i] = row
        # Unigram vocabularies hold "</s>" as a piece like any other, which splitting does not prevent.
        return [row if self._skip.isdisjoint(row) else self._without_special(row) for row in rows]

    def _by_tokenizer(self, texts: list[str], split_special: bool) -> list[list[int]]:
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=split_special,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]

    def _without_special(self, row: list[int]) -> list[int]:
        return [self.tokenizer.unk_token_id if token in self._skip else token for token in row]


def _by_sentencepiece(model, encoder: dict[str, int], unk_token: str, texts: list[str]) -> list[list[int]]:
    unknown, lookup = encoder[unk_token], encoder.get
    return [[lookup(piece, unknown) for piece in pieces] for pieces in model.encode(texts, out_type=str)]


def _by_bytes(offset: int, texts: list[str]) -> list[list[int]]:
    return [[offset + byte for byte in text.encode()] for text in texts]


def language_tokens(tokenizer) -> dict[str, int]:
    """Returns the language tokens that this tokenizer has, with their ids; empty for models that know no languages."""
    added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    known = language_ids(tokenizer)
    if known is not None:
        return known | {token: i for token, i in added.items() if _ADDED_FORMS["m2m100"].fullmatch(token)}
    vocabulary = added if has_words_like_languages(tokenizer) else tokenizer.get_vocab()
    name = type(tokenizer).__name__
    if name.startswith("Marian"):
        forms = ["marian"]
    elif name.startswith("Nllb"):
        forms = ["nllb"]
    elif name.startswith("MBart"):
        forms = ["mbart"]
    else:  # a tokenizer of the general class may be of any family: take the form that occurs
        forms = ["t5", "nllb", "m2m100", "mbart"]
    for form in forms:
        found = {token: i for token, i in vocabulary.items() if _TAG_FORMS[form].fullmatch(token)}
        if found:
            return found | {token: i for token, i in added.items() if _ADDED_FORMS[form].fullmatch(token)}
    return {}


def find_language(code: str | None, tags: Iterable[str], side: str = "") -> str:
    """Returns the language token among `tags` that `code` means.

    Raises InputError that names the code and near ones: unknown codes, and codes that fit several tokens.
    """
    bare = {_bare(token): token for token in tags}
    side = f"{side} language".strip()
    if not bare:
        raise InputError(f"{side} {code!r}: the tokenizer has no language tokens")
    if not code:
        raise InputError(f"{side} is missing: this model needs one of {_some(bare)}")
    if _bare(code) in bare:
        return bare[_bare(code)]
    language, script = _canonical(code)
    same = {name: token for name, token in bare.items() if _canonical(name)[0] == language}
    fit = [name for name in same if script is None or _script(name) == script]
    if len(fit) > 1:  # kas_Arab, kas_Deva: the usual script of the language
        usual = _SCRIPTS.get(language, "").lower()
        fit = [name for name in fit if _script(name) == usual] or fit
    if len(fit) == 1:
        return same[fit[0]]
    if fit:
        raise InputError(f"{side} {code!r} can mean {' or '.join(sorted(fit))} here: say which")
    near = sorted(same) or _near(code, bare)
    raise InputError(f"unknown {side} {code!r} for this model, near: {', '.join(near)}")


def _bare(token: str) -> str:
    """Returns the code in the token: __en__, <2en> and >>en<< are "en"; codes of other forms stay."""
    for form in ("m2m100", "marian", "t5"):
        match = _TAG_FORMS[form].fullmatch(token)
        if match:
            return match.group(1)
    return token


def _canonical(code: str) -> tuple[str, str | None]:
    """Returns (language, script or None), such as ("sw", "latn") for "swh_Latn" and ("en", None) for "en_XX"."""
    language, *rest = re.split(r"[-_]", _bare(code).lower())
    language = _ALIASES.get(language, language)
    for part in rest:
        if len(part) == 4 and part.isalpha():
            return language, part
        if (language, part) in _REGION_SCRIPTS:
            return language, _REGION_SCRIPTS[language, part]
        if len(part) != 2:  # neither script nor region: not a code that may be shortened
            return code, None
    return language, None


def _script(code: str) -> str:
    language, script = _canonical(code)
    return script or _SCRIPTS.get(language, "").lower()


def script_of(code: str) -> str:
    """Returns the script that a language's code names, or else the usual one of its language: "Latn"; "" when unknown.

    All forms of codes: "zh", "zho_Hans", "zh-TW", "chi", "__zh__", "<2zh_Latn>", "zh-yue".
    """
    parts = re.split(r"[-_]", _bare(code))
    if len(parts) > 1 and len(parts[1]) == 3 and parts[1].isalpha():  # a language under its macrolanguage
        parts = parts[1:]
    found = _canonical("_".join(part for part in parts if not part.isdigit()))
    if found == ("ja", "hani"):  # Japanese in characters has kana beside them
        return "Jpan"
    script = found[1] or _SCRIPTS.get(found[0]) or _MORE_SCRIPTS.get(found[0]) or ""
    return script.title()


def _near(code: str, names: Iterable[str]) -> list[str]:
    names = sorted(names)
    start = re.split(r"[-_]", _bare(code).lower())[0][:2]
    near = difflib.get_close_matches(_bare(code), names, n=5, cutoff=0.5)
    near += [name for name in names if name.lower().startswith(start) and name not in near]
    return near[:5] or [_some(names)]


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:8]) + (f" … ({len(names)} in all)" if len(names) > 8 else "")
