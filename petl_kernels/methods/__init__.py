"""Fine-tuning methods, one file each. ``METHODS`` has them by the names that ``--method`` takes.

Each config class is an attribute of this package, those of files that are not named here too.
"""

from __future__ import annotations

from petl_kernels.methods.adapter import Adapter
from petl_kernels.methods.base import Method
from petl_kernels.methods.bitfit import BitFit
from petl_kernels.methods.budget import budget_parameters, parse_budget
from petl_kernels.methods.cross_attention import CrossAttention
from petl_kernels.methods.full import FullFineTuning
from petl_kernels.methods.ia3 import IA3
from petl_kernels.methods.ln_tuning import LayerNormTuning
from petl_kernels.methods.lora import LoRA
from petl_kernels.methods.prefix import PrefixTuning
from petl_kernels.methods.registry import CONFIGS, METHODS, Variant, from_dict
from petl_kernels.methods.state import adapter_state, load_adapter_state
from petl_kernels.models.structure import describe, total_parameters

__all__ = [
    "CONFIGS",
    "IA3",
    "METHODS",
    "Adapter",
    "BitFit",
    "CrossAttention",
    "FullFineTuning",
    "LayerNormTuning",
    "LoRA",
    "Method",
    "PrefixTuning",
    "Variant",
    "adapter_state",
    "budget_parameters",
    "describe",
    "from_dict",
    "load_adapter_state",
    "parse_budget",
    "total_parameters",
]

globals().update(CONFIGS)
