"""Predicted seconds of every op, shape and card, from the counts of bench/predict/counts.

    python -m bench.model                       every op × shape × card: predicted time, ratio to the limit
    python -m bench.model --markdown            the same into the tables of docs/PERFORMANCE.md
    python -m bench.model --compare medians.csv predictions beside what a device's last runs measured, by op

    t(launch) = max(flops / (rate · fraction), bytes / (bandwidth · fraction), instructions / issue rate) + launch time

and a prediction is the sum over an op's launches. Published rates; an H200's fractions are fitted to its first run
(bench/results/nvidia-h200), those of the other cards are assumptions. What that run measured stands in the document
beside the predictions; REPLACED lists which of its kernels are other ones now.
"""

from __future__ import annotations

import argparse
import math

from bench.predict.against import compare
from bench.predict.cards import DEVICES
from bench.predict.document import DOCUMENT, rows, write_document
from bench.show.medians import runs_in


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--markdown", action="store_true", help=f"write the tables of docs/{DOCUMENT.name}")
    parser.add_argument("--compare", metavar="RESULTS", help="a run's results beside the predictions")
    arguments = parser.parse_args()
    if arguments.compare:
        print(f"{'op':24s} {'runs':>4s} {'measured / predicted':>21s} {'spread':>7s}")
        for op, runs, ratio, spread in compare(runs_in(arguments.compare)):
            print(f"{op:24s} {runs:4d} {ratio:21.2f} {math.exp(spread):6.2f}x")
    elif arguments.markdown:
        write_document()
    else:
        print(f"{'op':22s}{'shape':34s}{'case':24s}" + "".join(f"{name:>20s}" for name in DEVICES))
        for op, name, case, *cells in rows():
            print(f"{op:22s}{name:34s}{case:24s}" + "".join(f"{cell:>20s}" for cell in cells))


if __name__ == "__main__":
    main()
