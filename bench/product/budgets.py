"""A published shape with random weights, trained under budgets of memory."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from petl_mt.demo.make_parent import parent_folder

from bench.product.figures import figures_of, inside
from bench.product.program import Program, Run, context
from bench.product.text import Text
from bench.random_model import write_checkpoint
from bench.shapes import m2m_config

TOKENIZER = ("sentencepiece.bpe.model", "vocab.json", "tokenizer_config.json")


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
    return inside(run, out)


def checkpoint(folder: Path, shape: tuple[int, int, int, int, int], device: str) -> Path:
    """Writes a model of ``shape`` with random weights, and the demo parent's tokenizer, whose words are its first."""
    write_checkpoint(m2m_config(*shape), folder, device)
    for name in TOKENIZER:
        shutil.copy(parent_folder() / name, folder)
    return folder


def made_in_a_process(folder: Path, shape: tuple[int, int, int, int, int], device: str) -> Path:
    """Calls ``checkpoint`` in a process that gives the card back."""
    process = context().Process(target=checkpoint, args=(folder, shape, device))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{folder}: the process that makes the checkpoint ended with code {process.exitcode}")
    return folder
