"""The package's C++ extension, which a machine without a compiler does not have."""

from __future__ import annotations

import importlib
from types import ModuleType

from petl_kernels.errors import InputError


def load_extension() -> ModuleType:
    """Returns the extension, whose import registers ``torch.ops.petl_cpu`` and, built with CUDA, ``petl_cuda``.

    Raises ImportError where it was not built.
    """
    try:
        return importlib.import_module("petl_kernels._C")
    except ModuleNotFoundError as error:
        raise ImportError("the C++ extension was not built: reinstall with a C++ compiler on the PATH") from error


def find_extension() -> ModuleType | None:
    """Returns the extension; None where it was not built."""
    try:
        return load_extension()
    except ImportError:
        return None


def extension() -> ModuleType:
    """Returns the extension. Raises InputError where it was not built."""
    found = find_extension()
    if found is None:
        raise InputError("streamed layers: the C++ extension was not built; reinstall with a C++ compiler")
    return found
