"""Puts the output of ``petl-mt`` into pages while mkdocs builds them, so that it cannot be out of date.

A line ``<!-- petl-mt train --help -->`` becomes what that command prints, as a block of text.
"""

from __future__ import annotations

import contextlib
import io
import re

LINE = re.compile(r"^<!-- petl-mt (.+) -->$", re.M)


def on_page_markdown(markdown: str, **_) -> str:
    """mkdocs calls this with the text of each page; returns it with the output of its commands."""
    return LINE.sub(lambda found: f"```text\n{output(found[1].split())}```", markdown)


def output(arguments: list[str]) -> str:
    """Returns what ``petl-mt`` prints for these arguments."""
    from petl_mt.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):  # --help ends the program
        main(arguments)
    return printed.getvalue()
