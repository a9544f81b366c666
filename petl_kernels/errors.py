"""``InputError``, and the checks of arguments that raise it."""

from __future__ import annotations


class InputError(ValueError):
    """Input that a user can mend: one line naming the thing, its value and what was expected.

    The command line prints the line and leaves with exit code 2.
    """


def shown(value: object) -> str:
    """Returns ``value`` as one line of a message has it: its repr, cut to 60 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_whole(name: str, value: object, least: int = 1, most: int = 2**31 - 1) -> None:
    """Raises InputError unless ``value`` is a whole number from ``least`` to ``most``."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InputError(f"{name} {shown(value)}: expected a whole number, {least} to {most:,}")


def check_flag(name: str, value: object) -> None:
    """Raises InputError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise InputError(f"{name} {shown(value)}: expected True or False")
