"""A new model (``--model new``): a SentencePiece vocabulary and an untrained M2M-100 model of any size.

What is saved is an ordinary Hugging Face folder: M2M100ForConditionalGeneration and M2M100Tokenizer with the 100
language tags of M2M-100.
"""

from __future__ import annotations

import io
import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch import nn

from petl_kernels.errors import InputError
from petl_kernels.models.transformers_names import rows_of_m2m100

from ..config import TrainConfig

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3, fairseq's order, which M2M100Config expects
MADE_UP_WORDS = 8  # M2M100Tokenizer counts as many unused ids after the language tags
LINES_AT_MOST = 500_000  # lines that the vocabulary is learned from; a sample of them when there are more


def train_vocabulary(lines: Iterable[str], vocab_size: int, coverage: float, seed: int):
    """Returns an M2M100Tokenizer with ``vocab_size`` ids before its language tags, four of them special.

    SentencePiece unigram (Kudo 2018). Text is not normalised (identity): decoding gives the line back as it was,
    so that BLEU is measured on the user's text. One thread and a sample drawn from ``seed``: the same vocabulary
    every time.
    """
    import sentencepiece  # here, as below: only a new model needs these classes, which take seconds to load
    from transformers import M2M100Tokenizer

    lines = list(lines)
    if len(lines) > LINES_AT_MOST:
        chosen = np.sort(np.random.default_rng(seed).choice(len(lines), LINES_AT_MOST, replace=False))
        lines = [lines[i] for i in chosen]
    proto = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=proto,
            model_type="unigram",
            vocab_size=vocab_size - 1,  # SentencePiece has no <pad> of its own here
            character_coverage=coverage,
            normalization_rule_name="identity",
            num_threads=1,
            max_sentence_length=1 << 16,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(f"vocab_size {vocab_size}: {_vocabulary_problem(str(error))}") from None
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.getvalue())
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    vocabulary = [*SPECIALS, *(piece for piece in pieces if piece not in SPECIALS)]
    with tempfile.TemporaryDirectory() as folder:
        spm, vocab = Path(folder) / "sentencepiece.bpe.model", Path(folder) / "vocab.json"
        spm.write_bytes(proto.getvalue())
        vocab.write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}), encoding="utf-8")
        # The processor keeps the model in memory; `save_pretrained` writes it from there.
        return M2M100Tokenizer(str(vocab), str(spm), language_codes="m2m100", num_madeup_words=MADE_UP_WORDS)


def _vocabulary_problem(message: str) -> str:
    """Returns SentencePiece's message, or another one where it names a limit that leaves <pad> out."""
    limit = re.search(r"<= (\d+)", message)
    if limit:
        return f"expected at most {int(limit[1]) + 1} for this text"
    return f"no vocabulary of this size from this text: {message.rsplit('] ', 1)[-1].strip()}"


def make_model(config: TrainConfig, tokenizer) -> nn.Module:
    """Returns an untrained model for ``tokenizer``; its weights follow from torch's global generator."""
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    heads = config.heads or max(1, config.d_model // 64)
    if config.d_model % heads:
        raise InputError(f"heads {heads}: expected a divisor of d_model ({config.d_model})")
    if config.d_model % 2 or config.d_model < 4:
        raise InputError(f"d_model {config.d_model}: expected an even number, at least 4 (sinusoidal positions)")
    ffn = config.ffn or 4 * config.d_model
    dropout = 0.1 if config.dropout is None else config.dropout
    model = M2M100ForConditionalGeneration(
        M2M100Config(
            vocab_size=rows_of_m2m100(tokenizer) + MADE_UP_WORDS,
            d_model=config.d_model,
            encoder_layers=config.layers,
            decoder_layers=config.layers,
            encoder_ffn_dim=ffn,
            decoder_ffn_dim=ffn,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            dropout=dropout,
            attention_dropout=config.attention_dropout or 0.0,
            encoder_layerdrop=0.0,
            decoder_layerdrop=0.0,
            max_position_embeddings=1024,
            init_std=config.d_model**-0.5,  # embeddings are scaled by sqrt(d_model) on the way in
        )
    )
    _init_linears(model)
    return model


def _init_linears(model) -> None:
    """Initialises linear layers as Xavier: ``init_std`` is meant for the embeddings (as in fairseq)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


def load_vocabulary(folder: Path):
    """Returns the tokenizer that a run has saved in ``folder``."""
    from transformers import M2M100Tokenizer

    return M2M100Tokenizer.from_pretrained(folder)
