from __future__ import annotations

import collections
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


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


def pytest_benchmark_update_machine_info(config, machine_info):
    device = config.getoption("--device")
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    # The name of the host says nothing about speed and is nobody's business.
    machine_info.pop("node", None)


def pytest_benchmark_update_commit_info(config, commit_info):
    # Results are results of a tree: say when it was not the commit's.
    status = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True)
    commit_info["dirty"] = bool(status.stdout.strip()) if status.returncode == 0 else None


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    if session is None:
        return
    groups = collections.defaultdict(list)
    for bench in session.benchmarks:
        if bench.stats and bench.extra_info.get("implementation"):
            groups[bench.group].append(bench)
    for group, benches in groups.items():
        limit = next((b for b in benches if b.extra_info["implementation"] == "limit"), None)
        terminalreporter.write_line("")
        terminalreporter.write_line(f"{group}: median, ratio to the limit")
        for bench in sorted(benches, key=lambda b: b.stats.median):
            ratio = f"{bench.stats.median / limit.stats.median:6.2f}" if limit else "     -"
            rate = bench.extra_info["flops"] / bench.stats.median / 1e9
            name = bench.extra_info["implementation"]
            terminalreporter.write_line(f"  {name:28s} {bench.stats.median * 1e3:9.3f} ms {ratio} {rate:9.1f} GFLOP/s")
