"""``petl-mt train``: adapts a model, or trains a new one."""

from __future__ import annotations

import argparse

from .training_options import add_training_options, train_config

EXAMPLES = """examples:
  petl-mt train --model facebook/nllb-200-distilled-600M --train a.en a.sw \\
      --valid dev.en dev.sw --src-lang en --tgt-lang sw \\
      --method adapter --params 10% --out runs/en-sw
  petl-mt train --model new --pair en-de a.en a.de --pair de-en a.de a.en \\
      --valid-pair en-de dev.en dev.de --vocab-size 4000 --d-model 256 \\
      --layers 3 --steps 5000 --out runs/parent
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog, parser.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    add_training_options(parser)


def run_command(arguments: argparse.Namespace) -> None:
    config = train_config(arguments)
    from ..train import train  # here: it loads transformers, which --help and wrong flags do without

    train(config, resume=arguments.resume)
