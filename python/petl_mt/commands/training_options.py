"""The options of a training run, which ``train`` and ``plan`` have, and the configuration that they give."""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from petl_kernels.errors import InputError

from ..config import TrainConfig
from ..config_file import each_once, load_yaml, parse_yaml
from ..runs import RunFolder
from .options import PAIR, add_fields, add_languages

NO_FIELDS = ("command", "config", "resume", "pair", "valid_pair", "method_arg", "device", "json")


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each field of ``TrainConfig``, in groups, and what stands beside them."""
    run = parser.add_argument_group("run")
    run.add_argument("--config", metavar="FILE.yaml", help="options from a file; flags go on top (default: none)")
    add_fields(run, "model", "out")
    run.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out (default: off)")

    text = parser.add_argument_group("text")
    add_fields(text, "train", "valid")
    add_languages(text)
    for flag, what in (("--pair", "--train"), ("--valid-pair", "--valid")):
        told = f"{what} of one of several pairs: languages such as en-de, two files; again for each (default: none)"
        text.add_argument(flag, help=told, **PAIR)
    add_fields(text, "max_length", "bleu_tokenize")

    new = parser.add_argument_group("a model from scratch (--model new)")
    add_fields(new, "vocab_size", "vocab_text", "character_coverage", "d_model", "layers", "ffn", "heads")

    method = parser.add_argument_group("method")
    add_fields(method, "method", "params")
    told = "a setting of the method such as rank=16, again for each; petl-mt methods has them (default: none)"
    method.add_argument("--method-arg", action="append", metavar="KEY=VALUE", help=told)

    training = parser.add_argument_group("training")
    add_fields(training, "steps", "batch_tokens", "accumulate", "lr", "schedule", "warmup", "label_smoothing")
    add_fields(training, "dropout", "attention_dropout", "clip", "optimizer", "betas", "weight_decay", "seed")
    add_fields(training, "eval_every", "patience", "beam", "tensorboard")

    memory = parser.add_argument_group("memory and speed")
    add_fields(memory, "memory", "host_memory", "allow", "plan", "tier", "precision", "cuda_graphs")


def train_config(arguments: argparse.Namespace) -> TrainConfig:
    """Returns the configuration of --config, or of the run that is resumed, with the flags on top of either."""
    values, where = {}, "flags"
    if arguments.config:
        values, where = load_yaml(arguments.config), arguments.config
    elif arguments.resume and arguments.out and RunFolder(Path(arguments.out)).config.exists():
        path = RunFolder(Path(arguments.out)).config
        values, where = load_yaml(path), str(path)
    elif arguments.resume and arguments.out and not arguments.model:
        raise InputError(f"out {arguments.out}: no run to resume; expected a run's folder, or --model for a new one")
    values = {key.replace("-", "_") if isinstance(key, str) else key: value for key, value in values.items()}
    values.update({k: v for k, v in vars(arguments).items() if k not in NO_FIELDS and v is not None})
    if arguments.pair and arguments.train:
        raise InputError("--train and --pair: expected one of the two")
    for name, pairs in (("train", arguments.pair), ("valid", arguments.valid_pair)):
        if pairs:
            values[name] = [_pair(*pair) for pair in pairs]
    if arguments.method_arg:
        values["method_args"] = each_once("method-arg", map(_setting, arguments.method_arg))
    return TrainConfig.from_dict(values, where)


def _pair(languages: str, source: str, target: str) -> dict[str, str]:
    codes = languages.split("-")
    if len(codes) != 2 or not all(codes):
        raise InputError(f"pair {languages!r}: expected two language codes such as en-de")
    return {"src_lang": codes[0], "tgt_lang": codes[1], "source": source, "target": target}


def _setting(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"method-arg {text!r}: expected KEY=VALUE")
    try:
        return key.replace("-", "_"), parse_yaml(value)
    except yaml.YAMLError:
        raise InputError(f"method-arg {text!r}: expected KEY=VALUE, with a number, a word or a YAML list") from None
