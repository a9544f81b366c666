"""The parser of ``petl-mt``: one line for a wrong flag, and a flag is given once."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Ends with one line for a wrong flag, where argparse would put all the flags before it.

    A flag is given once, unless it adds to a list; argparse would take the last one without a word.
    """

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.given: set[str] = set()
        self.register("action", None, _Store)
        self.register("action", "store", _Store)
        self.register("action", "store_true", _StoreTrue)
        self.register("action", "boolean", _Boolean)

    def parse_known_args(self, args=None, namespace=None):
        self.given = set()
        return super().parse_known_args(args, namespace)

    def once(self, action: argparse.Action, flag: str | None) -> None:
        """Ends with a line where the option of ``action`` was there before; flag: None for an argument without one."""
        if flag is None:
            return
        if action.dest in self.given:
            self.error(f"argument {action.option_strings[-1]}: given twice; expected it once")
        self.given.add(action.dest)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class _Store(argparse._StoreAction):
    def __call__(self, parser: Parser, namespace, values, option_string=None) -> None:
        parser.once(self, option_string)
        super().__call__(parser, namespace, values, option_string)


class _Boolean(argparse.BooleanOptionalAction):
    def __call__(self, parser: Parser, namespace, values, option_string=None) -> None:
        if self.dest in parser.given:
            parser.error(f"arguments {' and '.join(self.option_strings)}: given twice; expected one of them, once")
        parser.once(self, option_string)
        super().__call__(parser, namespace, values, option_string)


class _StoreTrue(argparse._StoreTrueAction):
    def __call__(self, parser: Parser, namespace, values, option_string=None) -> None:
        parser.once(self, option_string)
        super().__call__(parser, namespace, values, option_string)


def tie_negative_values(argv: list[str]) -> list[str]:
    """Returns ``argv`` with ``--params -3%`` as ``--params=-3%``: argparse would take the value for a flag."""
    tied: list[str] = []
    for word in argv:
        if re.match(r"-\d", word) and tied and re.fullmatch(r"--[a-z-]+", tied[-1]):
            tied[-1] += f"={word}"
        else:
            tied.append(word)
    return tied
