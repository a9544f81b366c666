"""``petl-mt bench``: the benchmarks under ``bench/`` of a checkout, their report, and what changed between two runs."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from petl_kernels.errors import InputError

CHECKOUT = Path(__file__).resolve().parents[2]
FAILED, INTERRUPTED, WRONG_USAGE, NOTHING_MATCHES = 1, 2, 4, 5  # pytest's exit codes
EXAMPLES = """examples:
  petl-mt bench ops layers --peers
      medians into bench/results/<device>/medians.csv, every sample
      into raw/ there, and report.html
  petl-mt bench ops --only "lora_linear and bfloat16"
      into bench/results/<device>/part/
  petl-mt bench report [DIR]
      report.html again, from the medians.csv in DIR, or its JSON files
  petl-mt bench compare A.json B.json
      what became slower; exit code 1 when something of ours did. A
      medians.csv has the last runs of its device, medians.csv@COMMIT those
      of a commit
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog, parser.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    what = parser.add_argument_group("what")
    told = "folders of bench/ to time, or report [DIR], or compare A.json B.json (default: ops)"
    what.add_argument("words", nargs="*", default=["ops"], metavar="ops|layers|step|host|report|compare", help=told)
    what.add_argument("--only", metavar="NAMES", help="those whose names match, as pytest's -k has it (default: all)")
    how = parser.add_argument_group("how")
    how.add_argument("--peers", action="store_true", help="time other packages beside ours, too (default: off)")
    how.add_argument("--device", metavar="cpu|cuda", help="where to time (default: cuda where there is one)")
    told = "of compare: changes in percent of the time that do not count yet (default: 5%%)"
    how.add_argument("--threshold", metavar="N%", help=told)


def run_command(arguments: argparse.Namespace) -> int:
    what, rest = arguments.words[0], arguments.words[1:]
    if what not in ("report", "compare"):
        _refuse(arguments, "compare", "threshold")
        return run(arguments.words, arguments.device, arguments.peers, arguments.only)
    _refuse(arguments, "ops, layers and step", "peers", "only")
    if what == "compare":
        _refuse(arguments, "ops, layers and step", "device")
        if len(rest) != 2:
            raise InputError(f"compare: {len(rest)} files; expected two, A.json B.json")
        return _module("show.compare").compare(*rest, _fraction(arguments.threshold or "5%"))
    _refuse(arguments, "compare", "threshold")
    if len(rest) > 1:
        raise InputError(f"report: {len(rest)} folders; expected one at most")
    folder = Path(rest[0]) if rest else _results(_device(arguments.device))
    print(f"written: {_module('show.report').write(folder)}", file=sys.stderr)
    return 0


def run(what: Sequence[str], device: str | None = None, peers: bool = False, only: str | None = None) -> int:
    """Run the benchmarks of the folders ``what`` of ``bench/`` and write what they measured.

    A complete run becomes ``bench/results/<device>/raw/<what>.json``, its medians are added to ``medians.csv`` in the
    device's folder, and ``report.html`` there is made anew. What is not the whole stays apart, in the folder ``part``,
    and leaves the rest as it was: a run with ``only`` (an expression over names, pytest's ``-k``), one that was
    interrupted, one in which a benchmark failed.

    Returns 0, 1 when a benchmark failed, 130 when interrupted. Raises InputError where there is no checkout, no such
    folder or device, or when nothing matches ``only``.
    """
    folders = [_folder(name) for name in dict.fromkeys(what)]
    device = _device(device)
    results = _results(device)
    options = ["--device", device, *(["--peers"] if peers else []), *(["-k", only] if only else [])]
    codes, written, names = [], [], _Names()
    for folder in folders:
        part = results / "part" / f"{folder.name}.json"
        code, timed = _measure(folder, part, options, names)
        codes.append(code)
        if timed and code == 0 and not only:
            _keep(part, results)
            written.append(results)
        elif timed and code in (0, FAILED, INTERRUPTED):
            print(f"not the whole of bench {folder.name}: {part}", file=sys.stderr)
            written.append(part.parent)
        if code == INTERRUPTED:
            break
    for folder in dict.fromkeys(written):
        print(f"written: {_module('show.report').write(folder)}", file=sys.stderr)
    if only and WRONG_USAGE in codes:
        raise InputError(f"--only {only!r}: expected names joined by and, or, not, as pytest's -k has them")
    if set(codes) == {NOTHING_MATCHES}:
        filtered = f" for --only {only!r}{names.near(only)}" if only else ""
        raise InputError(f"{' '.join(what)}: nothing to time{filtered}{'' if peers else '; peers need --peers'}")
    return 130 if INTERRUPTED in codes else 0 if set(codes) <= {0, NOTHING_MATCHES} else 1


def _keep(part: Path, results: Path) -> None:
    """Moves a complete run to the raw results of its device, and adds its medians to the table."""
    path = results / "raw" / part.name
    path.parent.mkdir(exist_ok=True)
    os.replace(part, path)
    _module("show.medians").add(results, _module("show.raw").load(path))


class _Names:
    """A plugin of pytest that hears what could be timed, before ``-k`` chooses."""

    def __init__(self) -> None:
        self._found: set[str] = set()

    def pytest_itemcollected(self, item) -> None:
        self._found.update(filter(None, re.split(r"[\[\]-]", item.name.removeprefix("test_"))))

    def near(self, only: str) -> str:
        """Returns what comes nearest to the words that are in no name."""
        words = set(re.findall(r"[\w.]+", only)) - {"and", "or", "not"}
        lower = [name.lower() for name in self._found]
        wrong = [word for word in sorted(words) if not any(word.lower() in name for name in lower)]
        near = [name for word in wrong for name in difflib.get_close_matches(word, sorted(self._found), cutoff=0)]
        return f" (near: {', '.join(dict.fromkeys(near))})" if near else ""


def _measure(folder: Path, target: Path, options: list[str], names: _Names) -> tuple[int, bool]:
    """Run pytest on one folder; what is timed is written to ``target`` at once, which stays as it was without anything.

    Returns pytest's exit code, NOTHING_MATCHES also when all was skipped, and whether anything was timed.
    """
    import pytest

    target.parent.mkdir(parents=True, exist_ok=True)
    before = _file_of(target)
    arguments = [str(folder), "-o", "python_files=bench_*.py", "-q", "--benchmark-quiet", *options]
    code = int(pytest.main([*arguments, "--results", str(target)], plugins=[names]))
    timed = _file_of(target) != before
    return (NOTHING_MATCHES if code == 0 and not timed else code), timed


def _file_of(path: Path) -> tuple[int, int] | None:
    """Which file stands at ``path``: one that is written anew is another."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def _folder(name: str) -> Path:
    folders = {path.parent.name: path.parent for path in sorted((CHECKOUT / "bench").glob("*/bench_*.py"))}
    if not folders:
        raise InputError(f"{name}: no folder bench/ with benchmarks beside the package; run it from a checkout")
    if name not in folders:
        raise InputError(f"{name!r}: expected {', '.join(folders)}, report or compare")
    return folders[name]


def _device(name: str | None) -> str:
    import torch

    here = torch.cuda.is_available()
    if name not in (None, "cpu", "cuda"):
        raise InputError(f"--device {name!r}: expected cpu or cuda")
    if name == "cuda" and not here:
        raise InputError("--device cuda: PyTorch sees no CUDA device here; expected cpu")
    return name or ("cuda" if here else "cpu")


def _results(device: str) -> Path:
    """Returns the folder of the device's results."""
    return _module("where").results_of(device)


def _module(name: str) -> ModuleType:
    """Returns a module of the checkout's package ``bench``, which is not installed and need not be on the path."""
    package = CHECKOUT / "bench" / "__init__.py"
    if not package.exists():
        raise InputError(f"{name}: no folder bench/ beside the package; run it from a checkout")
    if getattr(sys.modules.get("bench"), "__file__", None) != str(package):
        places = [str(package.parent)]
        spec = importlib.util.spec_from_file_location("bench", package, submodule_search_locations=places)
        assert spec is not None  # a file that is there has one
        sys.modules["bench"] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"bench.{name}")


def _fraction(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?%", text):
        raise InputError(f"--threshold {text!r}: expected a percentage such as 5%")
    return float(text[:-1]) / 100


def _refuse(arguments: argparse.Namespace, belongs_to: str, *names: str) -> None:
    for name in names:
        if getattr(arguments, name):
            raise InputError(f"{arguments.words[0]}: --{name} belongs to {belongs_to}")
