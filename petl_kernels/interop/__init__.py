"""Hugging Face models in, adapters in and out."""

from petl_kernels.interop.adapters import load_adapter, save_adapter
from petl_kernels.interop.plain import save_merged

__all__ = ["load_adapter", "save_adapter", "save_merged"]
