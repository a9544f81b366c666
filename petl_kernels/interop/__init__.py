"""Hugging Face models in, PEFT files in and out."""

from __future__ import annotations

__all__ = ["load_adapter", "save_adapter", "save_merged"]


def __getattr__(name: str):
    if name in __all__:  # only when used: `files` and `languages` need nothing of the methods
        from petl_kernels.interop import adapters

        return getattr(adapters, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
