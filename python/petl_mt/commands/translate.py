"""``petl-mt translate``: one line out for each line in, in order, as they come."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack

from ..terminal import Watch, on_terminal, say
from .options import add_run, search_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Lines come out while others still come in: the first after 16, later ones in windows of up to "
        "--batch-tokens / 32 lines (128 at least), and at once where the input pauses for a tenth of a second."
    )
    text = add_run(parser)
    text.add_argument("--in", dest="source", metavar="FILE", help="UTF-8 text to read (default: standard input)")
    told = "file to write; FILE.part until the last line is there (default: standard output)"
    text.add_argument("--out", dest="target", metavar="FILE", help=told)


def run_command(arguments: argparse.Namespace) -> None:
    from ..inference import Translator  # here, as what follows: they load PyTorch, which --help does without
    from .input_lines import LineWindows, check_other
    from .output_lines import OutputLines

    check_other(arguments.source, arguments.target)
    lines = LineWindows(arguments.source)
    with OutputLines("--out", arguments.target, lines.size) as output, ExitStack() as limits:
        translator = Translator(arguments.run_folder, **search_options(arguments), limits=limits)
        # on a terminal that shows the lines themselves, a bar would stand between them
        shown = arguments.target is None and on_terminal() and sys.stdout.isatty()
        with Watch("translate", lines.total, "lines", quiet=shown) as watch:
            for window in lines.windows(translator.window):
                before = output.lines
                output.write(list(translator.stream(window, told=lambda done, before=before: watch.at(before + done))))
                watch.at(output.lines)
    report_cut(translator)


def report_cut(translator) -> None:
    """Prints a line on standard error where sources were too long."""
    if translator.cut:
        say(f"{translator.cut} sources were longer than {translator.max_length} tokens and were cut")
