"""Training under caps of memory: what our plan makes of each, beside PEFT with its fastest setting that fits.

    python bench/step/bench_caps.py [--all] [--device cuda]      every trial, a table, results/<device>/caps.json
    pytest bench/step/bench_caps.py ...                          the same in the bench, within SECONDS

Both sides do the same updates on the same batches (``trial``). PEFT's settings are searched (``peft_settings``): in
short form within the bench, the whole grid with --all. On a CPU the model has a quarter of nllb-600m's layers and words
in its full widths, caps are small enough for that, and updates have 256 tokens a side.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cpuinfo
import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import peft_settings  # noqa: E402
import trial as trials  # noqa: E402
from peft_settings import Setting, Tried  # noqa: E402
from random_model import write_checkpoint  # noqa: E402
from sentences import Data  # noqa: E402
from shapes import MODELS, m2m_config  # noqa: E402
from trial import Result, Trial  # noqa: E402

from petl_kernels.files import atomic_write  # noqa: E402
from petl_kernels.units import format_size, parse_size  # noqa: E402

LAYERS, WIDTH, FFN, HEADS, WORDS = MODELS["nllb-600m"]
SHAPES = {
    "cpu": {"nllb-600m, a quarter of its layers and words": (LAYERS // 4, WIDTH, FFN, HEADS, WORDS // 4)},
    "cuda": {name: MODELS[name] for name in ("nllb-3.3b", "nllb-600m", "nllb-1.3b")},
}
CAPS = {"cpu": ("320MiB", "160MiB", "512MiB"), "cuda": ("8GiB", "16GiB", "12GiB", "24GiB")}
# The cells that say most come first: time may run out.
CELLS = {device: [(shape, cap) for cap in CAPS[device] for shape in SHAPES[device]] for device in SHAPES}
DATA = {"cpu": Data(256, 64, updates=1), "cuda": Data(8192, 256, updates=4, multiple=8)}
ROUNDS = 3
SECONDS = {"cpu": 230, "cuda": 80}  # of all cells together within the bench; on CUDA a part of `make gpu-more`
LIMIT = 60  # of one trial within the bench
LIMIT_OF_ALL = 600
NO_TIME = "not tried: no time left"
OURS, QUANTIZED, PEFT = "ours", "ours, quantized", "PEFT, best"


@dataclass
class Side:
    """What one implementation came to in a cell. tried: every trial of a search, in order."""

    result: Result
    setting: str
    tried: list[dict] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return statistics.median(self.result.seconds) if self.result.seconds else math.nan

    def rates(self) -> dict[str, float]:
        result = self.result
        if result.failure:
            return {}
        both = result.source_tokens + result.target_tokens
        return {
            "target_tokens_per_second": result.target_tokens / self.seconds,
            "tokens_per_second": both / self.seconds,
        }


class Study:
    """Runs trials when their results are asked for, and knows what a result says about other caps.

    until: of ``time.monotonic``; no trial starts after it, and what was not tried says so. results: the file that has
    what is known, written anew after each side of a cell.
    """

    def __init__(
        self,
        device: str,
        folder: Path,
        until: float,
        limit: float,
        every: bool,
        results: Path | None = None,
        run: Callable = trials.run,
    ):
        self.device, self.folder, self.until, self.limit, self.every = device, folder, until, limit, every
        self.results, self.run = results, run
        self.sides: dict[tuple[str, str, str], Side] = {}
        self._known: dict[tuple, list[tuple[int, Result]]] = {}

    def cell(self, shape: str, cap: str, peers: bool = True) -> list[Side]:
        """Ours and, with ``peers``, PEFT's: ours come first, for a search may take all the time there is."""
        return [self.side(shape, cap, name) for name in (OURS, QUANTIZED, PEFT) if peers or name != PEFT]

    def side(self, shape: str, cap: str, implementation: str) -> Side:
        key = shape, cap, implementation
        if key not in self.sides:
            self.sides[key] = self._peft(shape, cap) if implementation == PEFT else self._ours(*key)
            if self.results is not None:
                self.save(self.results)
        return self.sides[key]

    def _ours(self, shape: str, cap: str, implementation: str) -> Side:
        allow = ("quantized",) if implementation == QUANTIZED else ()
        result = self._trial(shape, parse_size(cap), allow=allow)
        return Side(result, result.setting)

    def _peft(self, shape: str, cap: str) -> Side:
        data, memory = DATA[self.device], parse_size(cap)

        def run(setting: Setting, micro_tokens: int) -> Result:
            known = self._known.setdefault((shape, setting, micro_tokens), [])
            result = next((found for before, found in known if tells(before, found, memory)), None)
            if result is None:
                result = self._trial(shape, memory, setting=setting, micro_tokens=micro_tokens)
                known.append((memory, result))
            return result

        sizes = peft_settings.halves(data.batch_tokens, data.longest)
        compiled = self.device == "cuda"  # which takes a CPU longer than all else; it is in the whole grid
        tried = peft_settings.search(run, sizes, self.every, compiled)
        lines = [_line(one) for one in tried]
        best = peft_settings.best(tried)
        if best is None:
            return Side(Result(peft_settings.why_none(tried)), "", lines)
        return Side(best.result, f"{best.setting}, {best.micro_tokens} tokens at once", lines)

    def _trial(self, shape: str, memory: int, **options) -> Result:
        left = self.until - time.monotonic()
        if left < 5:
            return Result(NO_TIME)
        trial = Trial(
            shape=SHAPES[self.device][shape],
            checkpoint=str(self._checkpoint(shape)),
            memory=memory,
            device=self.device,
            data=DATA[self.device],
            rounds=ROUNDS,
            taken=taken(self.device),
            **options,
        )
        result = self.run(trial, min(self.limit, left))
        return Result(NO_TIME) if result.late and left < self.limit else result

    def _checkpoint(self, shape: str) -> Path:
        path = self.folder / shape.partition(",")[0]
        if not path.is_dir():
            write_checkpoint(m2m_config(*SHAPES[self.device][shape]), path)
        return path

    def save(self, path: Path) -> None:
        cells = []
        for (shape, cap, implementation), side in self.sides.items():
            cell = {"shape": shape, "cap": cap, "implementation": implementation, "setting": side.setting}
            cells.append(cell | dataclasses.asdict(side.result) | side.rates() | {"tried": side.tried})
        about = {"device": path.parent.name, "cpu": cpuinfo.get_cpu_info().get("brand_raw"), "cores": os.cpu_count()}
        about |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit()}
        about |= {"whole_grid": self.every, "data": dataclasses.asdict(DATA[self.device]), "rounds": ROUNDS}
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            json.dump(about | {"cells": cells}, file, indent=1, default=str)
            file.write("\n")


def tells(before: int, found: Result, memory: int) -> bool:
    """Whether what a trial under ``before`` bytes came to is also what one under ``memory`` bytes would come to."""
    if found.out_of_memory:
        return memory <= before
    if found.failure:
        return found.failure != NO_TIME
    return memory >= min(before, found.most)


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def taken(device: str) -> int:
    """Bytes of the card that this very process holds, if it uses it at all."""
    if device != "cuda" or not torch.cuda.is_initialized():
        return 0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def _line(tried: Tried) -> dict:
    result = tried.result
    line = {"setting": str(tried.setting), "micro_tokens": tried.micro_tokens}
    if result.failure:
        return line | {"failure": result.failure}
    return line | {"seconds": result.seconds, "least": result.least, "most": result.most}


def work(device: str, shape: str, result: Result) -> tuple[int, int]:
    """(operations, bytes) of a round that no implementation can avoid: the frozen products, forward and dX.

    Multiplications of a token: encoder 4·d² + 2·d·f a layer, decoder 6·d² + 2·d·f and, for a source token, 2·d² more,
    the vocabulary d·V. Two operations each, twice. Bytes: each of those weights read twice an update, bf16.
    """
    layers, d, ffn, _, words = SHAPES[device][shape]
    source = layers * (4 * d * d + 2 * d * ffn + 2 * d * d)
    target = layers * (6 * d * d + 2 * d * ffn) + d * words
    flops = 4 * (source * result.source_tokens + target * result.target_tokens)
    return flops, DATA[device].updates * 2 * 2 * (source + target)


# ---- in the bench


class Clock:
    """A clock that goes on by what the processes of the trials measured."""

    now = 0.0

    @classmethod
    def read(cls) -> float:
        return cls.now

    @classmethod
    def advance(cls, seconds: list[float]) -> None:
        cls.now += seconds.pop(0)


@pytest.fixture(scope="module")
def study(request):
    device = request.config.getoption("--device")
    whole = results_of(device)  # some cells of the grid, maybe: they replace nothing
    results = whole.parent / "part" / whole.name if request.config.getoption("--peers") else None
    with tempfile.TemporaryDirectory() as folder:
        yield Study(device, Path(folder), time.monotonic() + SECONDS[device], LIMIT, every=False, results=results)


def pytest_generate_tests(metafunc) -> None:
    device = metafunc.config.getoption("--device")
    peer = pytest.mark.peer
    cases = [
        pytest.param(shape, cap, name, marks=peer if name == PEFT else (), id=f"{shape.partition(',')[0]}-{cap}-{name}")
        for shape, cap in CELLS[device]
        for name in (OURS, QUANTIZED, PEFT)
    ]
    metafunc.parametrize(("shape", "cap", "implementation"), cases)


@pytest.mark.benchmark(timer=Clock.read)
def test_cap(benchmark, request, study, shape, cap, implementation):
    study.cell(shape, cap, peers=request.config.getoption("--peers"))
    side = study.side(shape, cap, implementation)
    if side.result.failure:
        pytest.skip(f"{implementation}: {side.result.failure}")
    data = DATA[study.device]
    flops, moved = work(study.device, shape, side.result)
    benchmark.group = f"step-cap {shape} {cap} {data.batch_tokens} tokens bfloat16"
    benchmark.extra_info.update(
        op="step-cap",
        shape=shape,
        dtype="bfloat16",
        tokens=data.batch_tokens,
        case=cap,
        implementation=implementation,
        flops=flops,
        bytes=moved,
        launches=None,
        peak_bytes=side.result.least,
        setting=side.setting,
        **side.rates(),
        **beside_peft(study, shape, cap, side),
    )
    seconds = list(side.result.seconds)
    benchmark.pedantic(Clock.advance, args=(seconds,), rounds=len(seconds), iterations=1)


def beside_peft(study: Study, shape: str, cap: str, side: Side) -> dict:
    """How many times PEFT's tokens a second, or why PEFT has none; empty where PEFT was not asked for."""
    peft = study.sides.get((shape, cap, PEFT))
    if peft is None or peft is side:
        return {}
    if peft.result.failure:
        return {"peft": peft.result.failure}
    return {"peft": peft.setting, "ratio": peft.seconds / side.seconds}


def results_of(device: str) -> Path:
    name = torch.cuda.get_device_name().replace(" ", "-").lower() if device == "cuda" else "cpu"
    return Path(__file__).parents[1] / "results" / name / "caps.json"


# ---- as a program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every setting of PEFT, no limit on the whole")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    until = math.inf if arguments.all else time.monotonic() + SECONDS[arguments.device]
    limit = LIMIT_OF_ALL if arguments.all else LIMIT
    with tempfile.TemporaryDirectory() as folder:
        study = Study(arguments.device, Path(folder), until, limit, arguments.all, results_of(arguments.device))
        for shape, cap in CELLS[arguments.device]:
            print(f"{shape}, {cap}, {DATA[arguments.device].batch_tokens} tokens a side", flush=True)
            for name, side in zip((OURS, QUANTIZED, PEFT), study.cell(shape, cap), strict=True):
                print(f"  {name:16s} {table_row(study, shape, cap, side)}", flush=True)


def table_row(study: Study, shape: str, cap: str, side: Side) -> str:
    if side.result.failure:
        return side.result.failure
    rates, ratio = side.rates(), beside_peft(study, shape, cap, side).get("ratio")
    beside = f"{ratio:6.2f} x" if ratio else " " * 8
    return (
        f"{rates['target_tokens_per_second']:9.1f} target, {rates['tokens_per_second']:9.1f} all tokens/s {beside} "
        f"{format_size(side.result.least):>9s}  {side.setting}"
    )


if __name__ == "__main__":
    main()
