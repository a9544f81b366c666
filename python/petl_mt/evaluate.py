"""Validation loss and beam search, in batches that fit into a budget of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from petl_kernels.errors import InputError
from petl_kernels.interop.hf import positions
from petl_kernels.planning.beam_search import SearchBytes, output_length

from .data import Corpus, PackedBatch, Ragged, has_text
from .loss import sequence_loss

Autocast = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class BatchLimit:
    """The largest batch of an evaluation."""

    tokens: int  # padding included; in a beam search, times beams
    search: SearchBytes | None = None  # the bytes of a search and of its budget, where there is one

    def halved(self) -> BatchLimit:
        return replace(self, tokens=self.tokens // 2, search=self.search and self.search.halved())


def until_it_fits(
    run: Callable[[BatchLimit], Any], limit: BatchLimit, memory: str, say: Callable[[str], None]
) -> tuple[Any, BatchLimit]:
    """Returns (``run(limit)``, the limit that it ran under), with smaller batches while memory does not suffice.

    memory: the budget, for messages. Raises InputError where not even one sentence fits.
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
    """Returns the mean negative log-likelihood of a target token, in nats, without label smoothing.

    told: is called after each batch with the number of sentence pairs that are done. packed: in packed rows, of the
    sentences of each batch. captured: (a packed row on the host, the most tokens of a row) -> the sum of its losses,
    where a CUDA graph gives it.
    """
    device, done = next(model.parameters()).device, 0
    total = torch.zeros((), dtype=torch.float64, device=device)
    with _evaluating(model):
        for indices in corpus.batch_indices(batch_tokens):
            batch = corpus.packed(indices, start) if packed else corpus.collate(indices)
            if captured is not None:
                assert isinstance(batch, PackedBatch)  # a graph reads packed rows alone
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
    """Returns (translations by beam search, in the order of ``texts``; the number of sources that were cut).

    A source is cut to ``max_length`` tokens, or to the positions of a model that has fewer. A line that shows nothing
    gives an empty line. Sentences of like length are searched together. limit: the largest batch, or its tokens. told:
    is called after each batch with the number of ``texts`` that are done.
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
    """Returns at most ``most`` (1 or more) of ``ids``: the beginning, and the last ``tail`` ids, which are marks."""
    if len(ids) <= most:
        return ids
    end = ids[-min(tail, most) :]
    return ids[: most - len(end)] + end


def fitting_length(model, max_length: int) -> int:
    """Returns ``max_length``, or the number of positions of a model that has fewer."""
    return min(max_length, positions(model.config) or max_length)


@contextmanager
def _evaluating(model) -> Iterator[None]:
    """Switches dropout off while the block runs, also where memory does not suffice."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _batches(corpus: Corpus, limit: BatchLimit, beam: int, max_length: int) -> list[np.ndarray]:
    """Returns batches of sentences within both limits, of one sentence at least."""
    tokens, search = max(1, limit.tokens // beam), limit.search
    if search is None:
        return corpus.batch_indices(tokens)
    outputs = np.array([output_length(int(length), max_length) for length in corpus.lengths])
    room = max(1.0, search.memory - search.always)
    shares = np.maximum(corpus.lengths / tokens, search.of(corpus.lengths, outputs) / room)
    return corpus.batch_indices(1, costs=shares)
