"""Host memory that a checkpoint in fp32 takes while it is loaded, or quantized and kept: the resident set of a process.

    python -m bench.loading                 105 MB
    python -m bench.loading nllb-3.3b       13.4 GB, and what is quantized beside it, in a folder inside of --folder

Random weights of a shape, and the tokenizer of the demo's parent. Each way runs in a process of its own, which has done
the same with a tiny model before: base is its resident set by then, and peak the most after it, files' pages included.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from petl_mt.checks import check_space
from petl_mt.demo.make_parent import parent_folder

from bench.random_model import write_checkpoint
from bench.run.machine import described
from bench.shapes import MODELS, m2m_config
from bench.where import ROOT, commit
from petl_kernels.errors import InputError
from petl_kernels.interop.hf import load_skeleton, load_weights
from petl_kernels.interop.quantize_checkpoint import quantize_checkpoint
from petl_kernels.ops.quantized import quantize
from petl_kernels.units import format_size

SHAPES = {"small": (3, 512, 2048, 8, 8000), **MODELS}
TINY = (1, 64, 64, 2, 5000)

# name -> what is done with a checkpoint and a folder to write
WAYS: dict[str, Callable[[Path, Path], Any]] = {
    "bf16": lambda path, out: _loaded(path, lambda _, tensor: tensor.to(torch.bfloat16, copy=True)),
    "int8": lambda path, out: _loaded(path, lambda _, t: quantize(t, "int8") if t.dim() == 2 else t.clone()),
    "quantize": lambda path, out: quantize_checkpoint(path, out, "int8"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shape", nargs="?", default="small", choices=SHAPES)
    parser.add_argument("--folder", type=Path, default=Path(), help="where the checkpoint is made (default: here)")
    parser.add_argument("--process", nargs=4, metavar=("WAY", "TINY", "CHECKPOINT", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.process:
        print(*grown(given.process[0], *map(Path, given.process[1:])))
        return 0
    about = described("cpu")
    print(f"{about['cpu_name']}, {about['threads']} threads, torch {about['torch']}, commit {commit()[:7]}")
    try:
        with tempfile.TemporaryDirectory(prefix="petl-loading-", dir=given.folder) as folder:
            report(given.shape, Path(folder))
    except InputError as error:
        print(f"bench.loading: {error}", file=sys.stderr)
        return 2
    return 0


def report(shape: str, folder: Path) -> dict[str, int]:
    """Prints a line for each way with the shape's checkpoint, and returns the growth of the resident set in bytes.

    Raises InputError for a disk without room for the checkpoint and a quantized one."""
    config = m2m_config(*SHAPES[shape])
    tiny, large = folder / "tiny", folder / "model"
    check_space("folder", folder, _bytes(config) * 3 // 2, "the checkpoint, and a quantized one")
    for path, of in ((tiny, m2m_config(*TINY)), (large, config)):
        write_checkpoint(of, path, dtype=torch.float32)
        _copy_tokenizer(path)
    print(f"{shape}: {_on_disk(large):,} bytes on disk", flush=True)
    found = {}
    for way in WAYS:
        base, peak = measured(way, tiny, large, folder)
        found[way] = peak - base
        kept = folder / f"{way}-large"
        written = f", {_on_disk(kept):,} bytes written" if kept.is_dir() else ""
        sizes = f"base {format_size(base)}, peak {format_size(peak)}, {format_size(peak - base)} above it"
        print(f"{way}: {sizes}{written}", flush=True)
    return found


def measured(way: str, tiny: Path, large: Path, out: Path) -> tuple[int, int]:
    """Returns what ``grown`` does, in a process of its own: freed memory of one way would serve the next."""
    command = [sys.executable, "-m", "bench.loading", "--process", way, str(tiny), str(large), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{way}: {done.stderr[-2000:]}")
    base, peak = map(int, done.stdout.split())
    return base, peak


def grown(way: str, tiny: Path, large: Path, out: Path) -> tuple[int, int]:
    """Returns the resident set in bytes before ``large`` is loaded, and its most until it is. Needs Linux' /proc."""
    WAYS[way](tiny, out / f"{way}-tiny")  # what is imported and allocated once
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    base = _status("VmRSS")
    made = WAYS[way](large, out / f"{way}-large")
    peak = _status("VmHWM")
    del made
    return base, peak


def _loaded(path: Path, place: Callable[[str, torch.Tensor], torch.Tensor]) -> Any:
    model, _ = load_skeleton(path)
    return load_weights(path, model, place)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def _bytes(config: Any) -> int:
    from petl_kernels.interop.hf import skeleton

    return sum(parameter.nbytes for parameter in skeleton(config).parameters())


def _on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _copy_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(parent_folder()).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
