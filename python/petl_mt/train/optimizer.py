"""The device with its precision, and the optimiser."""

from __future__ import annotations

import logging

import torch
from torch import nn

from petl_kernels import versions
from petl_kernels.errors import InputError
from petl_kernels.methods.pieces import Piece

from ..config import TrainConfig, require_bitsandbytes


def make_accelerator(precision: str):
    """Returns accelerate's object for the device and the precision, with a loss scale for fp16, on a CPU, too.

    Raises InputError for several processes.
    """
    versions.check("accelerate")
    from accelerate import Accelerator  # here: its version is checked first
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # a second run in this process may want another precision
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
    if accelerator.num_processes > 1:
        count = accelerator.num_processes
        raise InputError(f"{count} processes: petl-mt trains on one device; start it without a launcher")
    if precision == "fp16" and accelerator.scaler is None:  # accelerate leaves both out on a CPU, and computes in fp32
        accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler(accelerator.device.type), True
    return accelerator


def undecayed(model: nn.Module) -> list[nn.Parameter]:
    """Returns the trained parameters without weight decay: vectors, and what a piece keeps from it."""
    pieces = [module for module in model.modules() if isinstance(module, Piece) and not module.decays]
    kept = {parameter for piece in pieces for parameter in piece.parameters()}
    return [p for p in model.parameters() if p.requires_grad and (p.dim() <= 1 or p in kept)]


def make_optimizer(
    parameters: list[nn.Parameter], without_decay: list[nn.Parameter], config: TrainConfig, name: str
) -> torch.optim.Optimizer:
    """Returns AdamW as ``name``, "adamw" or "adamw8bit", has it. without_decay: those of ``parameters`` without it."""
    kept = set(without_decay)
    groups = [
        {"params": [p for p in parameters if p not in kept], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p in kept], "weight_decay": 0.0},
    ]
    settings = {"params": [g for g in groups if g["params"]], "lr": config.lr, "betas": config.betas, "eps": 1e-6}
    if name == "adamw":
        return torch.optim.AdamW(**settings, fused=True)
    require_bitsandbytes(f"optimizer {name}")
    # on the CPU it warns that a product with 4-bit weights is missing, which no optimiser needs
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit(**settings)
