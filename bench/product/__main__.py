"""The program, end to end, as a user runs it under a budget of memory: whether it works, how fast, and what it took.

    python -m bench.product parent [--text SRC TGT --languages en-sw]    the demo's parent: train, killed by SIGKILL a
        few updates after a checkpoint, resumed, translate, score, merge
    python -m bench.product nllb-600m    that shape with random weights under 8 GiB and 4 GiB, on CUDA with graphs, too

bf16 on CUDA, fp32 on a CPU. Each run is `petl-mt`'s own main in a process of its own, forked from one that has imported
what is slow to import. Each is a line on the terminal, and in results/<device>/part/product-<what>.json as soon as it
has ended. The exit code is 1 where one of them did not do what it must. Without --text the text is the demo's; where
Babel is missing, which writes that, it is words of the parent's vocabulary in any order.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from petl_mt.demo.make_parent import parent_folder

from bench.gpu import device_name
from bench.product.budgets import made_in_a_process, under_budgets
from bench.product.program import Program
from bench.product.text import make_text
from bench.product.whole_way import whole_way
from bench.shapes import MODELS
from bench.where import RESULTS, commit


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("parent", "nllb-600m"))
    parser.add_argument("--text", nargs=2, metavar=("SRC", "TGT"))
    parser.add_argument("--languages", default="en-fi", metavar="SRC-TGT")
    parser.add_argument("--limit", type=float, default=60, metavar="SECONDS", help="of one run (default: 60)")
    arguments = parser.parse_args(argv)
    # not torch.cuda.get_device_name: this process must leave the card to the runs
    cuda = torch.cuda.device_count() > 0
    name = device_name() if cuda else "cpu"
    with tempfile.TemporaryDirectory(prefix="petl-product-") as folder:
        text = make_text(Path(folder), arguments.text, arguments.languages, 4000, 40)
        about = {"device": name, "commit": commit(), "torch": torch.__version__, "text": text.name}
        results = RESULTS / name / "part" / f"product-{arguments.what}.json"
        program = Program(Path(folder), results, about, arguments.limit)
        precision = ["--precision", "bf16" if cuda else "fp32"]  # many a CPU has no instructions for bf16
        if arguments.what == "parent":
            flags = ["--batch-tokens", "2048" if cuda else "512", "--max-length", "128", "--beam", "2", *precision]
            whole_way(program, parent_folder(), text, "1GiB", 40 if cuda else 16, flags)
        else:
            flags = ["--batch-tokens", "8192", "--max-length", "64", "--steps", "16", "--eval-every", "16", *precision]
            model = made_in_a_process(Path(folder) / "model", MODELS[arguments.what], "cuda" if cuda else "cpu")
            under_budgets(program, model, text, ("8GiB", "4GiB"), (False, True) if cuda else (False,), flags)
    return 1 if any(run.wrong for run in program.runs) else 0


if __name__ == "__main__":
    sys.exit(main())
