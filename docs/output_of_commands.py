"""Puts the output of ``petl-mt`` into pages while mkdocs builds them, so that it cannot be out of date.

A line ``<!-- petl-mt train --help -->`` becomes what that command prints, as a block of text, and the line
``<!-- other methods -->`` the classes of all methods that the page has no line for.
"""

from __future__ import annotations

import contextlib
import io
import re

LINE = re.compile(r"^<!-- petl-mt (.+) -->$", re.M)
OTHER_METHODS = "<!-- other methods -->"


def on_page_markdown(markdown: str, **_) -> str:
    """mkdocs calls this with the text of each page; returns it with the output of its commands."""
    if OTHER_METHODS in markdown:
        markdown = markdown.replace(OTHER_METHODS, other_methods(markdown))
    return LINE.sub(lambda found: f"```text\n{output(found[1].split())}```", markdown)


def other_methods(page: str) -> str:
    """Returns a line of mkdocstrings for each method's class that ``page`` does not have."""
    from petl_kernels.methods import CONFIGS

    return "\n".join(f"::: petl_kernels.{name}" for name in CONFIGS if f"petl_kernels.{name}\n" not in page)


def output(arguments: list[str]) -> str:
    """Returns what ``petl-mt`` prints for these arguments."""
    from petl_mt.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):  # --help ends the program
        main(arguments)
    return printed.getvalue()
