"""Training under caps of memory: what our plan makes of each, beside PEFT with its fastest setting that fits.

    python -m bench.step.bench_caps [--all] [--device cuda]      every trial, a table, results/<device>/caps.json
    pytest bench/step/bench_caps.py ...                          the same in the bench, within SECONDS

Both sides do the same updates on the same batches (``trial``). PEFT's settings are searched (``peft_settings``): in
short form within the bench, the whole grid with --all. On a CPU the model has a quarter of nllb-600m's layers and words
in its full widths, caps are small enough for that, and updates have 256 tokens a side.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

import pytest
import torch

from bench.run.clock import write_down
from bench.run.measure import describe
from bench.run.work import Case
from bench.step.study import CELLS, DATA, OURS, PEFT, QUANTIZED, Side, Study, beside_peft, work
from bench.where import results_of
from petl_kernels.units import format_size

SECONDS = {"cpu": 230, "cuda": 80}  # of all cells together within the bench; on CUDA a part of `make gpu-more`
LIMIT = 60  # of one trial within the bench
LIMIT_OF_ALL = 600
CAPS_FILE = "caps.json"


@pytest.fixture(scope="module")
def study(request):
    device = request.config.getoption("--device")
    whole = results_of(device) / CAPS_FILE  # some cells of the grid, maybe: they replace nothing
    results = whole.parent / "part" / whole.name if request.config.getoption("--peers") else None
    with tempfile.TemporaryDirectory() as folder:
        yield Study(device, Path(folder), time.monotonic() + SECONDS[device], LIMIT, every=False, results=results)


def pytest_generate_tests(metafunc) -> None:
    device = metafunc.config.getoption("--device")
    peer = pytest.mark.peer
    cases = [
        pytest.param(shape, cap, name, marks=peer if name == PEFT else (), id=f"{shape.partition(',')[0]}-{cap}-{name}")
        for shape, cap in CELLS[device]
        for name in (OURS, QUANTIZED, PEFT)
    ]
    metafunc.parametrize(("shape", "cap", "implementation"), cases)


def test_cap(benchmark, request, study, shape, cap, implementation):
    study.cell(shape, cap, peers=request.config.getoption("--peers"))
    side = study.side(shape, cap, implementation)
    if side.result.failure:
        pytest.skip(f"{implementation}: {side.result.failure}")
    case = Case("step-cap", shape, DATA[study.device].batch_tokens, "bfloat16", study.device, cap)
    describe(benchmark, case, implementation, work(study.device, shape, side.result), side.result.least)
    benchmark.extra_info.update(setting=side.setting, **side.rates(), **beside_peft(study, shape, cap, side))
    write_down(benchmark, side.result.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="every setting of PEFT, no limit on the whole")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    until = math.inf if arguments.all else time.monotonic() + SECONDS[arguments.device]
    limit = LIMIT_OF_ALL if arguments.all else LIMIT
    with tempfile.TemporaryDirectory() as folder:
        study = Study(
            arguments.device, Path(folder), until, limit, arguments.all, results_of(arguments.device) / CAPS_FILE
        )
        for shape, cap in CELLS[arguments.device]:
            print(f"{shape}, {cap}, {DATA[arguments.device].batch_tokens} tokens a side", flush=True)
            for name, side in zip((OURS, QUANTIZED, PEFT), study.cell(shape, cap), strict=True):
                print(f"  {name:16s} {table_row(study, shape, cap, side)}", flush=True)


def table_row(study: Study, shape: str, cap: str, side: Side) -> str:
    if side.result.failure:
        return side.result.failure
    rates, ratio = side.rates(), beside_peft(study, shape, cap, side).get("ratio")
    beside = f"{ratio:6.2f} x" if ratio else " " * 8
    return (
        f"{rates['target_tokens_per_second']:9.1f} target, {rates['tokens_per_second']:9.1f} all tokens/s {beside} "
        f"{format_size(side.result.least):>9s}  {side.setting}"
    )


if __name__ == "__main__":
    main()
