"""The package's C++ extension, which a machine without a compiler does not have."""

from __future__ import annotations

import importlib
from types import ModuleType

from petl_kernels.errors import InputError


def find_extension() -> ModuleType | None:
    """Returns the extension; None where it was not built."""
    try:
        return importlib.import_module("petl_kernels._C")
    except ImportError:
        return None


def extension() -> ModuleType:
    """Returns the extension. Raises InputError where it was not built."""
    found = find_extension()
    if found is None:
        raise InputError("streamed layers: the C++ extension was not built; reinstall with a C++ compiler")
    return found
