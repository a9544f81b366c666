"""Other implementations, which are timed with --peers alone, and the cases that a CPU leaves out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from bench.shapes import runs_on


def peer(name: str):
    """Returns a parameter that is skipped without --peers."""
    return pytest.param(name, marks=pytest.mark.peer)


def installed(module: str, name: str, device: str = "cuda"):
    """Returns a peer's module, or skips with the peer's name. device: "cpu" for those whose kernels need a GPU."""
    if device == "cpu":
        pytest.skip(f"{name} needs a GPU")
    return pytest.importorskip(module, reason=f"{name} is not installed", exc_type=ImportError)


def lora_by_peft(
    model: nn.Module, fp32_adapters: bool, rank: int = 16, targets: Sequence[str] = ("q_proj", "v_proj")
) -> Any:
    """Returns PEFT's model of ``model`` with LoRA of alpha 2 · rank; its defaults have adapters in fp32."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets))
    return peft.get_peft_model(model, config, autocast_adapter_dtype=fp32_adapters)


def compiled(function: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def require(name: str, device: str, implementation: str, small: bool = True) -> None:
    """Skips what takes a CPU too long.

    Those are shapes that are not its own; cases that are not ``small``, but for nllb-600m; and compiling, which takes
    longer than all else together, but for nllb-600m's small cases.
    """
    first = name == "nllb-600m"
    patient = small and first if implementation == "torch.compile" else small or first
    if device == "cpu" and not (runs_on(name, device) and patient):
        pytest.skip("a CPU runs fewer shapes and cases: see bench/shapes.py")
