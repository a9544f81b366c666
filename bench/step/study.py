"""Trials of both sides under caps of memory, each run once, when its result is needed."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.predict import counts
from bench.random_model import write_checkpoint
from bench.run.machine import described
from bench.shapes import MODELS, m2m_config
from bench.step import peft_settings
from bench.step import trial as trials
from bench.step.peft_settings import Setting, Tried
from bench.step.sentences import Data
from bench.step.task import Result, Trial
from bench.where import commit
from petl_kernels.files import atomic_write
from petl_kernels.units import parse_size

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
NO_TIME = "not tried: no time left"
OURS, QUANTIZED, PEFT = "ours", "ours, quantized", "PEFT, best"


@dataclass
class Side:
    """Holds what one implementation came to in a cell. tried: every trial of a search, in order."""

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
    """Runs trials when their results are needed, and uses a result under other caps where it holds there, too.

    until: seconds of ``time.monotonic`` after which no trial starts; the result of one that did not is NO_TIME.
    results: a file of all results, written anew after each side of a cell.
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
        """Returns ours and, with ``peers``, PEFT's: ours come first, for a search may take all the time there is."""
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
        machine = described(self.device)
        about = {"device": path.parent.name, "cpu": machine["cpu_name"], "commit": commit()}
        about |= {name: machine[name] for name in ("cores", "threads", "torch")}
        about |= {"whole_grid": self.every, "data": dataclasses.asdict(DATA[self.device]), "rounds": ROUNDS}
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            json.dump(about | {"cells": cells}, file, indent=1, default=str)
            file.write("\n")


def tells(before: int, found: Result, memory: int) -> bool:
    """Returns whether the result of a trial under ``before`` bytes is also that of one under ``memory`` bytes."""
    if found.out_of_memory:
        return memory <= before
    if found.failure:
        return found.failure != NO_TIME
    return memory >= min(before, found.most)


def taken(device: str) -> int:
    """Returns the bytes of the card that this very process holds, if it uses it at all."""
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


def work(device: str, shape: str, result: Result) -> counts.Counts:
    """Returns what no implementation can avoid in a round: the frozen products' work, their weights in each update."""
    layers, d, ffn, _, words = SHAPES[device][shape]
    size = torch.bfloat16.itemsize
    counted = counts.step(layers, result.source_tokens, result.target_tokens, d, ffn, words, size)
    return dataclasses.replace(counted, bytes=DATA[device].updates * counted.bytes)


def beside_peft(study: Study, shape: str, cap: str, side: Side) -> dict:
    """Returns how many times PEFT's tokens a second, or why PEFT has none; empty without --peers."""
    peft = study.sides.get((shape, cap, PEFT))
    if peft is None or peft is side:
        return {}
    if peft.result.failure:
        return {"peft": peft.result.failure}
    return {"peft": peft.setting, "ratio": peft.seconds / side.seconds}
