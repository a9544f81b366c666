"""Measurements of the bench as plain records, and the figures that follow from them.

``raw`` reads them from pytest-benchmark's JSON, ``medians`` from the table that is kept of each device.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.show.figures import digits

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
# Names that older files have for implementations of ours; today's begin with "ours".
OUR_OLD_NAMES = ("int8", "nf4", "tier 1", "tier 2", "tier 3")


@dataclass(frozen=True)
class Times:
    """Holds what is kept of samples in seconds: median, quartiles, extremes, and their number."""

    median: float
    q1: float
    q3: float
    least: float
    most: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Times:
        q1, _, q3 = statistics.quantiles(samples, method="inclusive") if len(samples) > 1 else [*samples] * 3
        return cls(statistics.median(samples), q1, q3, min(samples), max(samples), len(samples))


@dataclass(frozen=True)
class Measurement:
    """Holds what was measured of one implementation of one case. Seconds, bytes and operations are of one call.

    ``shape``, ``case``, ``dtype`` and ``tokens`` are empty (None) where an old file lacks them; ``group`` is always
    there. ``bytes`` (read and written) and ``flops`` are those that no implementation can avoid, ``launches`` kernels,
    ``peak_bytes`` the most memory taken beside the inputs, ``predicted`` the performance model's seconds; all may be
    None. Where ``times`` are the device's alone, ``wall`` is the median with the host's part, which a caller waits
    for, and ``walls`` the times that it is the median of (None in files from before they were kept); elsewhere both are
    None. ``more`` has figures of single benchmarks, by name.
    """

    op: str
    shape: str
    case: str
    dtype: str
    tokens: int | None
    group: str
    implementation: str
    times: Times
    flops: int | None = None
    bytes: int | None = None
    launches: int | None = None
    peak_bytes: int | None = None
    predicted: float | None = None
    wall: float | None = None
    walls: Times | None = None
    more: dict = dataclasses.field(default_factory=dict)

    @property
    def median(self) -> float:
        return self.times.median

    @property
    def spread(self) -> float:
        """Interquartile range over median."""
        return (self.times.q3 - self.times.q1) / self.times.median

    @property
    def of_peers(self) -> dict[str, float]:
        """Ratios by peer where steps were taken in turn: the median over the rounds of its time over the peer's."""
        return self.more.get("of_peers") or {}

    @property
    def is_ours(self) -> bool:
        return self.implementation.startswith("ours") or self.implementation in OUR_OLD_NAMES

    @property
    def kind(self) -> str:
        return LIMIT if self.implementation == LIMIT else "ours" if self.is_ours else "peer"

    @property
    def key(self) -> tuple:
        """Names that the same measurement has in another run, too."""
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
        """Returns the same with the wall's times in the place of the device's; None where there are none."""
        return None if self.walls is None else dataclasses.replace(self, times=self.walls)

    def flop_rate(self) -> float | None:
        return self.flops / self.median if self.flops else None

    def byte_rate(self) -> float | None:
        return self.bytes / self.median if self.bytes else None

    def intensity(self) -> float | None:
        """Operations for a byte moved."""
        return self.flops / self.bytes if self.flops and self.bytes else None


@dataclass(frozen=True)
class Run:
    """Holds what benchmarks measured, and where, when and on which tree they ran. name: their folder ("ops")."""

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


def by_op(measurements: Iterable[Measurement]) -> dict[str, list[list[Measurement]]]:
    """Returns for each op its cases, each a list of implementations; all in the order of the file."""
    ops: dict[str, dict[tuple, list[Measurement]]] = {}
    for one in measurements:
        ops.setdefault(one.op, {}).setdefault(one.key[:-1], []).append(one)
    return {op: list(cases.values()) for op, cases in ops.items()}


def limit_of(case: Iterable[Measurement]) -> Measurement | None:
    return next((one for one in case if one.kind == LIMIT), None)


def peft_settings(case: Iterable[Measurement]) -> list[Measurement]:
    """Returns PEFT in each setting that was timed."""
    return [one for one in case if one.implementation.lower().startswith("peft")]


def ratio(one: Measurement, other: Measurement | None, wall: bool = False) -> str:
    """Returns one's median (or wall) over the other's, by rounds where that is known; "" where one of them has none."""
    if other and not wall and other.implementation in one.of_peers:
        return digits(one.of_peers[other.implementation])
    ours, theirs = (each and (each.wall if wall else each.median) for each in (one, other))
    return digits(ours / theirs) if ours and theirs else ""
