"""Result files of the bench (pytest-benchmark's JSON) as plain records, and the figures that follow from them."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from petl_kernels.errors import InputError

VERSIONS = (
    "python_version",
    "torch",
    "cuda",
    "triton",
    "transformers",
    "peft",
    "bitsandbytes",
    "liger-kernel",
    "cut-cross-entropy",
)
LIMIT = "limit"
# What files from before `implementation` said "ours" called our own implementations.
OUR_OLD_NAMES = ("int8", "nf4", "tier 1", "tier 2", "tier 3")


@dataclass(frozen=True)
class Measurement:
    """One implementation of one case of an op. Seconds, bytes and operations are those of one call.

    ``shape``, ``case``, ``dtype`` and ``tokens`` are empty (None) where an old file lacks them; ``group`` is always
    there. ``bytes`` (read and written) and ``flops`` are those that no implementation can avoid, ``launches`` kernels,
    ``peak_bytes`` the most memory taken beside the inputs, ``predicted`` the performance model's seconds; all may be
    None. Where the median is the device's time alone, ``wall`` is the median with the host's part, which is what a
    caller waits for, and ``walls`` its samples (empty in files from before they were kept); elsewhere it is None.
    ``of_peers``: where steps were taken in turn, the median over the rounds of its time over each peer's of that round.
    """

    op: str
    shape: str
    case: str
    dtype: str
    tokens: int | None
    group: str
    implementation: str
    median: float
    q1: float
    q3: float
    least: float
    most: float
    samples: int
    flops: int | None
    bytes: int | None
    launches: int | None
    peak_bytes: int | None
    predicted: float | None
    wall: float | None
    walls: tuple[float, ...] = ()
    of_peers: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def spread(self) -> float:
        """Interquartile range over median."""
        return (self.q3 - self.q1) / self.median

    @property
    def is_ours(self) -> bool:
        return self.implementation.startswith("ours") or self.implementation in OUR_OLD_NAMES

    @property
    def kind(self) -> str:
        return LIMIT if self.implementation == LIMIT else "ours" if self.is_ours else "peer"

    @property
    def key(self) -> tuple:
        """The same measurement in another run has the same key."""
        names = (self.op, self.shape, self.case, self.dtype, self.tokens)
        return (*names, self.implementation) if self.shape else (self.group, self.implementation)

    @property
    def title(self) -> str:
        """The case in words, without the op and the implementation."""
        if not self.shape:
            return self.group
        tokens = "" if self.tokens is None else f"{self.tokens:,} tokens"
        return " ".join(filter(None, (self.shape, self.case, tokens, self.dtype)))

    def by_the_wall(self) -> Measurement | None:
        """The same with the wall's samples in the place of the device's; None where there are none."""
        if not self.walls:
            return None
        q1, _, q3 = statistics.quantiles(self.walls, method="inclusive") if len(self.walls) > 1 else self.walls * 3
        times = {"q1": q1, "q3": q3, "least": min(self.walls), "most": max(self.walls), "samples": len(self.walls)}
        return dataclasses.replace(self, median=statistics.median(self.walls), **times)

    def flop_rate(self) -> float | None:
        return self.flops / self.median if self.flops else None

    def byte_rate(self) -> float | None:
        return self.bytes / self.median if self.bytes else None

    def intensity(self) -> float | None:
        """Operations for a byte moved."""
        return self.flops / self.bytes if self.flops and self.bytes else None


@dataclass(frozen=True)
class Run:
    """One result file: where and when it ran, on which tree, and what it measured."""

    name: str
    machine: dict
    commit: dict
    date: str
    measurements: list[Measurement]

    @property
    def rates(self) -> dict:
        return self.machine.get("rates") or {}

    def roofline(self, measurement: Measurement) -> float | None:
        """Time that the measured rates allow over time taken: max(flops / matmul rate, bytes / copy rate) / median.

        None where the run has no rate to compare with. Above 1 when the data stayed in a cache that the measured
        copy does not fit.
        """
        matmul = self.rates.get("matmul", {}).get(measurement.dtype)
        copy = self.rates.get("copy")
        times = [
            work / rate for work, rate in ((measurement.flops, matmul), (measurement.bytes, copy)) if work and rate
        ]
        return max(times) / measurement.median if times else None


def load(path: str | Path) -> Run:
    """The run in ``path``. InputError when the file is missing or is no result of a bench."""
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


def load_folder(folder: str | Path) -> list[Run]:
    """The runs of all result files in ``folder``, by name; other JSON there (budget.json) is passed over.

    InputError when there is none.
    """
    runs = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            runs.append(load(path))
        except InputError:
            continue
    if not runs:
        raise InputError(f"{folder}: no result of petl-mt bench in it; expected ops.json, layers.json or step.json")
    return runs


def parse(content: dict, name: str) -> Run:
    """A run from pytest-benchmark's JSON. KeyError, TypeError or ValueError when it is none."""
    measurements = [measurement(entry) for entry in content["benchmarks"]]
    # Files from before these two keys have the processor in py-cpuinfo's words alone.
    cpu = content["machine_info"].get("cpu", {})
    machine = {"cpu_name": cpu.get("brand_raw", "CPU"), "cores": cpu.get("count"), **content["machine_info"]}
    return Run(name, machine, content["commit_info"], content["datetime"], measurements)


def measurement(entry: dict) -> Measurement:
    """One entry of pytest-benchmark's "benchmarks"."""
    info, stats = entry["extra_info"], entry["stats"]
    seconds = {name: float(stats[name]) for name in ("median", "q1", "q3", "min", "max")}
    if not (all(map(math.isfinite, seconds.values())) and seconds["median"] > 0):
        raise ValueError(f"median {seconds['median']}: expected seconds")
    return Measurement(
        op=info.get("op", "") or entry["name"],
        shape=info.get("shape") or "",
        case=info.get("case") or "",
        dtype=info.get("dtype") or _dtype_in(entry["group"] or ""),
        tokens=info.get("tokens"),
        group=entry["group"] or entry["name"],
        implementation=info.get("implementation") or entry["name"],
        median=seconds["median"],
        q1=seconds["q1"],
        q3=seconds["q3"],
        least=seconds["min"],
        most=seconds["max"],
        samples=stats["rounds"],
        flops=info.get("flops"),
        bytes=info.get("bytes"),
        launches=info.get("launches"),
        peak_bytes=info.get("peak_bytes"),
        predicted=info.get("predicted_seconds"),
        wall=info.get("wall_seconds"),
        walls=tuple(info.get("wall_samples") or ()),
        of_peers=info.get("of_peers") or {},
    )


def _dtype_in(group: str) -> str:
    return next((name for name in ("bfloat16", "float16", "float32") if name in group), "")


def by_op(measurements: Iterable[Measurement]) -> dict[str, list[list[Measurement]]]:
    """For each op its cases, each a list of implementations; all in the order of the file."""
    ops: dict[str, dict[tuple, list[Measurement]]] = {}
    for one in measurements:
        ops.setdefault(one.op, {}).setdefault(one.key[:-1], []).append(one)
    return {op: list(cases.values()) for op, cases in ops.items()}


def limit_of(case: list[Measurement]) -> Measurement | None:
    return next((one for one in case if one.kind == LIMIT), None)


def peft_settings(case: Iterable[Measurement]) -> list[Measurement]:
    """PEFT in each setting that was timed."""
    return [one for one in case if one.implementation.lower().startswith("peft")]


def ratio(one: Measurement, other: Measurement | None, wall: bool = False) -> str:
    """One's median (or its wall) over the other's; "" where one of the two has none. By rounds where it is known."""
    if other and not wall and other.implementation in one.of_peers:
        return digits(one.of_peers[other.implementation])
    ours, theirs = (each and (each.wall if wall else each.median) for each in (one, other))
    return digits(ours / theirs) if ours and theirs else ""


def seconds(value: float) -> str:
    """Seconds with a unit and three digits: "6.78 ms"."""
    unit, scale = next((u, s) for u, s in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 0.0)) if value >= s)
    return f"{digits(value / (scale or 1e-9))} {unit}"


def size(value: float) -> str:
    """Bytes with a binary unit and three digits: "1.50 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1000 or unit == "GiB":
            return f"{digits(value) if unit != 'B' else int(value)} {unit}"
        value /= 1024
    raise AssertionError


def rate(value: float, unit: str) -> str:
    """Operations or bytes a second, decimal: "215 GFLOP/s", unit "FLOP/s" or "B/s"."""
    prefix, scale = next((p, s) for p, s in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("", 0)) if value >= s)
    return f"{digits(value / (scale or 1))} {prefix}{unit}"


def digits(value: float) -> str:
    """Three digits that count, and all before the point."""
    magnitude = abs(value)
    places = 2 if magnitude < 9.995 else 1 if magnitude < 99.95 else 0
    return f"{value:,.{places}f}"
