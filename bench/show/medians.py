"""The table that is kept of each device, results/<device>/medians.csv: one row a measurement, a run's rows together.

A complete run of `petl-mt bench` adds its rows, so the file has the history; what its rows share (machine, versions,
measured rates, commit) is a line of runs.jsonl beside it, which ``run`` and ``date`` lead to. Seconds have six digits.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path

from bench.show import raw
from bench.show.measurements import Measurement, Run, Times
from petl_kernels.errors import InputError
from petl_kernels.files import atomic_write

NAMES = ("op", "shape", "case", "tokens", "dtype", "implementation")
TIMES = tuple(field.name for field in dataclasses.fields(Times))
WORK = ("flops", "bytes", "launches", "peak_bytes")
WALLS = tuple(f"wall_{name}" for name in TIMES)
# group: only where the names of the case do not make it up. more: JSON.
HEAD = ("run", "date", "commit", *NAMES, "unit", *TIMES, *WORK, "predicted", *WALLS, "group", "more")
# The machine's words that say anything about speed; pytest-benchmark has flags and caches of the processor, too.
MACHINE = ("device", "cpu_name", "cores", "threads", "float32_matmul", "python_version", "torch", "cuda", "triton")
MACHINE += ("transformers", "peft", "bitsandbytes", "liger-kernel", "cut-cross-entropy", "rates")


def add(folder: Path, run: Run) -> Path:
    """Adds a run to the table of ``folder`` and returns the table's path; the same run again takes its own place."""
    known = [one for one in read(folder) if (one.name, one.date) != (run.name, run.date)]
    return write(folder, [*known, run])


def write(folder: Path, runs: list[Run]) -> Path:
    table, lines = io.StringIO(), []
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(HEAD)
    for run in runs:
        machine = {name: run.machine[name] for name in MACHINE if run.machine.get(name) is not None}
        lines.append(json.dumps({"run": run.name, "date": run.date, "commit": run.commit, "machine": machine}) + "\n")
        rows.writerows(_row(run, one) for one in run.measurements)
    for name, text in (("medians.csv", table.getvalue()), ("runs.jsonl", "".join(lines))):
        with atomic_write(folder / name) as file:
            file.write(text)
    return folder / "medians.csv"


def read(folder: Path) -> list[Run]:
    """Returns every run of the folder's table, in the table's order; none where there is no table.

    Raises InputError where the table or runs.jsonl beside it is none.
    """
    table = folder / "medians.csv"
    if not table.exists():
        return []
    try:
        lines = [json.loads(line) for line in (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
        runs = {(line["run"], line["date"]): line for line in lines}
        found: dict[tuple[str, str], list[Measurement]] = {key: [] for key in runs}
        with open(table, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                found[row["run"], row["date"]].append(_measurement(row))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{table}: {type(error).__name__}: {error}; expected a table that petl-mt bench has written, and runs.jsonl"
        ) from None
    return [Run(key[0], line["machine"], line["commit"], key[1], found[key]) for key, line in runs.items()]


def latest(folder: str | Path) -> list[Run]:
    """Returns the last run of each name ("ops", "layers") in the folder's table."""
    return _last(read(Path(folder)))


def run_of(folder: str | Path, name: str) -> Run:
    """Returns the last run of this name; InputError where the table has none."""
    for run in latest(folder):
        if run.name == name:
            return run
    raise InputError(f"{folder}: no run of {name} in its medians.csv")


def load(path: str | Path) -> Run:
    """Returns the runs of ``runs_in`` as one, with the machine and the commit of the last."""
    runs = runs_in(path)
    every = [one for run in runs for one in run.measurements]
    return dataclasses.replace(runs[-1], name=" ".join(run.name for run in runs), measurements=every)


def runs_in(path: str | Path) -> list[Run]:
    """Returns the run of a raw JSON, or the last runs of a medians.csv, of a commit with ``@COMMIT`` behind it.

    Raises InputError where the file is missing or holds no such run.
    """
    name, _, commit = str(path).partition(".csv@")
    if not commit and not name.endswith(".csv"):
        return [raw.load(path)]
    table = Path(name if name.endswith(".csv") else f"{name}.csv")
    if not table.exists():
        raise InputError(f"{table}: no such file; expected a table that petl-mt bench has written")
    runs = [run for run in read(table.parent) if (run.commit.get("id") or "").startswith(commit)]
    if not runs:
        raise InputError(f"{table}: no run at commit {commit!r}")
    return _last(runs)


def load_folder(folder: str | Path) -> list[Run]:
    """Returns the last runs of the folder's table; where it has none, those of all raw results in it, by name.

    Other JSON there (budget.json) is passed over. Raises InputError when there is nothing.
    """
    runs = latest(folder)
    for path in [] if runs else sorted(Path(folder).glob("*.json")):
        try:
            runs.append(raw.load(path))
        except InputError:
            continue
    if not runs:
        raise InputError(f"{folder}: no result of petl-mt bench in it; expected medians.csv, ops.json or layers.json")
    return runs


def _last(runs: list[Run]) -> list[Run]:
    return list({run.name: run for run in runs}.values())


def _row(run: Run, one: Measurement) -> Iterator[object]:
    yield from (run.name, run.date, (run.commit.get("id") or "")[:9])
    yield from ("" if value is None else value for value in (getattr(one, name) for name in NAMES))
    yield "s"
    yield from _times(one.times)
    yield from ("" if value is None else value for value in (getattr(one, name) for name in WORK))
    yield _number(one.predicted)
    yield from _times(one.walls) if one.walls else (_number(one.wall), *[""] * (len(WALLS) - 1))
    yield "" if one.group == _group(one) else one.group
    yield json.dumps(one.more, ensure_ascii=False) if one.more else ""


def _times(times: Times) -> Iterator[object]:
    yield from map(_number, dataclasses.astuple(times)[:-1])
    yield times.samples


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _group(one: Measurement) -> str:
    """Returns the group that benchmarks make of the names of their case."""
    tokens = "" if one.tokens is None else f"{one.tokens} tokens"
    return " ".join(filter(None, (one.op, one.shape, one.case, tokens, one.dtype)))


def _measurement(row: dict[str, str]) -> Measurement:
    tokens, *work = (int(row[name]) if row[name] else None for name in ("tokens", *WORK))
    predicted, wall = (float(row[name]) if row[name] else None for name in ("predicted", "wall_median"))
    one = Measurement(
        op=row["op"],
        shape=row["shape"],
        case=row["case"],
        dtype=row["dtype"],
        tokens=tokens,
        group=row["group"],
        implementation=row["implementation"],
        times=_read_times(row, ""),
        **dict(zip(WORK, work, strict=True)),
        predicted=predicted,
        wall=wall,
        walls=_read_times(row, "wall_") if row["wall_samples"] else None,
        more=json.loads(row["more"]) if row["more"] else {},
    )
    return one if one.group else dataclasses.replace(one, group=_group(one))


def _read_times(row: dict[str, str], prefix: str) -> Times:
    *seconds, samples = (row[prefix + name] for name in TIMES)
    return Times(*map(float, seconds), samples=int(samples))
