"""The dtype of matrix products and of frozen matrices: its default, and what a card can compute."""

from __future__ import annotations

import dataclasses

import torch

from petl_kernels.cards import without_bf16
from petl_kernels.device import resolve
from petl_kernels.errors import InputError

from ..config import TrainConfig

PRODUCTS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def with_precision(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Returns ``config`` with the default precision of ``device`` where it leaves it open.

    Raises InputError for bf16 on a CUDA card without it, where PyTorch would emulate it in fp32 with casts.
    """
    if config.precision is None:
        return dataclasses.replace(config, precision=default_precision(device))
    if config.precision == "bf16" and lacks_bf16(device):
        raise InputError(f"precision bf16: {torch.cuda.get_device_name(device)} has no bf16; expected fp16 or fp32")
    return config


def product_dtype(config: TrainConfig) -> torch.dtype | None:
    """Returns the dtype of matrix products under autocast, and of frozen matrices; None for fp32: no autocast."""
    return PRODUCTS[precision_of(config)]


def precision_of(config: TrainConfig) -> str:
    """Returns the precision of ``config``, with the default of this machine where it leaves it open."""
    return config.precision or default_precision(resolve())


def default_precision(device: torch.device) -> str:
    """Returns "fp16" for a CUDA card without bf16, whose products in fp16 are several times as fast, else "fp32"."""
    return "fp16" if lacks_bf16(device) else "fp32"


def lacks_bf16(device: torch.device) -> bool:
    """Returns whether ``device`` is a CUDA card of this machine that has no bf16, as those before Ampere."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return without_bf16(device) is not None
