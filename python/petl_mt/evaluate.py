"""Validation loss, beam search, BLEU and chrF."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from sacrebleu.metrics import BLEU, CHRF
from torch import Tensor

from petl_kernels import versions
from petl_kernels.errors import InputError
from petl_kernels.interop.hf import positions
from petl_kernels.interop.languages import script_of
from petl_kernels.planning.beam_search import SearchBytes, output_length

from .data import Corpus, PackedBatch, Ragged, has_text
from .loss import sequence_loss

# Scripts that put no spaces between words, where 13a would take a sentence for one word. sacreBLEU has a tokenizer for
# Chinese; its others for such scripts are models that have to be downloaded, or packages that have to be installed, and
# characters need neither. Korean has spaces, and 13a.
_TOKENIZE = dict.fromkeys("Hans Hant Hani Bopo".split(), "zh")
_TOKENIZE |= dict.fromkeys("Jpan Hira Kana Hrkt Thai Laoo Khmr Mymr Tibt Lana Talu Tale Tavt".split(), "char")

versions.check("sacrebleu")

Autocast = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class Scores:
    """Corpus BLEU and chrF2 with what sacreBLEU needs to make them again."""

    bleu: float
    bleu_signature: str
    chrf: float
    chrf_signature: str
    sentences: int

    def lines(self) -> list[str]:
        return [f"BLEU {self.bleu:.2f} {self.bleu_signature}", f"chrF {self.chrf:.2f} {self.chrf_signature}"]

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class BatchLimit:
    """Of evaluation: padded tokens of a batch, in beam search times beams, and the bytes that the search may take."""

    tokens: int
    search: SearchBytes | None = None

    def halved(self) -> BatchLimit:
        return replace(self, tokens=self.tokens // 2, search=self.search and self.search.halved())


def until_it_fits(
    run: Callable[[BatchLimit], Any], limit: BatchLimit, memory: str, say: Callable[[str], None]
) -> tuple[Any, BatchLimit]:
    """(``run(limit)``, the limit it ran under), with smaller batches while memory does not suffice.

    InputError where not even one sentence fits.
    """
    while True:
        try:
            return run(limit), limit
        except torch.OutOfMemoryError:
            if limit.tokens < 2:
                raise InputError(
                    f"memory {memory}: evaluation of one sentence does not fit; expected more, or a smaller --beam or "
                    "--max-length"
                ) from None
        # outside of the handler, whose exception holds the tensors of the search
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        limit = limit.halved()
        say(f"memory {memory}: evaluation goes on in batches of {limit.tokens:,} tokens")


def bleu_tokenizer(tgt_lang: str) -> str:
    """The tokenizer that BLEU is computed with when none is named: zh for Chinese characters, char for other scripts
    without spaces between words (Japanese, Thai, Lao, Khmer, Burmese, Tibetan), else 13a. Any code of a language goes.
    """
    return _TOKENIZE.get(script_of(tgt_lang), "13a")


_HAN = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_OTHERS = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff"  # Thai, Lao, Tibetan; Burmese; Khmer; kana


def _tokenizer_for(tgt_lang: str, references: Sequence[str]) -> str:
    """Returns the tokenizer of the language, or of most characters in ``references`` where its code says nothing."""
    if script_of(tgt_lang):
        return bleu_tokenizer(tgt_lang)
    text = "".join("".join(references).split())
    others = len(re.findall(f"[{_OTHERS}]", text))
    if 2 * (others + len(re.findall(f"[{_HAN}]", text))) <= len(text):
        return "13a"
    return "char" if others else "zh"


def bleu_metric(tgt_lang: str, tokenize: str | None = None) -> BLEU:
    """sacreBLEU for a target language. InputError for a tokenizer that is unknown or cannot run here."""
    try:
        return BLEU(tokenize=tokenize or bleu_tokenizer(tgt_lang))
    except Exception as error:  # a package or a download that is missing, by whatever exception
        known = ", ".join(BLEU.TOKENIZERS)
        reason = "" if tokenize not in BLEU.TOKENIZERS else f" ({' '.join(str(error).split())})"
        raise InputError(f"bleu_tokenize {tokenize!r}{reason}: expected one of {known}") from None


def score_lines(
    hypotheses: Sequence[str], references: Sequence[str], tgt_lang: str, tokenize: str | None = None
) -> Scores:
    """BLEU and chrF2 of ``hypotheses`` against one reference each."""
    bleu, chrf = bleu_metric(tgt_lang, tokenize or _tokenizer_for(tgt_lang, references)), CHRF()
    b, c = (metric.corpus_score(list(hypotheses), [list(references)]) for metric in (bleu, chrf))
    signatures = str(bleu.get_signature()), str(chrf.get_signature())
    return Scores(round(b.score, 4), signatures[0], round(c.score, 4), signatures[1], len(hypotheses))


@torch.no_grad()
def validation_loss(
    model,
    corpus: Corpus,
    batch_tokens: int,
    start: int,
    autocast: Autocast = nullcontext,
    told: Callable[[int], None] = lambda done: None,
    packed: bool = False,
    captured: Callable[[PackedBatch, int], Tensor] | None = None,
) -> float:
    """Mean negative log-likelihood of a target token, in nats, without label smoothing.

    told: is called after each batch with the number of sentence pairs that are done. packed: in packed rows, of the
    sentences of each batch. captured: (a packed row on the host, the most tokens of a row) -> the sum of its losses,
    where a CUDA graph gives it.
    """
    device, done = next(model.parameters()).device, 0
    total = torch.zeros((), dtype=torch.float64, device=device)
    with _evaluating(model):
        for indices in corpus.plan(batch_tokens):
            batch = corpus.packed(indices, start) if packed else corpus.collate(indices)
            if captured is not None:
                total += captured(batch, batch_tokens)
            else:
                with autocast():
                    total += sequence_loss(model, batch.to(device), start, corpus.pad)
            done += len(indices)
            told(done)
    return total.item() / int(corpus.targets.lengths.sum())


@torch.no_grad()
def translate(
    model,
    language,
    texts: Sequence[str],
    beam: int = 5,
    max_length: int = 256,
    limit: BatchLimit | int = 4096,
    autocast: Autocast = nullcontext,
    told: Callable[[int], None] = lambda done: None,
) -> tuple[list[str], int]:
    """Translations by beam search, in the order of ``texts``, and how many sources were cut to ``max_length`` tokens,
    or to the positions of a model that has fewer.

    A line without text gives an empty line, and so does one of characters that nobody sees. Searched in batches of like
    length; limit: of a batch, or its tokens. told: is called after each batch with the
    number of ``texts`` that are done.
    """
    device = next(model.parameters()).device
    max_length = fitting_length(model, max_length)
    (nothing,) = language.encode_source([""])
    filled = [i for i, text in enumerate(texts) if has_text(text)]
    encoded = language.encode_source([texts[i] for i in filled])
    filled = [i for i, ids in zip(filled, encoded, strict=True) if ids != nothing]
    encoded = [ids for ids in encoded if ids != nothing]
    cut = sum(len(ids) > max_length for ids in encoded)
    encoded = [shortened(ids, max_length, len(language.source_tail)) for ids in encoded]
    results = [""] * len(texts)
    if not filled:
        return results, 0
    rows = Ragged(encoded)
    corpus = Corpus(rows, rows, language.pad_token_id)
    done = len(texts) - len(filled)
    for indices in _batches(corpus, limit if isinstance(limit, BatchLimit) else BatchLimit(limit), beam, max_length):
        width = int(corpus.lengths[indices].max())
        source = corpus.sources.padded(indices, corpus.pad, width).to(device)
        with _evaluating(model), autocast():
            output = model.generate(
                input_ids=source,
                attention_mask=(source != corpus.pad).long(),
                num_beams=beam,
                early_stopping=beam > 1,
                do_sample=False,
                max_length=None,
                max_new_tokens=output_length(width, max_length),
                **language.generate_kwargs(),
            )
        for index, text in zip(indices, language.decode(output), strict=True):
            results[filled[index]] = " ".join(text.split())  # one line in, one line out
        done += len(indices)
        told(done)
    return results, cut


def shortened(ids: list[int], most: int, tail: int) -> list[int]:
    """``ids``, at most ``most`` (1 or more) of them: the beginning, and the last ``tail`` ids, which are marks."""
    if len(ids) <= most:
        return ids
    end = ids[-min(tail, most) :]
    return ids[: most - len(end)] + end


def fitting_length(model, max_length: int) -> int:
    """``max_length``, or the number of positions of a model that has fewer."""
    return min(max_length, positions(model.config) or max_length)


@contextmanager
def _evaluating(model) -> Iterator[None]:
    """Without dropout; afterwards as before, also when memory has not sufficed."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _batches(corpus: Corpus, limit: BatchLimit, beam: int, max_length: int) -> list[np.ndarray]:
    """Batches of sentences within both limits; one sentence at least."""
    tokens, search = max(1, limit.tokens // beam), limit.search
    if search is None:
        return corpus.plan(tokens)
    outputs = np.array([output_length(int(length), max_length) for length in corpus.lengths])
    room = max(1.0, search.memory - search.always)
    shares = np.maximum(corpus.lengths / tokens, search.of(corpus.lengths, outputs) / room)
    return corpus.plan(1, costs=shares)
