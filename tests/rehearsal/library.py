"""Compiles ``host_cuda.cpp``, the tensors of the card that ``card.py`` plays; as a program, it does so.

PyTorch loads what it has compiled, so a process that is to see no card lets another one compile.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "build" / "rehearsal"
LIBRARY = FOLDER / "host_cuda.so"


def build() -> Path:
    """Compiles the library unless it is there and newer than its source (20 s); returns its path."""
    from torch.utils import cpp_extension

    FOLDER.mkdir(parents=True, exist_ok=True)
    path = os.environ["PATH"]
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])  # where ninja is
    try:
        source = Path(__file__).with_name("host_cuda.cpp")
        options = {"extra_cflags": ["-O1"], "build_directory": str(FOLDER), "is_python_module": False}
        cpp_extension.load("host_cuda", [str(source)], **options)
    finally:
        os.environ["PATH"] = path
    return LIBRARY


if __name__ == "__main__":
    build()
