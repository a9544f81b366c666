"""petl_kernels: lean and fast parameter-efficient fine-tuning of translation models.

Names are loaded when they are first used, so that ``petl_kernels.ops`` needs PyTorch and nothing else.
"""

from __future__ import annotations

import importlib
from typing import Any

from petl_kernels import integrations, versions

for _library in ("torch", "numpy"):
    versions.check(_library)

__version__ = "0.1.0"

_HOME = {
    **dict.fromkeys(
        (
            "Adapter",
            "BitFit",
            "CrossAttention",
            "FullFineTuning",
            "IA3",
            "LayerNormTuning",
            "LoRA",
            "PrefixTuning",
        ),
        "petl_kernels.methods",
    ),
    **dict.fromkeys(("adapt", "trainable_parameters", "use_adapter"), "petl_kernels.methods.adapt"),
    **dict.fromkeys(("merge", "unmerge"), "petl_kernels.methods.merge"),
    "lean": "petl_kernels.api",
    "report": "petl_kernels.reporting",
    **dict.fromkeys(("load_adapter", "save_adapter", "save_merged"), "petl_kernels.interop"),
    "pack": "petl_kernels.layers.packed",
    "linear_cross_entropy": "petl_kernels.ops",
    "Plan": "petl_kernels.planning.plan",
    "plan": "petl_kernels.planning.planner",
    "InputError": "petl_kernels.errors",
}
_MODULES = ("nn", "ops", "parity")

__all__ = [*_HOME, *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]  names are loaded when first used


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"petl_kernels.{name}")
    if name[:1].isupper():  # the config of a method that has no line above
        configs = importlib.import_module("petl_kernels.methods.registry").CONFIGS
        if name in configs:
            return configs[name]
    raise AttributeError(f"module 'petl_kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


integrations.install()
