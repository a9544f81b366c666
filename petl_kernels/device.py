"""The number of a CUDA device: the one place where ``cuda`` gets it."""

from __future__ import annotations

import torch


def resolve(device: torch.device | str | None = None) -> torch.device:
    """Returns ``device`` with the number that it has here: ``cuda`` is the current CUDA device, ``cuda:0`` by default.

    None is CUDA where PyTorch has a device for it, else the CPU. Several functions of ``torch.cuda`` refuse a device
    without a number, and ``torch.device("cuda")`` is not equal to the ``cuda:0`` of its tensors. Where PyTorch has no
    CUDA device, ``cuda`` stays as it is: a plan can be made for it all the same.
    """
    available = torch.cuda.is_available()
    found = torch.device(("cuda" if available else "cpu") if device is None else device)
    if found.type == "cuda" and found.index is None and available:
        return torch.device("cuda", torch.cuda.current_device())
    return found
