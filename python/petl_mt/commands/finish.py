"""``petl-mt finish``: ends a stopped run where it stands."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("run")
    run.add_argument("run_folder", metavar="RUN", help="the --out of a training run")


def run_command(arguments: argparse.Namespace) -> None:
    from ..train import finish  # here: it loads transformers, which --help does without

    finish(arguments.run_folder)
