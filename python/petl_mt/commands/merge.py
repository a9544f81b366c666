"""``petl-mt merge``: a folder that transformers loads, with the adapter inside the weights."""

from __future__ import annotations

import argparse

from ..checks import check_folder, check_space
from ..terminal import say
from .options import add_run_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("run")
    add_run_folder(run)
    run.add_argument("--out", required=True, metavar="DIR", help="folder to write, new or empty")
    run.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="type of the weights that are written (default: that of the checkpoint which the run began with)",
    )
    run.add_argument(
        "--into",
        type=lambda name: "quantized" if name == "quantised" else name,  # the older spelling
        choices=("original", "quantized"),
        default="original",
        help="weights of a run that trained beside rounded ones: the checkpoint's, or rounded (default: original)",
    )


def run_command(arguments: argparse.Namespace) -> None:
    import petl_kernels as pk  # here, as what follows: they load PyTorch, which --help does without
    from petl_kernels.interop.plain import check_free

    from ..inference import check_original, load_run, merged_dtype, quantize_as_trained, run_storages
    from ..silence import hush

    check_free(arguments.out)  # before anything is read
    check_folder("out", arguments.out)
    lines: list[str] = []
    with hush():
        model, tokenizer, config = load_run(arguments.run_folder)
        check_space("out", arguments.out, sum(p.nbytes for p in model.parameters()), "the merged model")
        storages = run_storages(arguments.run_folder)
        rounded = " and ".join(kind for kind in dict.fromkeys(storages) if kind != "dense")
        if arguments.into == "quantized":
            quantize_as_trained(model, config, storages)
            pk.merge(model)
            error = pk.report(model).merge_error or 0.0
            lines.append(f"merged into {rounded} weights with a relative error of at most {error:.3%}")
        else:
            check_original(config)
        if rounded and arguments.into == "original":
            lines.append(f"the adapter was trained beside {rounded} weights; merged into the original ones")
        dtype = merged_dtype(arguments.run_folder, arguments.dtype)
        pk.save_merged(model, tokenizer, arguments.out, dtype, lines.append)
    for line in [*lines, f"written: {arguments.out}"]:
        say(line)
