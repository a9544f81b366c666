"""``petl-mt quantize``: a checkpoint rounded once and kept, so that no later run rounds it again."""

from __future__ import annotations

import argparse

from ..checks import check_folder, check_space
from ..terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Writes a folder for the --model of train and plan; transformers does not load it."
    checkpoint = parser.add_argument_group("checkpoint")
    checkpoint.add_argument("model", metavar="MODEL", help="folder or hub id (default: none, it has to be given)")
    checkpoint.add_argument("out", metavar="OUT", help="folder to write, new or empty (default: none, as MODEL)")
    told = "8 or 4 bits for a value of the matrices (default: int8)"
    checkpoint.add_argument("--storage", choices=("int8", "nf4"), default="int8", help=told)
    told = "storage of token embeddings and the output projection (default: as --storage)"
    checkpoint.add_argument("--tables", choices=("dense", "int8", "nf4"), help=told)


def run_command(arguments: argparse.Namespace) -> None:
    # here, since they load PyTorch and transformers, which --help does without
    from petl_kernels.interop.plain import check_free
    from petl_kernels.interop.quantize_checkpoint import quantize_checkpoint

    from ..silence import hush

    check_free(arguments.out)  # before anything is read
    check_folder("out", arguments.out)
    with hush():
        quantize_checkpoint(
            arguments.model,
            arguments.out,
            arguments.storage,
            arguments.tables,
            lambda size: check_space("out", arguments.out, size, "the quantized checkpoint"),
        )
    say(f"written: {arguments.out}")
