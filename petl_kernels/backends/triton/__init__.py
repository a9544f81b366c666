"""Triton kernels of the ops: for CUDA devices, and for the CPU in Triton's interpreter (TRITON_INTERPRET=1).

Every module of this folder is imported here, and registers its kernels (``registry.serves``).
"""

from __future__ import annotations

import importlib
import pkgutil

import triton

from petl_kernels import versions
from petl_kernels.dispatch import triton_interprets

versions.check("triton")
if triton_interprets() and isinstance(triton.language.cdiv, triton.JITFunction):
    raise ImportError("triton was imported before TRITON_INTERPRET=1 was set")

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
