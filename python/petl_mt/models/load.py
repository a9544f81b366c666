"""The model of a configuration before training, and checks of the configuration against it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from petl_kernels.errors import InputError
from petl_kernels.interop.hf import load_pretrained, load_skeleton, positions
from petl_kernels.models.structure import describe
from petl_kernels.models.transformers_names import target_words

from ..config import TrainConfig
from ..data import Text, read_lines
from .new_model import LINES_AT_MOST, load_vocabulary, make_model, train_vocabulary


def load_model(config: TrainConfig, vocabulary: Path | None, text: list[Text], quiet: bool = True) -> tuple[Any, Any]:
    """Returns (model, tokenizer): a new model, or a checkpoint's, without weights where they are read later.

    vocabulary: the folder of a new model's tokenizer; None lets one be learnt from ``text``. quiet: prints no line on
    standard error that a vocabulary is being learnt.
    """
    if not config.is_new:
        return load_skeleton(config.model) if is_read_later(config) else load_pretrained(config.model)
    tokenizer = load_vocabulary(vocabulary) if vocabulary else _learn_vocabulary(config, text, quiet)
    torch.manual_seed(config.seed)
    return make_model(config, tokenizer), tokenizer


def is_read_later(config: TrainConfig) -> bool:
    """Returns whether weights are read one by one into what they become: where a plan, or a narrower dtype, says so.

    Elsewhere transformers' loader reads them as they stand in the files, and nothing is in memory beside them.
    """
    return not config.is_new and (config.memory is not None or config.precision != "fp32")


def _learn_vocabulary(config: TrainConfig, text: list[Text], quiet: bool):
    files = {path: read_lines(path) for path in config.vocab_text}
    for pair, source, target in text:  # a file that stands in several pairs counts once
        files |= {pair.source: source, pair.target: target}
    lines = [line for lines in files.values() for line in lines]
    if not quiet:  # SentencePiece learns in one call, during which no progress can be shown
        used = min(len(lines), LINES_AT_MOST)
        print(f"vocabulary: learning {config.vocab_size:,} pieces from {used:,} lines", file=sys.stderr, flush=True)
    return train_vocabulary(lines, config.vocab_size, config.character_coverage, config.seed)


def check_positions(model, max_length: int) -> None:
    """Raises InputError for sentences that may be longer than what the model has positions for."""
    limit = positions(model.config)
    if limit is not None and max_length > limit:
        raise InputError(f"max_length {max_length}: the model has {limit} positions; expected at most as many")


def width(model) -> int:
    """Returns how many values the states of ``model`` have."""
    return describe(model).d_model


def decoder_start(model, language) -> int:
    """Returns the id that the decoder begins with: of the language for mBART-25, else of the model."""
    for start in (language.decoder_start_token_id, getattr(model.config, "decoder_start_token_id", None)):
        if start is not None:
            return start
    raise InputError("model: its config has no decoder_start_token_id; expected one (mBART-50 has 2)")


def check_beam(beam: int, model) -> None:
    """Raises InputError for more beams than words: a search chooses its beams among the words that may come first."""
    words = target_words(model.config)
    if not 1 <= beam <= words:
        raise InputError(f"beam {beam}: expected 1 to {words}, the words of the model")
