"""bench/gpu.py: each part in its own time, what is cut or fails is told and costs no other part, and the page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from result_files import CHECKOUT, content, entry

from bench import gpu
from bench.gpu import Done, Part, page, parts, run_all, times_of

# A part that ignores Ctrl-C, as a kernel that hangs does, and so does a process that it has started.
HANGS = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("::t PASSED [ 50%]", child.pid, flush=True)
time.sleep(600)
"""
PARTS = [
    Part("passes", 30, ("-c", "import os; print('fine', os.getpgid(0) == os.getpid())")),
    Part("fails", 30, ("-c", "print('x: [gw0] [ 50%] FAILED tests/a.py::t '); raise SystemExit(3)")),
    Part("hangs", 5, ("-c", HANGS)),
    Part("interrupted", 5, ("-c", "import time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: print('here it was')")),
    Part("last", 30, ("-c", "print('it ran')")),
]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 1)


@pytest.mark.slow
def test_what_hangs_is_cut_and_the_next_part_runs(tmp_path, quick, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "run", lambda part, limit, log, run=gpu.run: run(part, part.limit, log))
    began = time.monotonic()
    done = {one.name: one for one in run_all(PARTS, tmp_path)}
    assert time.monotonic() - began < 60
    states = {name: (one.state, one.code) for name, one in done.items()}
    assert states == {
        "passes": ("passed", 0),
        "fails": ("failed", 3),
        "hangs": ("cut", None),
        "interrupted": ("cut", None),
        "last": ("passed", 0),
    }
    assert "fine True" in (tmp_path / "passes.log").read_text()
    assert "here it was" in (tmp_path / "interrupted.log").read_text()
    assert done["fails"].said == "1 failed" and done["hangs"].said == "1 passed"
    child = int((tmp_path / "hangs.log").read_text().split()[-1])
    time.sleep(0.2)
    assert not alive(child)
    assert named(tmp_path) == [part.name for part in PARTS]
    assert "hangs          CUT after" in (tmp_path / "page.txt").read_text()
    out = capsys.readouterr().out
    assert "hangs: CUT after " in out and "fails: FAILED (3)" in out and "here it was" in out


def named(folder) -> list[str]:
    path = folder / "gpu.json"
    return [one["name"] for one in json.loads(path.read_text())["parts"]] if path.exists() else []


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet is dead all the same."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_each_result_is_on_the_disk_before_the_next_part_begins(tmp_path, monkeypatch):
    seen = []

    def run(part, limit, log):
        seen.append(named(tmp_path))
        return Done(part.name, "passed", 1.0, limit, 0, "")

    monkeypatch.setattr(gpu, "run", run)
    run_all(PARTS[:3], tmp_path)
    assert seen == [[], ["passes"], ["passes", "fails"]]


def test_what_a_part_leaves_of_its_time_goes_to_the_next(tmp_path, monkeypatch):
    limits, took = [], iter([10.0, 50.0, 1.0])

    def run(part, limit, log):
        limits.append(limit)
        return Done(part.name, "passed", next(took), limit, 0, "")

    monkeypatch.setattr(gpu, "run", run)
    run_all(PARTS[:3], tmp_path)  # 30, 30 and 5 seconds
    assert limits == [30, 50, 5]


def test_six_minutes_in_all():
    assert sum(part.limit for part in parts()) <= 350  # and ten seconds for the page and the driver
    names = [part.name for part in parts()]
    assert [name for name in names if name != "compile"] == [
        "build", "tests", "product", "nllb-600m", "step", "ops", "layers"
    ]  # fmt: skip
    assert not any("contest" in word for part in parts() for word in part.words)
    assert "contest" in [part.name for part in gpu.more_parts()]


# Each argument is a folder of bench/ and an expression over names.
COLLECT = """
import sys, pytest
options = ["-q", "--collect-only", "-o", "python_files=bench_*.py", "--device", "cuda"]
for folder, only in zip(sys.argv[1::2], sys.argv[2::2]):
    print("folder", folder, flush=True)
    pytest.main([*options, "-k", only, "bench/" + folder])
"""


def collected(timed: list[Part]) -> dict[str, list[str]]:
    """Names of the benchmarks that parts time, by folder."""
    words = [word for part in timed for word in (part.words[3], part.words[part.words.index("--only") + 1])]
    paths = os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "python")])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, *words],
        capture_output=True, text=True, cwd=CHECKOUT, env={**environment, "PYTHONPATH": paths},
    )  # fmt: skip
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("folder "):
            names = found.setdefault(line.split()[1], [])
        elif "::" in line:
            names.append(line.partition("::")[2])
    return found


@pytest.mark.slow
def test_every_part_of_the_bench_finds_its_cases():
    host = Part("host", 0, (*gpu.BENCH, "host", "--peers", "--only", "host or launch"))
    found = collected([*(part for part in parts() if part.name in ("step", "ops", "layers")), host])
    assert {name.partition("[")[0] for name in found["host"]} == {"test_host", "test_launch"}
    steps = ("ours", "ours, graph", "PEFT, bf16 adapters", "PEFT, defaults")
    assert found["step"] == [f"test_step[{name}]" for name in steps]
    assert len(found["layers"]) == 2 * 5 and sum("ours]" in name for name in found["layers"]) == 2
    tested = {"lora_linear", "linear_cross_entropy", "frozen_ffn", "attention", "bottleneck_adapter", "product"}
    assert {name.partition("[")[0] for name in found["ops"]} == {f"test_{name}" for name in tested}
    assert found["ops"][0].startswith("test_lora_linear")  # what decides most comes first
    for op in tested:
        ours = [name for name in found["ops"] if name.startswith(f"test_{op}[") and "ours" in name]
        assert any("nllb-600m" in name for name in ours) and any("nllb-3.3b" in name for name in ours), op
    assert 60 <= len(found["ops"]) <= 90


def test_the_page(tmp_path):
    times = {
        "limit": (1e-3, 2e-3),
        "ours": (1.2e-3, 9e-3),
        "PEFT, bf16 adapters": (1.5e-3, 3e-3),
        "eager": (1e-3, 2e-3),
    }
    entries = [entry(name, device, wall_seconds=wall) for name, (device, wall) in times.items()]
    (tmp_path / "ops.json").write_text(json.dumps(content(entries, device="NVIDIA H200")))
    (tmp_path / "product.log").write_text("train, killed 3.0 s\nmerge 1.0 s WRONG: no weight differs\n")
    done = [
        Done("build", "passed", 41.2, 60, 0, ""),
        Done("tests", "failed", 70.0, 82, 1, "", "260 passed, 2 failed"),
        Done("product", "failed", 30.0, 48, 1, ""),
        Done("step", "cut", 22.0, 22, None, ""),
    ]
    found = times_of(tmp_path, began=0.0)
    text = page(done, found, tmp_path)
    lines = {line.split()[0]: " ".join(line.split()) for line in text.splitlines() if line.split()}
    assert lines["build"] == "build passed, 41.2 s" and lines["step"] == "step CUT after 22.0 s"
    assert lines["tests"] == "tests FAILED (1) after 70.0 s, 260 passed, 2 failed"
    assert "WRONG: no weight differs" in lines["merge"]
    expected = "lora_linear nllb-600m r=16 ours 1.20 ms 9.00 ms 1.20 4.50 PEFT, bf16 adapters 0.80 3.00"
    assert lines["lora_linear"] == expected
    assert len(text.splitlines()) < 60
    (numbers,) = found
    assert (numbers["/ it"], numbers["wall / it"]) == (pytest.approx(0.8), pytest.approx(3.0))
    assert times_of(tmp_path, began=time.time() + 60) == []  # of another run


def test_nothing_is_left_running_when_the_driver_is_ended(tmp_path):
    """By a signal that asks for it: the part and its processes go with it."""
    script = "import sys, pathlib\nfrom bench import gpu\n"
    script += "gpu.parts = lambda text: [gpu.Part('hangs', 60, ('-c', sys.argv[1]))]\n"
    script += "gpu.device_name, gpu.ROOT = (lambda: 'card'), pathlib.Path(sys.argv[2])\nsys.exit(gpu.main([]))"
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    driver = subprocess.Popen([sys.executable, "-c", script, HANGS, str(tmp_path)], env=environment)
    log = tmp_path / "bench" / "results" / "card" / "part" / "hangs.log"
    end = time.monotonic() + 60
    while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < end:
        time.sleep(0.05)
    driver.terminate()
    assert driver.wait(30) == 143
    time.sleep(0.2)
    assert not alive(int(log.read_text().split()[-1]))


def test_a_machine_without_a_card_is_told(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu"], cwd=CHECKOUT,
        capture_output=True, text=True, env={**os.environ, "PATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("make gpu: nvidia-smi names no card")
