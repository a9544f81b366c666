"""The program, end to end, as a user runs it under a budget of memory: whether it works, how fast, and what it took.

    python bench/product.py parent [--text SRC TGT --languages en-sw]    the demo's parent: train, killed by SIGKILL a
        few updates after a checkpoint, resumed, translate, score, merge
    python bench/product.py nllb-600m    that shape with random weights under 8 GiB and 4 GiB, on CUDA with graphs, too

bf16 on CUDA, fp32 on a CPU. Each run is `petl-mt`'s own main in a process of its own, forked from one that has imported
what is slow to import. Each is a line on the terminal, and in results/<device>/part/product-<what>.json as soon as it
has ended. The exit code is 1 where one of them did not do what it must. Without --text the text is the demo's; where
Babel is missing, which writes that, it is words of the parent's vocabulary in any order.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from gpu import commit, device_name
from petl_mt.demo.make_parent import parent_folder
from random_model import write_checkpoint
from shapes import MODELS, m2m_config

from petl_kernels.errors import InputError
from petl_kernels.files import atomic_write
from petl_kernels.units import format_size

RESULTS = Path(__file__).parent / "results"
TOKENIZER = ("sentencepiece.bpe.model", "vocab.json", "tokenizer_config.json")
NEAR = 1e-3  # relative: losses of the same updates before and after a kill; the CPU's are the same to the bit


@dataclass(frozen=True)
class Text:
    """Holds files of lines that belong together; name: what they are."""

    name: str
    languages: tuple[str, str]
    train: tuple[Path, Path]
    test: tuple[Path, Path]

    def flags(self, files: tuple[Path, Path]) -> list[str]:
        languages = ["--src-lang", self.languages[0], "--tgt-lang", self.languages[1]]
        return ["--train", *map(str, files), *languages]


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
    sys.stdout.flush(), sys.stderr.flush()
    sender.send((code, *_peaks()))


def _peaks() -> tuple[int, int]:
    """Returns ``peak`` and ``taken`` of a ``Run``."""
    from petl_kernels.step import cap

    if not torch.cuda.is_available():
        return (cap.peak(torch.device("cpu")),) * 2
    device = torch.device("cuda", torch.cuda.current_device())
    context = cap.context_bytes(device)
    return torch.cuda.max_memory_allocated(device) + context, torch.cuda.max_memory_reserved(device) + context


# ---- the demo's parent, from the text to a merged model


def whole_way(program: Program, model: Path, text: Text, memory: str, steps: int, flags: Sequence[str]) -> None:
    """Train with a checkpoint after each quarter, kill three updates behind one, resume, translate, score, merge."""
    out, every = program.folder / "run", max(1, steps // 4)
    train = ["train", "--model", str(model), *text.flags(text.train), "--method", "lora", "--method-arg", "rank=8"]
    train += ["--valid", *map(str, text.test), "--memory", memory, "--steps", str(steps)]
    train += ["--eval-every", str(every), "--out", str(out), *flags]
    kill = functools.partial(_far_enough, out, every + min(3, every - 1))
    program("train, killed", train, code=-signal.SIGKILL, until=kill)
    before = losses(out)
    program("train, resumed", ["train", "--resume", "--out", str(out)], functools.partial(_resumed, out, before, steps))
    lines = text.test[0].read_text(encoding="utf-8").splitlines()
    program(
        "translate",
        ["translate", "--run", str(out)],
        lambda run: _lines(program.printed().decode().splitlines(), lines),
        given=text.test[0],
    )
    hypotheses = program.folder / "hypotheses"
    program(
        "score",
        ["score", "--run", str(out), "--test", *map(str, text.test), "--hypotheses", str(hypotheses)],
        lambda run: _scored(run, program.printed().decode(), hypotheses, lines),
    )
    merged = program.folder / "merged"
    program("merge", ["merge", "--run", str(out), "--out", str(merged)], lambda run: _merged(merged, model))


def _far_enough(out: Path, step: int) -> bool:
    """Whether a checkpoint is there, and updates behind it are done."""
    return (out / "checkpoints" / "latest").exists() and max(losses(out), default=0) >= step


def losses(out: Path) -> dict[int, float]:
    """Returns the losses by step, as far as the run has written them down."""
    return {line["step"]: line["loss"] for line in metrics(out) if "loss" in line}


def metrics(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half written


def _resumed(out: Path, before: dict[int, float], steps: int, run: Run) -> str:
    """Checks that the updates that were lost with the killed run are the same when done again, and all are done."""
    after, result = losses(out), json.loads((out / "result.json").read_text(encoding="utf-8"))
    run.figures |= figures_of(out) | {"updates done again": max(before) - _first_new(out, before)}
    if sorted(after) != list(range(1, steps + 1)) or result["steps"] != steps:
        return f"updates 1 to {max(after, default=0)} are in metrics.jsonl; expected 1 to {steps}"
    other = [step for step in before if abs(after[step] - before[step]) > NEAR * abs(before[step])]
    if other:
        return f"loss of update {other[0]}: {before[other[0]]} before the kill, {after[other[0]]} after it"
    return _inside(run, out)


def _first_new(out: Path, before: dict[int, float]) -> int:
    """Returns the last update before the kill that the checkpoint had."""
    saved = [line["step"] for line in metrics(out) if "valid_loss" in line]
    return max((step for step in saved if step <= max(before)), default=0)


def _lines(found: list[str], sources: list[str]) -> str:
    filled = sum(map(bool, found))
    if len(found) != len(sources) or not filled:
        return f"{len(found)} lines, {filled} of them with words; expected one for each of {len(sources)}"
    return ""


def _scored(run: Run, printed: str, hypotheses: Path, sources: list[str]) -> str:
    figures = [line for line in printed.splitlines() if line.startswith(("BLEU", "chrF"))]
    run.figures |= {line.split()[0]: line for line in figures}
    if {line[:4] for line in figures} != {"BLEU", "chrF"}:
        return f"printed {printed[:80]!r}; expected BLEU and chrF"
    return _lines(hypotheses.read_text(encoding="utf-8").splitlines(), sources)


def _merged(folder: Path, model: Path) -> str:
    """Checks names of tensors as the base has them, other values in some, and none that is no number."""
    from safetensors.torch import load_file

    base, found = (
        {name: tensor for path in files.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for files in (model, folder)
    )
    if not set(found) >= set(base):
        return f"{min(set(base) - set(found))} is missing"
    if not all(bool(torch.isfinite(tensor).all()) for tensor in found.values()):
        return "a weight is no number"
    changed = [name for name in base if not torch.equal(base[name].float(), found[name].float())]
    return "" if changed else "no weight differs from the base's"


# ---- a published shape under budgets


def under_budgets(
    program: Program, model: Path, text: Text, budgets: Sequence[str], graphs: Sequence[bool], flags: Sequence[str]
) -> None:
    """Trains LoRA under each budget, with and without CUDA graphs: seconds an update, the peak against the plan's."""
    for memory in budgets:
        for captured in graphs:
            out = program.folder / f"{memory}{'-graphs' if captured else ''}"
            train = ["train", "--model", str(model), *text.flags(text.train), "--method", "lora", "--method-arg"]
            train += ["rank=16", "--memory", memory, "--out", str(out), *flags]
            program(
                memory + (", CUDA graphs" if captured else ""),
                train + ["--cuda-graphs" if captured else "--no-cuda-graphs"],
                lambda run, out=out: _budgeted(program, run, out),
            )


def _budgeted(program: Program, run: Run, out: Path) -> str:
    run.figures |= figures_of(out)
    for sign in ("was not enough for a step", "could not be captured", "cuda_graphs: steps run as they are"):
        if (found := [line for line in program.said().splitlines() if sign in line]) and found:
            return found[0]
    return _inside(run, out)


def figures_of(out: Path) -> dict:
    """Returns a finished run's seconds an update, those that its plan expected, and bytes that it planned with."""
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    seconds = [0.0] + [line["seconds"] for line in metrics(out) if "loss" in line]
    updates = [after - before for before, after in zip(seconds, seconds[1:], strict=False)]
    return {
        "seconds an update": round(statistics.median(updates[len(updates) // 2 :]), 4),
        "first update": round(updates[0], 2),
        "planned seconds": round(plan["seconds"], 4),
        "target tokens a second": round(result["target_tokens_per_second"]),
        "planned peak": plan["peak"],
        "memory": plan["memory"],
        "micro-batches": plan["micro_batches"],
        "tiers": f"{min(plan['tiers'])} to {max(plan['tiers'])}",
        "streamed layers": plan["streamed"],
    }


def _inside(run: Run, out: Path) -> str:
    memory = run.figures["memory"]
    return f"{format_size(run.taken)} taken; expected at most {format_size(memory)}" if run.taken > memory else ""


# ---- text


def make_text(folder: Path, files: Sequence[str] | None, languages: str, count: int, tests: int) -> Text:
    """Returns ``count`` lines to train on and ``tests`` others: of ``files`` (the last for the tests), or made."""
    source, _, target = languages.partition("-")
    if files:
        sides = [Path(path).read_text(encoding="utf-8").splitlines() for path in files]
        if len(sides[0]) != len(sides[1]) or len(sides[0]) <= tests:
            raise InputError(f"{files[0]} and {files[1]}: {len(sides[0])} and {len(sides[1])} lines; expected as many")
        return _written(folder, "the files given", (source, target), sides, count, tests)
    try:
        from petl_mt.demo.text import write_pair
    except ImportError:
        name = "words of the parent's vocabulary in any order (Babel, which writes the demo's text, is missing)"
        return _written(folder, name, (source, target), _drawn(count + tests), count, tests)
    made = write_pair(folder, languages, count, 0, tests, seed=1)
    return Text("the demo's", (source, target), made["train"], made["test"])


def _written(
    folder: Path, name: str, languages: tuple[str, str], sides: list[list[str]], count: int, tests: int
) -> Text:
    files = {}
    for split, part in {"train": slice(0, min(count, len(sides[0]) - tests)), "test": slice(-tests, None)}.items():
        files[split] = tuple(folder / f"{split}.{language}" for language in languages)
        for path, lines in zip(files[split], sides, strict=True):
            path.write_text("".join(line + "\n" for line in lines[part]), encoding="utf-8")
    return Text(name, languages, files["train"], files["test"])


def _drawn(count: int) -> list[list[str]]:
    """Draws two sides of as many words in each line: log-normal around 14, at most 40."""
    vocabulary = json.loads((parent_folder() / "vocab.json").read_text(encoding="utf-8"))
    words = sorted(piece[1:] for piece in vocabulary if piece.startswith("▁") and piece[1:].isalpha())
    draw = np.random.default_rng(0)
    lengths = np.clip(np.rint(draw.lognormal(np.log(14), 0.5, count)), 2, 40).astype(int)
    return [[" ".join(draw.choice(words, length)) for length in lengths] for _ in range(2)]


# ---- as a program


def checkpoint(folder: Path, shape: tuple[int, int, int, int, int], device: str) -> Path:
    """Writes a model of ``shape`` with random weights, and the demo parent's tokenizer, whose words are its first."""
    write_checkpoint(m2m_config(*shape), folder, device)
    for name in TOKENIZER:
        shutil.copy(parent_folder() / name, folder)
    return folder


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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("parent", "nllb-600m"))
    parser.add_argument("--text", nargs=2, metavar=("SRC", "TGT"))
    parser.add_argument("--languages", default="en-fi", metavar="SRC-TGT")
    parser.add_argument("--limit", type=float, default=60, metavar="SECONDS", help="of one run (default: 60)")
    arguments = parser.parse_args(argv)
    # not torch.cuda.get_device_name: this process must leave the card to the runs
    cuda = torch.cuda.device_count() > 0
    name = device_name() if cuda else "cpu"
    with tempfile.TemporaryDirectory(prefix="petl-product-") as folder:
        text = make_text(Path(folder), arguments.text, arguments.languages, 4000, 40)
        about = {"device": name, "commit": commit(), "torch": torch.__version__, "text": text.name}
        results = RESULTS / name / "part" / f"product-{arguments.what}.json"
        program = Program(Path(folder), results, about, arguments.limit)
        precision = ["--precision", "bf16" if cuda else "fp32"]  # many a CPU has no instructions for bf16
        if arguments.what == "parent":
            flags = ["--batch-tokens", "2048" if cuda else "512", "--max-length", "128", "--beam", "2", *precision]
            whole_way(program, parent_folder(), text, "1GiB", 40 if cuda else 16, flags)
        else:
            flags = ["--batch-tokens", "8192", "--max-length", "64", "--steps", "16", "--eval-every", "16", *precision]
            model = made_in_a_process(Path(folder) / "model", MODELS[arguments.what], "cuda" if cuda else "cpu")
            under_budgets(program, model, text, ("8GiB", "4GiB"), (False, True) if cuda else (False,), flags)
    return 1 if any(run.wrong for run in program.runs) else 0


def made_in_a_process(folder: Path, shape: tuple[int, int, int, int, int], device: str) -> Path:
    """Calls ``checkpoint`` in a process that gives the card back."""
    process = context().Process(target=checkpoint, args=(folder, shape, device))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{folder}: the process that makes the checkpoint ended with code {process.exitcode}")
    return folder


if __name__ == "__main__":
    sys.exit(main())
