"""BLEU and chrF."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from petl_kernels import versions
from petl_kernels.errors import InputError
from petl_kernels.interop.languages import script_of

# Scripts that put no spaces between words, where 13a would take a sentence for one word. sacreBLEU has a tokenizer for
# Chinese; its others for such scripts are models that have to be downloaded, or packages that have to be installed, and
# characters need neither. Korean has spaces, and 13a.
_TOKENIZE: dict[str, str] = dict.fromkeys("Hans Hant Hani Bopo".split(), "zh")
_TOKENIZE |= dict.fromkeys("Jpan Hira Kana Hrkt Thai Laoo Khmr Mymr Tibt Lana Talu Tale Tavt".split(), "char")

versions.check("sacrebleu")


@dataclass(frozen=True)
class Scores:
    """Corpus BLEU and chrF2, each with the signature that sacreBLEU makes it again from."""

    bleu: float
    bleu_signature: str
    chrf: float
    chrf_signature: str
    sentences: int

    def lines(self) -> list[str]:
        """Returns a line for each score, with its signature."""
        return [f"BLEU {self.bleu:.2f} {self.bleu_signature}", f"chrF {self.chrf:.2f} {self.chrf_signature}"]


def bleu_tokenizer(tgt_lang: str) -> str:
    """Returns the tokenizer of BLEU where none is named: zh for Chinese characters, char for other scripts
    without spaces between words (Japanese, Thai, Lao, Khmer, Burmese, Tibetan), else 13a.

    tgt_lang: a language's code in any form, such as en, sw or swh_Latn.
    """
    return _TOKENIZE.get(script_of(tgt_lang), "13a")


_HAN = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_OTHERS = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff"  # Thai, Lao, Tibetan; Burmese; Khmer; kana


def _tokenizer_for(tgt_lang: str, references: Sequence[str]) -> str:
    """Returns the tokenizer of the language, or of most characters in ``references`` where its script is unknown."""
    if script_of(tgt_lang):
        return bleu_tokenizer(tgt_lang)
    text = "".join("".join(references).split())
    others = len(re.findall(f"[{_OTHERS}]", text))
    if 2 * (others + len(re.findall(f"[{_HAN}]", text))) <= len(text):
        return "13a"
    return "char" if others else "zh"


def bleu_metric(tgt_lang: str, tokenize: str | None = None) -> BLEU:
    """Returns sacreBLEU for a target language. Raises InputError for a tokenizer that is unknown or cannot run here."""
    try:
        return BLEU(tokenize=tokenize or bleu_tokenizer(tgt_lang))
    except Exception as error:  # a package or a download that is missing, by whatever exception
        known = ", ".join(BLEU.TOKENIZERS)
        reason = "" if tokenize not in BLEU.TOKENIZERS else f" ({' '.join(str(error).split())})"
        raise InputError(f"bleu_tokenize {tokenize!r}{reason}: expected one of {known}") from None


def score_lines(
    hypotheses: Sequence[str], references: Sequence[str], tgt_lang: str, tokenize: str | None = None
) -> Scores:
    """Returns BLEU and chrF2 of ``hypotheses`` against one reference each."""
    bleu, chrf = bleu_metric(tgt_lang, tokenize or _tokenizer_for(tgt_lang, references)), CHRF()
    b, c = (metric.corpus_score(list(hypotheses), [list(references)]) for metric in (bleu, chrf))
    signatures = str(bleu.get_signature()), str(chrf.get_signature())
    return Scores(round(b.score, 4), signatures[0], round(c.score, 4), signatures[1], len(hypotheses))
