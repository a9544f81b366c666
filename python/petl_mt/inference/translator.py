"""A run that translates lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

import torch

from petl_kernels.device import resolve
from petl_kernels.errors import InputError
from petl_kernels.interop.languages import LanguagePair
from petl_kernels.units import format_size, parse_size

from ..checks import check_one_process
from ..config import TrainConfig, check_count
from ..evaluate import BatchLimit, fitting_length, translate, until_it_fits
from ..models.load import check_beam
from ..models.precision import product_dtype
from ..silence import hush
from ..terminal import say
from .load import load_run, load_run_within, run_memory


class Translator:
    """A run that translates one of its language pairs; where it has not finished, with the best of it so far."""

    def __init__(
        self,
        run: str | Path | TrainConfig,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        beam: int | None = None,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        memory: str | int | None = None,
        limits: ExitStack | None = None,
        host_memory: str | int | None = None,
    ) -> None:
        """Loads the run ``run``, its folder; a configuration stands for its model before training.

        memory: the budget in bytes, or as text such as "8GiB"; that of the run where None. It is enforced until
        ``limits`` ends; without ``limits`` it only decides how weights are loaded and how large batches are.
        host_memory: what the plan may count beside a CUDA device, under a budget; where None that of the run, or what
        is free. The other options are those of the run where None. Raises InputError for what the run or the budget
        cannot give.
        """
        check_one_process()
        for name, value in (("beam", beam), ("max_length", max_length), ("batch_tokens", batch_tokens)):
            check_count(name, value)
        budget = run_memory(run) if memory is None else parse_size(memory)
        if host_memory is not None and budget is None:
            raise InputError("host_memory: no effect without a budget; expected --memory with it")
        self.memory, self.autocast, search = None, nullcontext, None
        with hush():
            if budget is None:
                self.model, tokenizer, self.config = load_run(run)
                self.model.to(resolve())
            else:
                self.model, tokenizer, self.config, plan = load_run_within(
                    run, budget, limits, beam, max_length, memory is not None, host_memory
                )
                self.memory, search = format_size(budget), plan.search
                if (dtype := product_dtype(self.config)) is not None:
                    self.autocast = partial(torch.autocast, plan.device, dtype)
        src_lang, self.tgt_lang = _languages(self.config, src_lang, tgt_lang)
        self.language = LanguagePair(self.model, tokenizer, src_lang, self.tgt_lang)
        self.beam = self.config.beam if beam is None else beam
        check_beam(self.beam, self.model)
        self.max_length = fitting_length(self.model, self.config.max_length if max_length is None else max_length)
        self.limit = BatchLimit(self.config.batch_tokens if batch_tokens is None else batch_tokens, search)
        self.window = max(128, self.limit.tokens // 32)  # lines that fill some batches, where lines come one by one
        self.cut = 0  # sources that were longer than max_length, or than the model's positions

    def stream(
        self, lines: list[str], at_once: int = 1024, told: Callable[[int], None] = lambda done: None
    ) -> Iterator[str]:
        """Yields one translation for each line, in order; ``at_once`` lines are sorted by length and searched together.

        told: is called after each batch with the number of lines that are done.
        """
        with hush():
            for i in range(0, len(lines), at_once):
                results, cut = self._translate(lines[i : i + at_once], lambda done, first=i: told(first + done))
                self.cut += cut
                yield from results

    def _translate(self, lines: list[str], told: Callable[[int], None]) -> tuple[list[str], int]:
        def run(limit: BatchLimit) -> tuple[list[str], int]:
            return translate(self.model, self.language, lines, self.beam, self.max_length, limit, self.autocast, told)

        if self.memory is None:
            return run(self.limit)
        results, self.limit = until_it_fits(run, self.limit, self.memory, say)
        return results


def _languages(config: TrainConfig, src_lang: str | None, tgt_lang: str | None) -> tuple[str, str]:
    """Returns the given languages, with those of the run in the place of None where it has one pair."""
    pairs = {pair.name: pair for pair in config.train}
    if src_lang and tgt_lang:
        return src_lang, tgt_lang
    if len(pairs) > 1:
        raise InputError(f"the run has the pairs {', '.join(pairs)}: expected --src-lang and --tgt-lang")
    pair = next(iter(pairs.values()))
    return src_lang or pair.src_lang, tgt_lang or pair.tgt_lang
