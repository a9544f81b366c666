"""The classes of CUDA cards: what a card of each has, what it lacks, and so which tiles and dtypes are for it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class CardClass(NamedTuple):
    """Describes the cards that share tiles (``backends/triton/config.py``).

    name: the key of the tables of tiles. capabilities: the compute capabilities that belong to it. cards: well-known
    ones. shared_memory: bytes that a block may have on each of them. bf16: whether their processors compute in it.
    tensor_cores: whether Triton's products run on them; if not, they run on the CUDA cores, as fp32's do anywhere.
    """

    name: str
    capabilities: tuple[tuple[int, int], ...]
    cards: str
    shared_memory: int
    bf16: bool = True
    tensor_cores: bool = True

    def dtypes(self) -> str:
        return "fp32, fp16, bf16" if self.bf16 else "fp32, fp16"


SM75 = CardClass("sm75", ((7, 5),), "T4, RTX 2060 to 2080", 64 << 10, bf16=False, tensor_cores=False)
SM80 = CardClass("sm80", ((8, 0),), "A100, A30", 163 << 10)
SMALL = CardClass(
    "small", ((8, 6), (8, 9), (12, 0)), "RTX 3060 to 3090, A10; RTX 4060 to 4090, L4, L40; RTX 5060 to 5090", 99 << 10
)
SM90 = CardClass("sm90", ((9, 0),), "H100, H200", 227 << 10)
SM100 = CardClass("sm100", ((10, 0), (10, 3)), "B200, B300", 227 << 10)
CLASSES = (SM75, SM80, SMALL, SM90, SM100)

NO_BF16 = "the card has no bfloat16 (compute capability {}.{}; 8.0 and later have it)"


def class_of(capability: tuple[int, int]) -> CardClass:
    """Returns the class of a card; what is older than Turing counts as it, and what is unknown as the small ones."""
    if capability < (8, 0):
        return SM75
    return next((found for found in CLASSES if capability in found.capabilities), SMALL)


def without_bf16(device: torch.device) -> str | None:
    """Returns why a CUDA device computes nothing in bf16, or None if it does.

    ``torch.cuda.is_bf16_supported`` says yes of a T4, where PyTorch emulates it.
    """
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip or class_of(capability).bf16:
        return None
    return NO_BF16.format(*capability)
