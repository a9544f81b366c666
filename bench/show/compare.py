"""Changes between two runs of the bench, and which of them are slower beyond noise."""

from __future__ import annotations

import collections
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.show.figures import seconds
from bench.show.measurements import VERSIONS, Measurement, Run
from bench.show.medians import load
from bench.show.table import render
from petl_kernels.errors import InputError

FEW_SAMPLES = 5
MACHINE = ("device", "cpu_name", "cores", "threads", "float32_matmul", *VERSIONS)
HEAD = ["case", "implementation", "time", "A", "B", "B / A", "change"]


@dataclass(frozen=True)
class Change:
    """Holds the same measurement of two runs. time: "device" or "wall" where a run has both, else ""."""

    a: Measurement
    b: Measurement
    time: str = ""

    @property
    def ratio(self) -> float:
        return self.b.median / self.a.median

    @property
    def above_noise(self) -> bool:
        """The middle halves of the two runs' samples do not overlap (below five samples: all samples).

        Quartiles and not the standard error of a median: that error shrinks with the number of samples as if they were
        independent, but the samples of one run share its clock rate, its neighbours on the machine and where its memory
        lies, so that two runs of one tree differ by more than it allows.
        """
        (a_low, a_high), (b_low, b_high) = map(_middle, (self.a, self.b))
        return b_low > a_high or a_low > b_high

    def slower(self, threshold: float) -> bool:
        return self.above_noise and self.ratio > 1 + threshold

    def word(self, threshold: float) -> str:
        if not self.above_noise:
            return "noise"
        return "slower" if self.ratio > 1 + threshold else "faster" if self.ratio < 1 / (1 + threshold) else "small"


def compare(path_a: str | Path, path_b: str | Path, threshold: float = 0.05) -> int:
    """Prints how the medians of B stand to those of A, and their walls where both runs have samples of them.

    Measurements are paired by (op, shape, case, dtype, tokens, implementation), or, when a file is too old to have
    these, by the text of their group and the implementation. Returns 1 when one of ours is slower beyond noise and
    ``threshold``, else 0. Raises InputError for a wrong file, one and the same file, or nothing in common.
    """
    if Path(path_a).resolve() == Path(path_b).resolve():
        raise InputError(f"{path_a} and {path_b}: the same file; expected those of two runs")
    a, b = load(path_a), load(path_b)
    pairs, only_a, only_b = paired(a, b)
    if not pairs:
        raise InputError(f"{path_a} and {path_b}: no measurement in common; expected two runs of the same benchmarks")
    difference = differences(a, b)
    if difference:
        print(f"warning: {difference}", file=sys.stderr)
    pairs = sorted(with_walls(pairs), key=lambda change: -change.ratio)
    rows = [_row(change, threshold) for change in pairs]
    title = f"A: {path_a} ({_tree(a)}), B: {path_b} ({_tree(b)})"
    print(render(title, HEAD, rows, sys.stdout.isatty(), _terminal_width(), left=3), end="")
    for path, only in ((path_a, only_a), (path_b, only_b)):
        if only:
            print(f"only in {path}: {len(only)}: {_names(only)}")
    slower = sum(change.b.is_ours and change.slower(threshold) for change in pairs)
    print(f"{len(pairs)} compared; of ours, {slower} slower by more than {threshold:.0%} and above noise")
    return 1 if slower else 0


def paired(a: Run, b: Run) -> tuple[list[Change], list[Measurement], list[Measurement]]:
    """Returns measurements that both runs have, those of A alone, those of B alone."""
    old = not all(one.shape for one in (*a.measurements, *b.measurements))
    in_a, in_b = _by_key(a.measurements, old), _by_key(b.measurements, old)
    pairs = [Change(in_a[key], in_b[key]) for key in in_a if key in in_b]
    return pairs, [in_a[key] for key in in_a if key not in in_b], [in_b[key] for key in in_b if key not in in_a]


def with_walls(pairs: Iterable[Change]) -> list[Change]:
    """Returns the pairs, and behind each the same by the wall where both runs have samples of it."""
    changes = []
    for pair in pairs:
        a, b = pair.a.by_the_wall(), pair.b.by_the_wall()
        changes += [Change(pair.a, pair.b, "device"), Change(a, b, "wall")] if a and b else [pair]
    return changes


def _by_key(measurements: Iterable[Measurement], old: bool) -> dict[tuple, Measurement]:
    """Measurements that share a key, which old files have, are told apart by their order."""
    seen: collections.Counter = collections.Counter()
    keyed = {}
    for one in measurements:
        key = (one.group, one.implementation) if old else one.key
        seen[key] += 1
        keyed[(*key, seen[key])] = one
    return keyed


def differences(a: Run, b: Run) -> str:
    """Returns one line on what else than the code differs, "" when nothing does."""
    changed = [
        f"{name} {a.machine[name]} and {b.machine[name]}"
        for name in MACHINE
        if name in a.machine and name in b.machine and a.machine[name] != b.machine[name]
    ]
    parts = [f"the runs differ in {', '.join(changed)}"] if changed else []
    dirty = [name for name, run in (("A", a), ("B", b)) if run.commit.get("dirty")]
    if dirty:
        parts.append(f"{' and '.join(dirty)} ran on a tree with changes beside its commit")
    return "; ".join(parts)


def _middle(one: Measurement) -> tuple[float, float]:
    times = one.times
    return (times.q1, times.q3) if times.samples >= FEW_SAMPLES else (times.least, times.most)


def _row(change: Change, threshold: float) -> list[str]:
    a, b = change.a, change.b
    case = b.title if b.title.startswith(b.op) else f"{b.op} {b.title}"
    times = [f"{seconds(one.median)} ±{one.spread / 2:.0%}" for one in (a, b)]
    return [case, b.implementation, change.time, *times, f"{change.ratio:.3f}", change.word(threshold)]


def _tree(run: Run) -> str:
    return (run.commit.get("id") or "unknown commit")[:9]


def _names(only: list[Measurement]) -> str:
    shown = [f"{one.group} [{one.implementation}]" for one in only[:5]]
    return "; ".join(shown) + ("; …" if len(only) > 5 else "")


def _terminal_width() -> int:
    import shutil

    return shutil.get_terminal_size().columns
