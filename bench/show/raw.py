"""Runs from pytest-benchmark's JSON, with every sample: what `petl-mt bench` writes, and does not commit."""

from __future__ import annotations

import json
import math
from pathlib import Path

from bench.show.measurements import Measurement, Run, Times
from petl_kernels.errors import InputError

# Entries of extra_info that a measurement has fields of its own for.
FIELDS = ("op", "shape", "case", "dtype", "tokens", "implementation", "flops", "bytes", "launches", "peak_bytes")
FIELDS += ("predicted_seconds", "wall_seconds", "wall_samples")


def load(path: str | Path) -> Run:
    """Returns the run in ``path``. InputError when the file is missing or is no result of a bench."""
    path = Path(path)
    try:
        # Results of earlier versions have "quantised" in their names.
        content = json.loads(path.read_text(encoding="utf-8").replace("quantis", "quantiz"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a JSON that petl-mt bench has written") from None
    except (ValueError, UnicodeDecodeError):
        raise InputError(f"{path}: no JSON; expected a file that petl-mt bench has written") from None
    try:
        return parse(content, path.stem)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise InputError(f"{path}: no result of petl-mt bench; expected pytest-benchmark's JSON") from None


def parse(content: dict, name: str) -> Run:
    """Returns a run from pytest-benchmark's JSON. Raises KeyError, TypeError or ValueError when it is none."""
    measurements = [measurement(entry) for entry in content["benchmarks"]]
    # Files from before these two keys have the processor in py-cpuinfo's words alone.
    cpu = content["machine_info"].get("cpu", {})
    machine = {"cpu_name": cpu.get("brand_raw", "CPU"), "cores": cpu.get("count"), **content["machine_info"]}
    return Run(name, machine, content["commit_info"], content["datetime"], measurements)


def measurement(entry: dict) -> Measurement:
    """Returns a measurement from an entry of pytest-benchmark's "benchmarks"."""
    info, stats = entry["extra_info"], entry["stats"]
    seconds = [float(stats[name]) for name in ("median", "q1", "q3", "min", "max")]
    if not (all(map(math.isfinite, seconds)) and seconds[0] > 0):
        raise ValueError(f"median {seconds[0]}: expected seconds")
    walls = info.get("wall_samples")
    return Measurement(
        op=info.get("op", "") or entry["name"],
        shape=info.get("shape") or "",
        case=info.get("case") or "",
        dtype=info.get("dtype") or _dtype_in(entry["group"] or ""),
        tokens=info.get("tokens"),
        group=entry["group"] or entry["name"],
        implementation=info.get("implementation") or entry["name"],
        times=Times(*seconds, samples=stats["rounds"]),
        flops=info.get("flops"),
        bytes=info.get("bytes"),
        launches=info.get("launches"),
        peak_bytes=info.get("peak_bytes"),
        predicted=info.get("predicted_seconds"),
        wall=info.get("wall_seconds"),
        walls=Times.of(walls) if walls else None,
        more={name: value for name, value in info.items() if name not in FIELDS},
    )


def _dtype_in(group: str) -> str:
    return next((name for name in ("bfloat16", "float16", "float32") if name in group), "")
