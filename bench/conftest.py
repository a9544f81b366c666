from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from measurements import Run, by_op, measurement  # noqa: E402
from rates import measured_rates  # noqa: E402
from table import case_table, render  # noqa: E402

RATES = pytest.StashKey[dict]()
PACKAGES = ("triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "cut-cross-entropy")


def pytest_addoption(parser):
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.addoption("--peers", action="store_true", help="also time PEFT and torch.compile")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--peers"):
        return
    for item in items:
        if item.get_closest_marker("peer"):
            item.add_marker(pytest.mark.skip(reason="a peer: ask with --peers"))


def pytest_configure(config):
    config.addinivalue_line("markers", "peer: times somebody else's implementation")


@pytest.fixture
def device(request) -> str:
    return request.config.getoption("--device")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    # Before the first benchmark, so that the roof is measured on the machine as the ops find it. Workers of xdist run
    # side by side and time nothing.
    if session.items and not session.config.option.collectonly and not hasattr(session.config, "workerinput"):
        session.config.stash[RATES] = measured_rates(session.config.getoption("--device"))


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(_machine(config.getoption("--device"), machine_info.get("cpu", {})))
    machine_info["rates"] = config.stash.get(RATES, {})
    # The names of the host and of its kernel say nothing about speed and are nobody's business.
    for name in ("node", "release"):
        machine_info.pop(name, None)


def _machine(device: str, cpu: dict) -> dict:
    """Versions, and the processor that did the work: "device" is "cpu" or the card's name."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu_name": cpu.get("brand_raw") or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "float32_matmul": torch.get_float32_matmul_precision(),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def pytest_benchmark_update_commit_info(config, commit_info):
    # Results are results of a tree: say when it was not the commit's. Of this checkout, from whatever folder it is run.
    # Not by the results themselves, which the run before this one may have written.
    status = _git("status", "--porcelain", "--", ".", ":(exclude)bench/results")
    commit = _git("rev-parse", "HEAD")
    time = _git("log", "-1", "--format=%cI")
    commit_info.clear()
    commit_info.update(id=commit, time=time, dirty=None if status is None else bool(status))


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(Path(__file__).parents[1]), *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    # The benchmark that Ctrl-C met has no samples, and pytest-benchmark's own figures fail on it.
    timed = getattr(session.config, "_benchmarksession", None)
    if timed:
        timed.benchmarks[:] = [bench for bench in timed.benchmarks if bench.stats.data and not bench.has_error]


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
