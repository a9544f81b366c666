"""Runs of `petl-mt` in processes of their own, and what is known of each."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from petl_kernels.files import atomic_write
from petl_kernels.units import format_size


@dataclass
class Run:
    """Describes one run of the program, and what it must have done. wrong: what it did not, in one line.

    code: the exit code, negative for a signal, None where it was ended after its limit. peak: the most bytes in
    tensors, taken: those that the allocator held for them, both with CUDA's own, which a plan counts, too; on the CPU
    they are the same.
    """

    name: str
    command: str
    code: int | None = None
    seconds: float = 0.0
    peak: int = 0
    taken: int = 0
    wrong: str = ""
    figures: dict = field(default_factory=dict)


class Program:
    """Runs `petl-mt` in ``folder``, and writes what is known of all runs to ``results`` after each."""

    def __init__(self, folder: Path, results: Path, about: dict, limit: float):
        self.folder, self.results, self.about, self.limit = folder, results, about, limit
        self.runs: list[Run] = []

    def __call__(
        self,
        name: str,
        words: Sequence[str],
        check: Callable[[Run], str] = lambda run: "",
        code: int = 0,
        given: Path | None = None,
        until: Callable[[], bool] | None = None,
    ) -> Run:
        """Runs ``petl-mt words``, killed as soon as ``until()``.

        check: what is wrong with a run that ended with ``code``. given: the file that it gets as standard input.
        """
        run = Run(name, shlex.join(["petl-mt", *words]))
        self.runs.append(run)
        began = time.perf_counter()
        run.code, run.peak, run.taken = self._in_a_process(list(words), given, until)
        run.seconds = round(time.perf_counter() - began, 2)
        run.wrong = self._why(run) if run.code != code else self._checked(check, run)
        self.save()
        print(line_of(asdict(run)), flush=True)
        return run

    def said(self, index: int = -1) -> str:
        """Returns the standard error of a run."""
        number = range(len(self.runs))[index]
        return (self.folder / f"{number}.err").read_text(encoding="utf-8", errors="replace")

    def printed(self) -> bytes:
        """Returns the standard output of the last run."""
        return (self.folder / f"{len(self.runs) - 1}.out").read_bytes()

    def save(self) -> None:
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.results) as file:
            json.dump(self.about | {"runs": [asdict(run) for run in self.runs]}, file, indent=1)
            file.write("\n")

    def _in_a_process(
        self, words: list[str], given: Path | None, until: Callable[[], bool] | None
    ) -> tuple[int | None, int, int]:
        """Returns (exit code, bytes in tensors, bytes taken)."""
        receiver, sender = context().Pipe(duplex=False)
        files = [
            str(given or os.devnull),
            *(str(self.folder / f"{len(self.runs) - 1}.{name}") for name in ("out", "err")),
        ]
        process = context().Process(target=_petl_mt, args=(words, files, sender))
        process.start()
        sender.close()
        end = time.monotonic() + self.limit
        try:
            while time.monotonic() < end:
                if until is not None and until():
                    process.kill()
                    process.join()
                    return process.exitcode, 0, 0
                if receiver.poll(0.01):
                    return receiver.recv()
            return None, 0, 0
        except EOFError:  # it ended without a word
            process.join()
            return process.exitcode, 0, 0
        finally:
            receiver.close()
            process.kill()
            process.join()

    def _why(self, run: Run) -> str:
        if run.code is None:
            return f"not done after {self.limit:.0f} s"
        lines = [line for line in self.said().splitlines() if line.strip()]
        return f"exit code {run.code}: {lines[-1] if lines else 'nothing said'}"

    @staticmethod
    def _checked(check: Callable[[Run], str], run: Run) -> str:
        try:
            return check(run)
        except (OSError, ValueError, KeyError, IndexError) as error:
            return f"{type(error).__name__}: {error}"


@functools.cache
def context():
    """Returns the context of processes: they fork from one that has made the slow imports and not touched CUDA."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # or asking for a card would initialise CUDA there
    made = multiprocessing.get_context("forkserver")
    model = [f"transformers.models.m2m_100.{name}_m2m_100" for name in ("modeling", "tokenization")]
    made.set_forkserver_preload([*model, "petl_mt.cli", "petl_mt.train", "sacrebleu"])
    return made


def _petl_mt(words: list[str], files: list[str], sender) -> None:
    """Runs the program with its three streams in files; sends its exit code and the bytes that it took."""
    for number, (path, flags) in enumerate(zip(files, (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2), strict=True)):
        os.dup2(os.open(path, flags, 0o644), number)
    sys.stdin, sys.stdout, sys.stderr = (open(n, mode) for n, mode in enumerate(("r", "w", "w")))
    from petl_mt.cli import main

    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send((code, *_peaks()))


def _peaks() -> tuple[int, int]:
    """Returns ``peak`` and ``taken`` of a ``Run``."""
    from petl_kernels.step import cap

    if not torch.cuda.is_available():
        peak = cap.peak(torch.device("cpu"))
        return peak, peak
    device = torch.device("cuda", torch.cuda.current_device())
    context = cap.context_bytes(device)
    return torch.cuda.max_memory_allocated(device) + context, torch.cuda.max_memory_reserved(device) + context


def line_of(run: dict) -> str:
    """Returns a run in a line: its name, seconds, figures, and what is wrong with it."""
    figures = dict(run["figures"])
    words = [f"{run['name']:22s} {run['seconds']:6.1f} s "]
    if (update := figures.get("seconds an update")) is not None:
        words += [f"{1e3 * update:8.1f} ms an update (the first {figures['first update']:.1f} s),"]
        words += [f"{figures['target tokens a second']:,} target tokens/s,"]
        words += [f"peak {format_size(run['peak'])}, planned {format_size(figures['planned peak'])},"]
        words += [f"held {format_size(run['taken'])} of {format_size(figures['memory'])},"]
        words += [f"{figures['micro-batches']} micro-batches, tiers {figures['tiers']},"]
        words += [f"{figures['streamed layers']} layers streamed"]
    words += [figures[name] for name in figures if name.startswith(("BLEU", "chrF"))]
    return " ".join([*words, f"WRONG: {run['wrong']}" if run["wrong"] else ""]).rstrip()
