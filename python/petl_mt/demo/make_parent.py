"""The demo's parent: its folder, and how it was made small, with weights in 16 bits.

python -m petl_mt.demo.make_parent runs/demo-parent/model python/petl_mt/demo/parent
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import torch

from petl_kernels.errors import InputError
from petl_kernels.files import atomic_dir
from petl_kernels.interop.hf import load_pretrained

from ..silence import hush

PARENT = Path(__file__).parent / "parent"


def parent_folder() -> Path:
    """Returns the folder of the parent that ships with the package."""
    if not (PARENT / "config.json").is_file():
        raise InputError(f"demo parent {PARENT}: not there; make it as python/petl_mt/demo/parent.yaml says")
    return PARENT


def shrink(source: str | Path, target: str | Path) -> int:
    """Writes the model folder ``source`` to ``target`` with fp16 weights; returns the bytes of the new folder."""
    with hush(), atomic_dir(target) as folder:
        model, tokenizer = cast("tuple[Any, Any]", load_pretrained(str(source)))
        model.to(torch.float16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            file.chmod(0o644)
    return sum(file.stat().st_size for file in Path(target).iterdir())


if __name__ == "__main__":
    print(f"{shrink(*sys.argv[1:]):,} bytes")
