"""The package's C++ extension, which a machine without a compiler does not have."""

from __future__ import annotations

from types import ModuleType

from petl_kernels.errors import InputError


def find_extension() -> ModuleType | None:
    try:
        from petl_kernels import _C
    except ImportError:
        return None
    return _C


def extension() -> ModuleType:
    found = find_extension()
    if found is None:
        raise InputError("streamed layers: the C++ extension was not built; reinstall with a C++ compiler")
    return found
