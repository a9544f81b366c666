"""What the options of ``petl-mt`` are called, take and mean, for all commands that have them.

An option of ``TrainConfig`` that is not given is None, so that a value from a file stays; its default is in its help.
"""

from __future__ import annotations

import argparse
from typing import Any

COUNT = {"type": int, "metavar": "N"}
NUMBER = {"type": float, "metavar": "X"}
FILES = {"nargs": 2, "metavar": ("SRC", "TGT")}
PAIR = {"nargs": 3, "action": "append", "metavar": ("SRC-TGT", "SRC", "TGT")}
APPROXIMATIONS = "quantized (frozen weights in 8 or 4 bits), 8bit-optimizer, bf16-gradients"


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


# name -> (argparse's settings, help, its default in words where TrainConfig has none as a value)
TRAINING: dict[str, tuple[dict[str, Any], str, str]] = {
    "--model": ({"metavar": "DIR|ID|new"}, "checkpoint folder, hub id, or new: train from scratch", ""),
    "--out": ({"metavar": "DIR"}, "folder for the run, made if it is not there", ""),
    "--train": (FILES, "two text files to train on, a sentence a line, aligned; gzip too", ""),
    "--valid": (FILES, "two text files that choose the best checkpoint and are scored", "none"),
    "--max-length": (COUNT, "longest sentence, in tokens; longer pairs are left out, and counted", ""),
    "--bleu-tokenize": ({"metavar": "NAME"}, "sacreBLEU's tokenizer", "by target language; 13a for most"),
    "--vocab-size": (COUNT, "pieces of the vocabulary that is learnt from the text", ""),
    "--vocab-text": ({"nargs": "+", "metavar": "FILE"}, "more text, for the vocabulary only", "none"),
    "--character-coverage": ({**NUMBER, "metavar": "SHARE"}, "share of the text's characters in the vocabulary", ""),
    "--d-model": (COUNT, "width: values a token", ""),
    "--layers": (COUNT, "encoder layers, and as many decoder layers", ""),
    "--ffn": (COUNT, "hidden units of a feed-forward block", "4 times --d-model"),
    "--heads": (COUNT, "attention heads", "--d-model / 64"),
    "--method": (
        {"metavar": "NAME"},
        "what is trained: {methods}; see petl-mt methods",
        "adapter; full for a new model",
    ),
    "--params": (
        {"metavar": "BUDGET"},
        "size of the method in trained parameters: 10%% of the model's, or 2M",
        "the method's own size",
    ),
    "--steps": (COUNT, "updates of the parameters", ""),
    "--batch-tokens": (COUNT, "tokens of a batch, padding included, on its longer side", ""),
    "--accumulate": (COUNT, "batches to one update", ""),
    "--lr": (NUMBER, "highest learning rate", "by method and width"),
    "--schedule": (
        {"metavar": "NAME"},
        "how the rate falls: inverse-sqrt, linear or polynomial",
        "linear; inverse-sqrt for a new model",
    ),
    "--warmup": (COUNT, "updates during which the rate rises", "a tenth of --steps, 4000 at most"),
    "--label-smoothing": (NUMBER, "share of the target that is spread over all words", ""),
    "--dropout": (NUMBER, "share of values that are dropped", "the model's own; 0.1 for a new one"),
    "--attention-dropout": (NUMBER, "share of attention weights that are dropped", "the model's own"),
    "--clip": (NUMBER, "largest norm of the gradient; 0: no clipping", ""),
    "--weight-decay": (NUMBER, "AdamW's decay of matrices, a unit of learning rate", ""),
    "--betas": ({"nargs": 2, "type": float, "metavar": ("B1", "B2")}, "AdamW's decay of its two moments", ""),
    "--optimizer": ({"metavar": "adamw|adamw8bit"}, "adamw8bit keeps 2 bytes a parameter in the place of 8", ""),
    "--seed": (COUNT, "seed of order, dropout and what starts at random", ""),
    "--eval-every": (COUNT, "updates between two evaluations, which also save", "a tenth of --steps"),
    "--patience": (COUNT, "evaluations without a better validation loss that end the run", "no end before --steps"),
    "--beam": (COUNT, "beams of the search", ""),
    "--precision": ({"metavar": "fp32|bf16"}, "dtype of matrix products and frozen matrices", ""),
    "--memory": (
        {"metavar": "SIZE"},
        "bytes that all of it may take, such as 8GiB; docs/TROUBLESHOOTING.md says what counts",
        "no limit",
    ),
    "--allow": ({"metavar": "NAMES", "type": names}, f"what a plan may round: {APPROXIMATIONS}", "nothing"),
    "--plan": ({"metavar": "FILE"}, "a plan of petl-mt plan --json", "one is made now"),
    "--tier": (
        COUNT,
        "how little layers keep for the backward pass: 1 to 5, 0 for the model's own layers",
        "1, or the choice of the plan",
    ),
    "--cuda-graphs": (
        {"action": "boolean"},
        "capture steps once for each shape of their rows, and replay them",
        "on a CUDA device, where that can be",
    ),
    "--tensorboard": ({"action": "store_true"}, "write metrics for TensorBoard, too", "off"),
}


class TrainingOptions:
    """Adds options of ``TRAINING`` to a group, by name."""

    def __init__(self) -> None:
        from petl_kernels.methods import METHODS

        from .config import TrainConfig

        self._defaults, self._methods = vars(TrainConfig()), ", ".join(METHODS)

    def __call__(self, group, *options: str, **defaults: str) -> None:
        """defaults: other ones in words, by the option's name with underscores."""
        for option in options:
            settings, text, default = TRAINING[option]
            name = option[2:].replace("-", "_")
            shown = defaults.get(name, default or _shown(self._defaults[name]))
            told = text.replace("{methods}", self._methods) + (f" (default: {shown})" if shown else "")
            group.add_argument(option, default=None, help=told, **settings)


def _shown(value: Any) -> str:
    if value in (None, "", []):
        return ""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def languages(group: argparse._ArgumentGroup, default: str = "") -> None:
    """``--src-lang`` and ``--tgt-lang``."""
    for option, what in (("--src-lang", "source"), ("--tgt-lang", "target")):
        told = f" (default: {default})" if default else ""
        group.add_argument(option, metavar="CODE", help=f"language of the {what}, such as en, sw or swh_Latn{told}")
