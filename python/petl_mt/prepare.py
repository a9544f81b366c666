"""What the loop starts from: device, model, languages, what is trained, optimiser."""

from __future__ import annotations

import difflib
import logging
import sys

import torch
from torch import nn

import petl_kernels as pk
from petl_kernels import versions
from petl_kernels.errors import InputError

from .config import Pair, TrainConfig, require_bitsandbytes
from .data import Text, read_lines
from .runs import RunFolder


def make_accelerator(precision: str):
    """Device and precision."""
    versions.check("accelerate")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # a second run in this process may want another precision
    accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no")
    if accelerator.num_processes > 1:
        count = accelerator.num_processes
        raise InputError(f"{count} processes: petl-mt trains on one device; start it without a launcher")
    return accelerator


def load_model(config: TrainConfig, run: RunFolder, text: list[Text], resuming: bool, quiet: bool = True):
    """(model, tokenizer): a new model, or a checkpoint's, without weights when a plan has to be made first.

    quiet: without the line on standard error that a new model's vocabulary is being learnt.
    """
    from petl_kernels.interop.hf import load_pretrained, load_skeleton

    if not config.is_new:
        return load_pretrained(config.model) if config.memory is None else load_skeleton(config.model)
    from .new_model import LINES_AT_MOST, load_vocabulary, make_model, train_vocabulary

    if resuming and run.vocabulary.is_dir():
        tokenizer = load_vocabulary(run.vocabulary)
    else:
        files = {path: read_lines(path) for path in config.vocab_text}
        for pair, source, target in text:  # a file that stands in several pairs counts once
            files |= {pair.source: source, pair.target: target}
        lines = [line for lines in files.values() for line in lines]
        if not quiet:  # SentencePiece learns in one call, which says nothing of how far it is
            used = min(len(lines), LINES_AT_MOST)
            print(f"vocabulary: learning {config.vocab_size:,} pieces from {used:,} lines", file=sys.stderr, flush=True)
        tokenizer = train_vocabulary(lines, config.vocab_size, config.character_coverage, config.seed)
    torch.manual_seed(config.seed)
    return make_model(config, tokenizer), tokenizer


def language_pair(model, tokenizer, pair: Pair):
    from petl_kernels.interop.languages import LanguagePair

    return LanguagePair(model, tokenizer, pair.src_lang, pair.tgt_lang)


def check_positions(model, max_length: int) -> None:
    """Refuse sentences that may be longer than what the model has positions for."""
    from petl_kernels.interop.hf import positions

    limit = positions(model.config)
    if limit is not None and max_length > limit:
        raise InputError(f"max_length {max_length}: the model has {limit} positions; expected at most as many")


def decoder_start(model, language) -> int:
    """The id that the decoder begins with: of the language for mBART-25, else of the model."""
    for start in (language.decoder_start_token_id, model.config.decoder_start_token_id):
        if start is not None:
            return start
    raise InputError("model: its config has no decoder_start_token_id; expected one (mBART-50 has 2)")


def check_beam(beam: int, model) -> None:
    """A search keeps its beams among the words that may come first."""
    if not 1 <= beam <= model.config.vocab_size:
        raise InputError(f"beam {beam}: expected 1 to {model.config.vocab_size}, the words of the model")


def adapt(model, config: TrainConfig):
    """The model with what ``config.method`` trains; everything else frozen."""
    from petl_kernels.methods import METHODS

    if config.method not in METHODS:
        near = difflib.get_close_matches(config.method, METHODS, n=3) or list(METHODS)
        raise InputError(f"method {config.method!r}: unknown; expected {', '.join(near)}")
    method = METHODS[config.method]
    if config.params is not None:
        settings = method.for_budget(model, config.params, **config.method_args)
    else:
        settings = method(**config.method_args)
    if config.method == "full":  # no copy of the base to go back to
        return model.requires_grad_(True)
    return pk.adapt(model, settings)


def set_dropout(model: nn.Module, dropout: float | None, attention_dropout: float | None) -> None:
    """Families keep their rates as numbers on attentions and layers (BART's), or as Dropout modules as well (T5's)."""
    for module in model.modules():
        is_attention = hasattr(module, "q_proj") or (hasattr(module, "q") and hasattr(module, "k"))
        rate = attention_dropout if is_attention else dropout
        if rate is None:
            continue
        if isinstance(module, nn.Dropout):
            module.p = rate
        elif isinstance(getattr(module, "dropout", None), float) and _is_of_transformers(module):
            module.dropout = rate


def _is_of_transformers(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.")


def cast_frozen_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen matrices in ``dtype``; vectors (biases, norms) are small and stay in fp32, as do trained tensors."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.dim() > 1 and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def make_optimizer(parameters: list[nn.Parameter], config: TrainConfig, name: str) -> torch.optim.Optimizer:
    """AdamW, "adamw" or "adamw8bit"; weight decay on matrices only."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    settings = {"params": [g for g in groups if g["params"]], "lr": config.lr, "betas": config.betas, "eps": 1e-6}
    if name == "adamw":
        return torch.optim.AdamW(**settings, fused=True)
    require_bitsandbytes(f"optimizer {name}")
    # on the CPU it says that it misses a product with 4-bit weights, which no optimiser needs
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(**settings)
