"""The runner on a checkout of its own with benchmarks that take no time, and the measured rates."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from petl_mt import bench, cli
from result_files import CHECKOUT, entry

from bench.run import rates
from bench.show import medians
from bench.show.raw import load

TINY = """
import os, pathlib, signal, time
import pytest

@pytest.mark.parametrize("implementation", ["limit", "ours", pytest.param("PEFT, defaults", marks=pytest.mark.peer)])
@pytest.mark.parametrize("op", ["first_op", "second_op"])
def test_tiny(benchmark, op, implementation):
    told = pathlib.Path(__file__).with_name(op)  # a file that says how this op is to end
    state = told.read_text() if told.exists() else ""
    assert state != "wrong"
    if state == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if state == "interrupt" and implementation == "ours":
        raise KeyboardInterrupt
    benchmark.group = op
    names = {"shape": "nllb-600m", "case": "", "dtype": "float32", "tokens": 1}
    benchmark.extra_info.update(names, op=op, implementation=implementation, flops=10, bytes=20)
    benchmark.pedantic(lambda: time.sleep(1e-4), rounds=5)
"""
# A checkout that is not the tests' own, and rates that take no second.
MAIN = """
import sys, pathlib
import petl_mt.bench
petl_mt.bench.CHECKOUT = pathlib.Path(sys.argv[1])
from bench.run import rates
rates.COPY_BYTES["cpu"], rates.SIDE["cpu"], rates.LEAST_SECONDS = 1 << 20, 16, 0.0
from petl_mt.cli import main
sys.exit(main(["bench", *sys.argv[2:]]))
"""


@pytest.fixture
def checkout(tmp_path):
    """bench/ with the runner's own modules and one file of benchmarks in the folders ops and layers."""
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    for what in ("ops", "layers"):
        (tmp_path / "bench" / what).mkdir(parents=True)
        (tmp_path / "bench" / what / f"bench_tiny_{what}.py").write_text(TINY)
    for path in (CHECKOUT / "bench").glob("*.py"):
        shutil.copy(path, tmp_path / "bench")
    for what in ("run", "show", "predict"):
        shutil.copytree(CHECKOUT / "bench" / what, tmp_path / "bench" / what)
    return tmp_path


def run(checkout, *words: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "python")])
    # pytest-benchmark times nothing in a worker of xdist, and the child would take itself for one
    mine = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**mine, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MAIN, str(checkout), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=checkout)


@pytest.mark.slow
def test_complete_then_failed_then_interrupted(checkout):
    results = checkout / "bench" / "results" / "cpu"
    done = run(checkout, "ops", "layers", "--device", "cpu", "--peers")
    assert done.returncode == 0, done.stdout + done.stderr
    ops = load(results / "raw" / "ops.json")
    assert [one.implementation for one in ops.measurements] == ["limit", "ours", "PEFT, defaults"] * 2
    assert ops.measurements[0].times.samples == 5 and len(load(results / "raw" / "layers.json").measurements) == 6
    assert [(run.name, len(run.measurements)) for run in medians.read(results)] == [("ops", 6), ("layers", 6)]
    assert "/ PEFT, defaults" in done.stdout and "\x1b[" not in done.stdout
    page = (results / "report.html").read_text()
    assert "first_op" in page and '<h2 id="layers">' in page
    machine, text = ops.machine, (results / "raw" / "ops.json").read_text()
    assert machine["threads"] == 1 and machine["device"] == "cpu" and machine["rates"]["copy"] > 0
    assert set(machine["rates"]["matmul"]) == {"bfloat16", "float16", "float32"}
    assert str(checkout) not in text and f'"{os.uname().nodename}"' not in text

    kept = [results / "raw" / "ops.json", results / "medians.csv", results / "runs.jsonl"]
    before = [path.read_bytes() for path in kept]
    (checkout / "bench" / "ops" / "second_op").write_text("wrong")
    failed = run(checkout, "ops", "--device", "cpu")
    assert failed.returncode == 1 and "not the whole" in failed.stderr
    assert [one.op for one in load(results / "part" / "ops.json").measurements] == ["first_op"] * 2

    (checkout / "bench" / "ops" / "second_op").write_text("interrupt")
    interrupted = run(checkout, "ops", "layers", "--device", "cpu")
    assert interrupted.returncode == 130
    ops_seen = [one.op for one in load(results / "part" / "ops.json").measurements]
    assert ops_seen == ["first_op", "first_op", "second_op"]
    assert not (results / "part" / "layers.json").exists()  # the folders after it are not run
    assert [path.read_bytes() for path in kept] == before
    assert not list(checkout.rglob("*.tmp"))


@pytest.mark.slow
def test_what_was_timed_is_on_the_disk_when_the_run_is_killed(checkout):
    part = checkout / "bench" / "results" / "cpu" / "part" / "ops.json"
    (checkout / "bench" / "ops" / "second_op").write_text("kill")
    assert run(checkout, "ops", "--device", "cpu").returncode == -signal.SIGKILL
    whole = load(part)
    assert [(one.op, one.implementation) for one in whole.measurements] == [("first_op", "limit"), ("first_op", "ours")]
    assert whole.machine["device"] == "cpu" and whole.machine["rates"]["copy"] > 0 and "dirty" in whole.commit


@pytest.mark.slow
def test_only(checkout):
    results = checkout / "bench" / "results" / "cpu"
    done = run(checkout, "ops", "--device", "cpu", "--only", "first_op and ours")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [one.op for one in load(results / "part" / "ops.json").measurements] == ["first_op"]
    assert (
        not (results / "raw").exists() and not (results / "medians.csv").exists()
    )  # a part never takes the place of the whole
    before = (results / "part" / "ops.json").read_bytes()
    nothing = run(checkout, "ops", "layers", "--device", "cpu", "--only", "third_op and ours")
    assert nothing.returncode == 2 and nothing.stderr == (
        "petl-mt bench: ops layers: nothing to time for --only 'third_op and ours' (near: first_op, second_op, tiny); "
        "peers need --peers\n"
    )
    assert (results / "part" / "ops.json").read_bytes() == before


@pytest.mark.parametrize(
    ("code", "message"), [(4, "--only '((': expected names joined by"), (5, "nothing to time for")]
)
def test_pytest_refuses(monkeypatch, tmp_path, capsys, code, message):
    monkeypatch.setattr(bench, "_measure", lambda *_: (code, False))
    monkeypatch.setattr(bench, "_results", lambda device: tmp_path)
    assert cli.main(["bench", "ops", "--device", "cpu", "--only", "(("]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_wrong_words(capsys):
    for words, message in {
        ("oops",): "'oops': expected ",
        ("ops", "--device", "tpu"): "--device 'tpu': expected cpu or cuda",
        ("ops", "--threshold", "5%"): "--threshold belongs to compare",
        ("report", "a", "b"): "report: 2 folders",
        ("report", "/nonexistent"): "no result of petl-mt bench",
    }.items():
        assert cli.main(["bench", *words]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_outside_a_checkout(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path)
    for words in (["ops"], ["report", "x"], ["compare", "a", "b"]):
        assert cli.main(["bench", *words]) == 2
        assert "run it from a checkout" in capsys.readouterr().err


def test_report_from_the_json_alone(result_file, capsys):
    folder = result_file("ops.json", [entry("ours", 0.01)]).parent
    assert cli.main(["bench", "report", str(folder)]) == 0
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert json.loads((folder / "ops.json").read_text())["benchmarks"]


def test_rates_count_both_ways_and_both_operations(monkeypatch):
    monkeypatch.setattr(rates, "_fastest_seconds", lambda call, device: call() is None or 0.5)
    assert rates.copy_rate("cpu", 1000) == 4000  # 1,000 bytes read and 1,000 written in half a second
    monkeypatch.setattr(rates, "LEAST_SECONDS", 0.0)
    assert rates.matmul_rate("cpu", "float32", 8) == 2 * 8**3 / 0.5
    assert all(value > 0 for value in (rates.matmul_rate("cpu", name, 8) for name in rates.DTYPES))
