"""``petl-mt plan``: the way in which training fits into a budget of memory, and its speed."""

from __future__ import annotations

import argparse
import json
import sys

from ..checks import check_file
from .training_options import add_training_options, train_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Takes the options of train. --model may be a config's JSON file alone; no text is needed."
    add_training_options(parser)
    plan = parser.add_argument_group("plan")
    plan.add_argument("--device", metavar="cpu|cuda", help="plan for this one (default: what is here)")
    told = "write the plan there, for train --plan; - for standard output (default: the table alone)"
    plan.add_argument("--json", metavar="FILE", help=told)


def run_command(arguments: argparse.Namespace) -> None:
    from ..train.budget import plan_without_text  # here: it loads transformers, which --help does without

    if arguments.json and arguments.json != "-":
        check_file("json", arguments.json, [path for path in (arguments.model, arguments.config) if path])
    plan = plan_without_text(train_config(arguments), arguments.device)
    if arguments.json == "-":
        json.dump(plan.to_dict(), sys.stdout, indent=1)
        print()
        return
    print(plan)
    if arguments.json:
        plan.save(arguments.json)
        print(f"written: {arguments.json}")
