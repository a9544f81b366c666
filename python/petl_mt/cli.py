"""The program ``petl-mt``: finds the command, runs it, and turns what goes wrong into one line and an exit code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

try:
    from petl_kernels import __version__
    from petl_kernels.errors import InputError
except ImportError as error:  # PyTorch or numpy is missing, or too old
    print(f"petl-mt: {error}", file=sys.stderr)
    raise SystemExit(2) from None

from .commands.parser import Parser, tie_negative_values
from .commands.standard_streams import drop_unread, hold_closed_descriptors
from .terminal import say

# command -> (module, its line in the overview). The module is imported for its own command alone, so that the others
# start quickly: ``add_arguments`` fills in a parser, and ``run`` takes what that has parsed.
COMMANDS = {
    "train": ("petl_mt.commands.train", "adapt a model, or train a new one"),
    "finish": ("petl_mt.commands.finish", "end a stopped run where it stands: scores, and the adapter or model"),
    "plan": ("petl_mt.commands.plan", "how training would fit into --memory, and how fast; reads no weights"),
    "fits": ("petl_mt.fits.command", "which models fit which cards, how, and how fast; downloads nothing"),
    "translate": ("petl_mt.commands.translate", "one line out for each line in, in order, as they come"),
    "score": ("petl_mt.commands.score", "BLEU and chrF on a test text, each with its signature"),
    "merge": ("petl_mt.commands.merge", "a folder that transformers loads, the adapter inside the weights"),
    "quantize": ("petl_mt.commands.quantize", "a checkpoint in 8 or 4 bits, kept: a folder for --model"),
    "demo": ("petl_mt.demo.demo", "the main job on text the package makes itself, no download"),
    "bench": ("petl_mt.bench", "benchmarks, their report, and what changed between two runs"),
    "study": ("petl_mt.study.command", "several methods and budgets on one pair: a table and a plot"),
    "methods": ("petl_mt.methods", "each method: what it trains, its settings with defaults and types"),
    "doctor": ("petl_mt.doctor", "versions, device, which backend serves each op, and does it agree"),
}
# Their result goes to standard output.
PRINTING = ("score", "plan", "fits", "study", "demo", "methods", "bench", "doctor")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 2 for wrong input or a full disk, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in argv if not word.startswith("-")), "")
    hold_closed_descriptors()
    try:
        try:
            if sys.stdout is None and command in PRINTING:
                raise InputError("standard output: is closed; expected it open, since the result goes there")
            arguments = parser_for(command).parse_args(tie_negative_values(argv))
            return importlib.import_module(COMMANDS[arguments.command][0]).run_command(arguments) or 0
        finally:  # what --help has printed, too: a reader that has gone is met here, and not when Python ends
            if sys.stdout is not None:
                sys.stdout.flush()
    except InputError as error:
        message = str(error)
    except BrokenPipeError:
        drop_unread()
        return 141
    except OSError as error:
        name = error.filename or ("''" if error.filename == "" else "")
        message = f"{name}: {error.strerror}" if name else str(error.strerror or error)
        drop_unread()
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        if type(error).__name__ == "AcceleratorError":
            message = f"the device failed ({str(error).splitlines()[0]}); a run goes on with --resume"
        elif type(error).__name__ == "OutOfMemoryError":
            message = "out of memory; expected a smaller --batch-tokens, or a --memory budget"
        else:
            raise
    say(f"petl-mt {command}: {' '.join(message.split())}")
    return 2


def parser_for(command: str) -> Parser:
    """Returns the parser of the program, with the arguments of ``command`` and the names of the other commands."""
    parser = Parser(prog="petl-mt", description="Fine-tune translation models within a budget.")
    parser.add_argument("--version", action="version", version=f"petl-mt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        subparser = commands.add_parser(name, help=text)
        if name == command:
            importlib.import_module(module).add_arguments(subparser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
