"""The shipped LoRA kernels and the candidates on the same shapes: `python -m bench.candidates.contest`.

Each shape: every value and gradient first, to the ops' own criterion, then medians of rounds in which each
implementation runs once, as a CUDA graph (so that Python's launches are not what is measured), with the L2 cache
flushed before each. The frozen linear is PyTorch's, forward and dx. Shapes come in the order of what they decide; after
--seconds no new one is begun. Without a CUDA device only correctness is checked, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
from bench.run.machine import described
from bench.show.measurements import Measurement, Run, Times
from bench.show.medians import add
from bench.where import ROOT, commit, results_of
from petl_kernels import parity
from petl_kernels.files import atomic_write
from petl_kernels.ops.cases import lora_linear

# Rank by rank the shape of LoRA's first target, then the other widths, numbers of linears and of tokens.
SHAPES = sorted(
    ((t, d, r, g) for t in (512, 2048, 8192) for d in (1024, 2048, 4096) for r in (8, 16, 64) for g in (1, 3)),
    key=lambda shape: (shape[0] != 8192, shape[2] != 16, shape[0] != 2048, shape[3], shape[1]),
)
NAMES = ("shipped", "bordered", "wgmma")
ROUNDS, WARM = 21, 3
FLUSH_BYTES = 256 << 20


def functions(name: str, given: dict) -> Any:
    """Returns the owner of a candidate's lora_linear and lora_linear_backward, None where the device cannot run it."""
    if name == "bordered":
        from bench.candidates.bordered import Bordered

        return Bordered(*(given[key] for key in ("x", "dys", "weights", "biases", "a", "b", "scales")))
    module = importlib.import_module(f"bench.candidates.{'frame' if name == 'shipped' else name}")
    if hasattr(module, "runs_on") and not module.runs_on(given["x"]):
        return None
    return module.shipped if name == "shipped" else module


def difference(name: str, given: dict, exact: dict | None = None, reference: dict | None = None) -> str | None:
    """Returns the first value or gradient that misses the criterion of ``parity.compare``, or None."""
    exact = exact or parity.run("lora_linear", "reference", parity.in_float64(given))
    reference = reference or parity.run("lora_linear", "reference", given)
    candidate = functions(name, given)
    values = lora_linear.run(lambda kernel: getattr(candidate, kernel), given)
    for key, value in exact.items():
        if error := parity.compare_tensors(key, values[key], reference[key], value):
            return error
    return None


def steps(name: str, given: dict) -> Callable[[], None]:
    """Returns a call of forward and backward, the biases frozen."""
    weights, biases, x, dys = given["weights"], given["biases"], given["x"], given["dys"]
    if name == "frozen":

        def frozen() -> None:
            for weight, bias in zip(weights, biases, strict=True):
                F.linear(x, weight, bias)
            dx = dys[0] @ weights[0]
            for dy, weight in zip(dys[1:], weights[1:], strict=True):
                dx.addmm_(dy, weight)

        return frozen
    pair = functions(name, given)
    rest = [given[key] for key in ("a", "b", "scales", "dropout", "seed")]

    def run() -> None:
        _, s = pair.lora_linear(x, weights, biases, *rest)
        pair.lora_linear_backward(dys, x, s, weights, *rest, True, [False] * len(weights))

    return run


def graph_of(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def medians(runs: dict[str, Callable[[], None]], flush: Callable[[], object]) -> dict[str, list[float]]:
    """Returns the seconds of each run in ROUNDS rounds."""
    events = {name: [] for name in runs}
    for round_ in range(WARM + ROUNDS):
        for name, run in runs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush()
            start.record()
            run()
            stop.record()
            if round_ >= WARM:
                events[name].append((start, stop))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(stop) / 1e3 for start, stop in pairs] for name, pairs in events.items()}


class OnDevice(parity.Source):
    """Draws values where they are used: a CPU would take longer over the larger shapes than the kernels."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        super().__init__(device, dtype)
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.device) * std
        return values.to(dtype or self.dtype)


def arguments(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> dict:
    tokens, d, rank, groups = shape
    draw = OnDevice(torch.device(device), dtype)
    given = parity.lora_linear_arguments(
        draw, (tokens,), (d,) * groups, d, (rank,) * groups, adapter_dtype=torch.float32
    )
    return given | {"scales": [2.0] * groups}


def measure(shape: tuple[int, ...], names: list[str], flush: Callable[[], object]) -> list[dict]:
    given = arguments(shape, "cuda", torch.bfloat16)
    exact = parity.run("lora_linear", "reference", parity.in_float64(given))
    reference = parity.run("lora_linear", "reference", given)
    graphs, rows = {"frozen": graph_of(steps("frozen", given))}, {"frozen": {}}
    for name in names:
        rows[name] = {}
        try:
            if functions(name, given) is None:
                rows[name]["note"] = "not on this device"
            elif error := difference(name, given, exact, reference):
                rows[name]["note"] = f"WRONG: {error}"
            else:
                graphs[name] = graph_of(steps(name, given))
        except Exception as problem:  # one that does not run must not hide the others
            rows[name]["note"] = f"{type(problem).__name__}: {str(problem).strip().splitlines()[:1]}"
    times = medians({name: graph.replay for name, graph in graphs.items()}, flush)
    for name, row in rows.items():
        row |= {"shape": shape, "implementation": name}
        if name in times:
            row |= {"median": statistics.median(times[name]), "samples": times[name]}
    return list(rows.values())


def show(rows: list[dict]) -> None:
    frozen = rows[0]
    tokens, d, rank, groups = frozen["shape"]
    print(f"\n{tokens} tokens, d = {d}, r = {rank}, {groups} linear(s): µs, over the frozen linear")
    for row in sorted(rows, key=lambda row: row.get("median", float("inf"))):
        if "median" in row:
            ratio = row["median"] / frozen["median"]
            print(f"  {row['implementation']:12s} {row['median'] * 1e6:9.1f} {ratio:6.2f}")
        else:
            print(f"  {row['implementation']:12s} {row['note']}")
    sys.stdout.flush()


def run_of(rows: list[dict], machine: dict, date: str) -> Run:
    """Returns what was timed, for the table of the device."""
    found = []
    for row in (row for row in rows if "median" in row):
        tokens, d, rank, groups = row["shape"]
        op, size, case = "lora contest", f"d={d}", f"r={rank}, {groups} linear{'s' * (groups > 1)}"
        group = f"{op} {size} {case} {tokens} tokens bfloat16"
        times = Times.of(row["samples"])
        found.append(Measurement(op, size, case, "bfloat16", tokens, group, row["implementation"], times))
    return Run("candidates", machine, {"id": commit()}, date, found)


def on_a_cpu(names: list[str]) -> int:
    print("The kernels' times need a GPU; here only their values are checked, in Triton's interpreter.")
    failed = 0
    for shape in ((33, 40, 8, 1), (70, 40, 16, 3)):
        given = arguments(shape, "cpu", torch.float16)
        for name in names:
            runs = functions(name, given) is not None
            error = difference(name, given) if runs else None
            failed += error is not None
            print(f"  {shape} {name:12s} {error or ('pass' if runs else 'not on this device')}")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=480, help="begin no new shape after so long")
    parser.add_argument("--names", nargs="*", default=list(NAMES), choices=NAMES)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.device == "cpu":
        return on_a_cpu(options.names)
    if not torch.cuda.is_available():
        print("bench.candidates.contest: --device cuda: no CUDA device here", file=sys.stderr)
        return 2
    scratch = torch.empty(FLUSH_BYTES, device="cuda", dtype=torch.uint8)
    began, results = time.monotonic(), []
    machine, date = described("cuda"), datetime.now(timezone.utc).isoformat()
    print(machine["device"])
    path = results_of("cuda") / "raw" / "candidates.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for shape in SHAPES:
        if time.monotonic() - began > options.seconds:
            print(f"\n{len(SHAPES) - len({tuple(row['shape']) for row in results})} shapes left out after --seconds")
            break
        rows = measure(shape, options.names, scratch.zero_)
        show(rows)
        results += rows
        with atomic_write(path) as file:  # after each shape: the run may be cut at any time
            json.dump({"machine": machine, "unit": "seconds", "results": results}, file, indent=1)
        add(path.parents[1], run_of(results, machine, date))
    print(f"\n{path.relative_to(ROOT)}")
    return 1 if any(row.get("note", "").startswith("WRONG") for row in results) else 0


if __name__ == "__main__":
    sys.exit(main())
