"""Runs on a card for six minutes, `make gpu`: one part after the other, each with a limit of its own.

    python -m bench.gpu [NAME ...] [--more] [--text SRC TGT --languages en-sw]

A part that is not done in its time is ended, with all its processes, and the next one begins. What a part leaves of its
time is given to the next one. Logs, results and what became of each part lie in results/<device>/part/ before the next
begins; a page of figures comes last. NAMEs choose parts. --more runs what takes longer, `make gpu-more`. The exit code
is 1 where a part failed or was cut.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.where import ROOT, commit, folder_name

GRACE = 4  # seconds of a limit in which a part that was interrupted may say where it was
TAIL = 12  # lines of the log of a part that did not pass

# Ops at two widths, NLLB-600M's and 3.3B's: LoRA, loss, FFN, attention, adapter, quantized. One layer a side.
OPS = (
    "(nllb-600m or nllb-3.3b) and not float32 and not torch.compile and ("
    "test_lora_linear and not 8- and not 64- or test_linear_cross_entropy and 0.1 or test_frozen_ffn and relu "
    "or test_attention and 0.1 or test_bottleneck_adapter and bwd and not 1024 and not 128- "
    "or test_product and batch and not ffn)"
)
# The cases of single ops that docs/PERFORMANCE.md has targets for, each beside its limit and its peers.
ASKED = (
    "not float32 and not torch.compile and (test_lora_border "
    "or (nllb-600m or nllb-3.3b or wide) and test_lora_linear and not 8- and not 64- and not q/k/v "
    "or nllb-600m and (test_linear_cross_entropy and 0.1 or test_frozen_ffn and not recomputing and not gated "
    "or test_attention and 0.1 or test_bottleneck_adapter or test_norm and layer_norm and trained "
    "or test_product and not ffn- or test_conversion))"
)
LAYERS = "nllb-600m and LoRA and (limit or eager or ours] or PEFT)"
BENCH = ("-m", "petl_mt.cli", "bench")


@dataclass(frozen=True)
class Part:
    """Stands for ``python words`` in at most ``limit`` seconds."""

    name: str
    limit: float
    words: tuple[str, ...]


@dataclass
class Done:
    """Describes what became of a part. state: "passed", "failed" or "cut"; said: a summary of its log."""

    name: str
    state: str
    seconds: float
    limit: float
    code: int | None
    command: str
    said: str = ""


def parts(text: Sequence[str] = ()) -> list[Part]:
    """Returns the parts of `make gpu`, 350 s in all. text: flags of bench.product."""
    workers, tests = _workers(), ("-m", "pytest", "-v", "--tb=short")
    product = ("-m", "bench.product", *text)
    compiled = (*tests, "--benchmark-disable", "-o", "python_files=bench_*.py", "--device", "cuda", *workers)
    found = [
        Part("build", 58, ("setup.py", "--quiet", "build_ext", "--inplace")),
        Part("tests", 78, (*tests, "-m", "gpu and not slow", *workers, "tests")),
        # Triton compiles a kernel where it is first called: side by side before any is timed
        Part("compile", 24, (*compiled, "-k", f"ours and ({OPS} or {LAYERS})", "bench/ops", "bench/layers")),
        Part("product", 46, (*product, "--limit", "40", "parent")),
        Part("nllb-600m", 62, (*product, "--limit", "40", "nllb-600m")),
        Part("step", 28, (*BENCH, "step", "--peers", "--device", "cuda", "--only", "test_step and not tier")),
        Part("ops", 38, (*BENCH, "ops", "--peers", "--device", "cuda", "--only", OPS)),
        Part("layers", 16, (*BENCH, "layers", "--peers", "--device", "cuda", "--only", LAYERS)),
    ]
    return found if workers else [part for part in found if part.name != "compile"]


def more_parts() -> list[Part]:
    """Returns the parts of `make gpu-more`: what a card is for once the parts of `make gpu` pass."""
    tests, budget = ("-m", "pytest", "-v", "--tb=short", *_workers()), ("-m", "bench.budget")
    return [
        Part("asked", 240, (*BENCH, "ops", "--peers", "--device", "cuda", "--only", ASKED)),
        Part("slow-tests", 300, (*tests, "-m", "gpu and slow", "tests")),
        Part("ahead-of-time", 200, (*tests, "tests/backends/test_triton_aot.py")),
        Part("doctor", 60, ("-m", "petl_mt.cli", "doctor")),
        Part("caps", 200, (*BENCH, "step", "--peers", "--device", "cuda")),
        Part("contest", 500, ("-m", "bench.candidates.contest")),
        Part("budget-3.3b", 300, (*budget, "nllb-3.3b", "4GiB", "--allow", "quantized")),
        Part("budget-600m", 120, (*budget, "nllb-600m", "1.5GiB")),
        Part("all-layers", 900, (*BENCH, "layers", "--peers", "--device", "cuda")),
        Part("all-ops", 2400, (*BENCH, "ops", "--peers", "--device", "cuda")),
    ]


def _workers() -> tuple[str, ...]:
    found = importlib.util.find_spec("xdist") is not None
    return ("-n", str(min(14, os.cpu_count() or 1))) if found else ()


def run_all(chosen: Sequence[Part], folder: Path) -> list[Done]:
    """Run the parts; ``folder`` gets a log of each, gpu.json with what became of them, anew after each, and page.txt.

    The page is printed, too; gpu.json has its times as numbers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done: list[Done] = []
    began = time.time()
    saved = 0.0
    for part in chosen:
        limit = part.limit + saved
        print(f"{part.name}: at most {limit:.0f} s: {shlex.join(part.words)}", flush=True)
        done.append(run(part, limit, folder / f"{part.name}.log"))
        saved = max(0.0, limit - done[-1].seconds)
        _write(folder / "gpu.json", done, [])
        print(f"{part.name}: {_sentence(done[-1])}", flush=True)
        if done[-1].state != "passed":
            print(_tail(folder / f"{part.name}.log"), flush=True)
    times = times_of(folder, began)
    _write(folder / "gpu.json", done, times)
    text = page(done, times, folder)
    (folder / "page.txt").write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)
    return done


def run(part: Part, limit: float, log: Path) -> Done:
    """Run one part in a process group of its own, of which nothing is left afterwards."""
    began, code = time.monotonic(), None
    with open(log, "wb") as file:
        command = [sys.executable, *part.words]
        options = {"stdout": file, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "cwd": ROOT}
        process = subprocess.Popen(command, env=_environment(), start_new_session=True, **options)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(max(0.0, limit - GRACE))
            if code is None:
                os.killpg(process.pid, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(min(GRACE, limit))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    state = "cut" if code is None else "failed" if code else "passed"
    seconds = round(time.monotonic() - began, 1)
    return Done(part.name, state, seconds, round(limit, 1), code, shlex.join(part.words), _said(log))


def _environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def _said(log: Path) -> str:
    """Returns how many tests passed and failed; a run that was killed has no summary, but its lines."""
    words = "PASSED|FAILED|ERROR"  # before their percentage, or with xdist behind it
    found = ["".join(pair) for pair in re.findall(rf"%\] ({words}) |:.* ({words}) +\[ *\d+%", _text(log))]
    counts = {word.lower(): found.count(word) for word in ("PASSED", "FAILED", "ERROR")}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count)


def _sentence(done: Done) -> str:
    how = {"cut": f"CUT after {done.seconds:.1f} s", "failed": f"FAILED ({done.code}) after {done.seconds:.1f} s"}
    return ", ".join(filter(None, [how.get(done.state, f"passed, {done.seconds:.1f} s"), done.said]))


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""


def _tail(log: Path) -> str:
    return "\n".join("    " + line[:200] for line in _text(log).splitlines()[-TAIL:])


def _write(path: Path, done: Sequence[Done], times: Sequence[dict]) -> None:
    content = {"commit": commit(), "parts": [asdict(one) for one in done], "times": list(times)}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


# ---- the page


def times_of(folder: Path, began: float) -> list[dict]:
    """Returns for each of ours that was timed: seconds by device and wall, over the limit and over its peer.

    The peer is PEFT with adapters in bf16 where it was timed, else the fastest other. began: seconds since 1970;
    a result file that is older is of another run.
    """
    files = [place / f"{name}.json" for name in ("step", "layers", "ops") for place in (folder, folder.parent / "raw")]
    fresh = [path for path in files if path.exists() and path.stat().st_mtime >= began]
    if not fresh:
        return []  # without an import that fails where the build did
    from bench.show.measurements import by_op, limit_of
    from bench.show.raw import load

    found = []
    for path in fresh:
        for op, cases in by_op(load(path).measurements).items():
            for case in cases:
                peers = sorted((one for one in case if one.kind == "peer"), key=lambda one: one.median)
                bf16 = [one for one in peers if one.implementation == "PEFT, bf16 adapters"]
                other, limit = next(iter(bf16 + peers), None), limit_of(case)
                for one in (one for one in case if one.is_ours):
                    about = {"case": f"{op} {one.shape} {one.case}", "ours": one.implementation}
                    times = {"device": one.median, "wall": one.wall, **_over(one, limit, "limit")}
                    found.append(about | times | {"beside": other and other.implementation} | _over(one, other, "it"))
    return found


def _over(one, other, name: str) -> dict[str, float | None]:
    """Returns ratios to ``other``, of the device's times and of the wall's."""
    device = one.median / other.median if other else None
    return {f"/ {name}": device, f"wall / {name}": one.wall / other.wall if other and one.wall and other.wall else None}


def page(done: Sequence[Done], times: Sequence[dict], folder: Path) -> str:
    """Returns what became of the parts, what the product did, and ours beside the others, by device and by wall."""
    lines = ["", "---- parts", *(f"{one.name:14s} {_sentence(one)}" for one in done)]
    for one in done:
        if one.name in ("product", "nllb-600m"):
            lines += ["", f"---- {one.name}", *_text(folder / f"{one.name}.log").splitlines()[-TAIL:]]
    return "\n".join(lines + (["", _table(times)] if times else []))


def _table(times: Sequence[dict]) -> str:
    from bench.show.figures import digits, seconds
    from bench.show.table import render

    def cell(name: str, value) -> str:
        if value is None or isinstance(value, str):
            return value or ""
        return seconds(value) if name in ("device", "wall") else digits(value)

    rows = [[cell(name, value) for name, value in one.items()] for one in times]
    return render(
        "---- times; / is ours over another's", list(times[0]), rows, terminal=False, width=0, left=2
    ).rstrip()


def device_name() -> str:
    """Returns the card's name as PyTorch spells it, without a context of this process on the card."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        lines = []
    if not lines:
        raise SystemExit("make gpu: nvidia-smi names no card; expected a machine with a CUDA device")
    return folder_name(lines[0])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="parts to run (default: all)")
    parser.add_argument("--more", action="store_true", help="what takes longer than six minutes")
    parser.add_argument("--text", nargs=2, metavar=("SRC", "TGT"), help="aligned files for the product, to train on")
    parser.add_argument("--languages", default="en-fi", metavar="SRC-TGT", help="their languages (default: en-fi)")
    arguments = parser.parse_args(argv)
    text = ["--languages", arguments.languages]
    text += ["--text", *map(os.path.abspath, arguments.text)] if arguments.text else []
    known = more_parts() if arguments.more else parts(text)
    wrong = set(arguments.names) - {part.name for part in known}
    if wrong:
        parser.error(f"{min(wrong)}: expected {', '.join(part.name for part in known)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part does not live on without its driver
    chosen = [part for part in known if not arguments.names or part.name in arguments.names]
    folder = ROOT / "bench" / "results" / device_name() / "part"
    return 1 if any(one.state != "passed" for one in run_all(chosen, folder)) else 0


if __name__ == "__main__":
    sys.exit(main())
