"""Hooks of pytest for every benchmark: options, the machine's rates, results after each, tables at the end."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from pytest_benchmark.utils import safe_dumps

from bench.run.machine import described
from bench.run.rates import measured_rates
from bench.show.measurements import Run, by_op
from bench.show.raw import measurement
from bench.show.table import case_table, render
from bench.where import git
from petl_kernels.files import atomic_write

RATES = pytest.StashKey[dict]()
WHERE = pytest.StashKey[dict]()  # machine and commit, which stay the same in a run
WRITTEN = pytest.StashKey[int]()  # benchmarks in the result file
# The files that decide most come first: a run may be cut.
FIRST = [f"bench_{name}" for name in ("step", "lora_linear", "linear_cross_entropy", "frozen_ffn", "attention")]
FIRST += ["bench_bottleneck_adapter", "bench_quantized"]


def pytest_addoption(parser):
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.addoption("--peers", action="store_true", help="also time PEFT and torch.compile")
    parser.addoption("--results", help="a file for the results, written anew after each benchmark")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))
    if config.getoption("--peers"):
        return
    for item in items:
        if item.get_closest_marker("peer"):
            item.add_marker(pytest.mark.skip(reason="a peer: timed with --peers"))


def pytest_configure(config):
    config.addinivalue_line("markers", "peer: times somebody else's implementation")


@pytest.fixture(scope="session")
def device(request) -> str:
    return request.config.getoption("--device")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    # Before the first benchmark, so that the roof is measured on the machine as the ops find it. Workers of xdist run
    # side by side and time nothing.
    if session.items and not session.config.option.collectonly and not hasattr(session.config, "workerinput"):
        session.config.stash[RATES] = measured_rates(session.config.getoption("--device"))


def pytest_benchmark_update_machine_info(config, machine_info):
    cpu = machine_info.get("cpu", {}).get("brand_raw")
    machine_info.update(described(config.getoption("--device"), cpu or platform.machine()))
    machine_info["rates"] = config.stash.get(RATES, {})
    # The names of the host and of its kernel say nothing about speed, and do not belong into a file that is shared.
    for name in ("node", "release"):
        machine_info.pop(name, None)


def pytest_benchmark_update_commit_info(commit_info):
    # Results belong to a tree: "dirty" where it was not the commit's. Results themselves do not count, since the run
    # before this one may have written them.
    status = git("status", "--porcelain", "--", ".", ":(exclude)bench/results")
    commit = git("rev-parse", "HEAD")
    time = git("log", "-1", "--format=%cI")
    commit_info.clear()
    commit_info.update(id=commit, time=time, dirty=None if status is None else bool(status))


def pytest_runtest_teardown(item):
    # After each benchmark: whatever ends the run later, SIGKILL too, what was timed is in the file.
    path, timed = item.config.getoption("--results"), item.config._benchmarksession
    whole = _whole(timed.benchmarks)
    if path and len(whole) > item.config.stash.get(WRITTEN, 0):
        item.config.stash[WRITTEN] = len(whole)
        _write(Path(path), item.config, whole)


def _write(path: Path, config, benchmarks: list) -> None:
    """Writes pytest-benchmark's JSON."""
    if WHERE not in config.stash:
        commit: dict = {}
        pytest_benchmark_update_commit_info(commit)
        config.stash[WHERE] = {"machine_info": config._benchmarksession.get_machine_info(), "commit_info": commit}
    options = {"config": config, "benchmarks": benchmarks, "include_data": True, **config.stash[WHERE]}
    content = config.hook.pytest_benchmark_generate_json(**options)
    with atomic_write(path) as file:
        file.write(safe_dumps(content, indent=1) + "\n")


def _whole(benchmarks: list) -> list:
    """Returns the benchmarks without the one that Ctrl-C met, which has no samples."""
    return [bench for bench in benchmarks if bench.stats.data and not bench.has_error]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    timed = getattr(session.config, "_benchmarksession", None)
    if timed:  # whose own figures fail on a benchmark without samples
        timed.benchmarks[:] = _whole(timed.benchmarks)


def pytest_terminal_summary(terminalreporter, config):
    timed = getattr(config, "_benchmarksession", None)
    entries = [bench.as_dict(include_data=False) for bench in timed.benchmarks] if timed else []
    run = Run("", {"rates": config.stash.get(RATES, {})}, {}, "", [measurement(entry) for entry in entries])
    terminal = bool(terminalreporter.isatty)
    for cases in by_op(run.measurements).values():
        for case in cases:
            head, rows = case_table(case, run)
            terminalreporter.write_line("")
            terminalreporter.write(render(case[0].group, head, rows, terminal, terminalreporter._tw.fullwidth))
