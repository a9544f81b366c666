"""Cards by name: their memory and their rates, each published or measured, for plans and for bench/predict.

Published figures are those of NVIDIA's data sheets and architecture papers, without sparsity. Products of 16 bits have
their sums in fp32, as PyTorch's do: on GeForce cards that is half of the rate that is advertised. ``memory`` is what
CUDA reports, rounded down, which is less than the name of a card says: error-correcting codes take a sixteenth of a
T4's, an L4's and an A10G's, and the driver takes some of each. Measured rates are those of ``bench/results``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from petl_kernels.planning.cost import Rates

GIB = 2**30
MIB = 2**20
PUBLISHED, MEASURED = "published", "measured"

# The share of PCIe's published rate that copies from pinned memory are assumed to reach.
HOST_COPIES = 0.8

_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Card:
    """Published figures of a card, the shares of them that are reached, and what was measured on one.

    memory, l2: bytes. fp32, fp16, bf16: operations a second of dense products; bf16 is None where a card has no such
    products. bandwidth: bytes of device memory a second. host: bytes a second over PCIe, one way. products, copies:
    shares of the rates of products and of ``bandwidth`` that are reached, assumed where nothing was measured. source:
    where the published figures stand. measured: rates that were measured, by the name of the field that they replace.
    """

    memory: int
    fp32: float
    fp16: float
    bf16: float | None
    bandwidth: float
    host: float
    l2: int
    products: float
    copies: float
    source: str
    measured: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def dtype(self) -> torch.dtype:
        """The 16-bit dtype to train in: bf16, or fp16 where the card has none."""
        return torch.float16 if self.bf16 is None else torch.bfloat16

    def kind(self, name: str) -> str:
        """Returns "measured" or "published" for the rate in the field ``name``."""
        return MEASURED if name in self.measured else PUBLISHED

    def rate(self, name: str) -> float:
        """Returns the rate of the field ``name`` that is reached: measured, or a share of the published one.

        Raises ValueError where the card has no such rate.
        """
        if name in self.measured:
            return self.measured[name]
        shares = {"bandwidth": self.copies, "host": HOST_COPIES}
        if (published := getattr(self, name)) is None:
            raise ValueError(f"{name}: the card has no such products")
        return published * shares.get(name, self.products)

    def rates(self, dtype: torch.dtype) -> Rates:
        """Returns the rates that a plan with products in ``dtype`` goes by: fp32, fp16 or bf16."""
        return Rates(self.rate(_NAMES[dtype]), self.rate("bandwidth"), self.rate("host"), measured=False)


_PCIE_3, _PCIE_4, _PCIE_5 = 15.75e9, 31.5e9, 63e9  # 16 lanes, one way

# An H200's shares are those of its own copies and of the limits that are products (d = 768 takes 1.24 times what they
# say, the others 0.96 to 1.12). Cards of little power are held back by it: 70 W of a T4, 72 W of an L4.
CARDS = {
    "T4": Card(
        int(14.5 * GIB), 8.1e12, 65e12, None, 0.32e12, _PCIE_3, 4 * MIB, 0.45, 0.80, "T4 data sheet, Turing paper"
    ),
    "RTX 3060": Card(
        int(11.7 * GIB), 12.7e12, 25.5e12, 25.5e12, 0.36e12, _PCIE_4, 3 * MIB, 0.85, 0.90, "GeForce specifications"
    ),
    "RTX 4060": Card(
        int(7.6 * GIB), 15.1e12, 30.2e12, 30.2e12, 0.272e12, _PCIE_4 / 2, 24 * MIB, 0.90, 0.90, "GeForce specifications"
    ),
    "RTX 3090": Card(int(23.5 * GIB), 35.6e12, 71e12, 71e12, 0.936e12, _PCIE_4, 6 * MIB, 0.85, 0.90, "GA102 paper"),
    "RTX 4090": Card(
        int(23.5 * GIB), 82.6e12, 165.2e12, 165.2e12, 1.008e12, _PCIE_4, 72 * MIB, 0.90, 0.90, "Ada paper"
    ),
    "L4": Card(22 * GIB, 30.3e12, 121e12, 121e12, 0.3e12, _PCIE_4, 48 * MIB, 0.55, 0.85, "L4 data sheet"),
    "A10G": Card(22 * GIB, 35e12, 70e12, 70e12, 0.6e12, _PCIE_4, 6 * MIB, 0.80, 0.85, "A10G data sheet"),
    "A100 40GB": Card(
        int(39.3 * GIB), 19.5e12, 312e12, 312e12, 1.555e12, _PCIE_4, 40 * MIB, 0.80, 0.85, "A100 data sheet"
    ),
    "A100 80GB": Card(
        79 * GIB, 19.5e12, 312e12, 312e12, 2.039e12, _PCIE_4, 40 * MIB, 0.80, 0.85, "A100 80GB data sheet"
    ),
    "H100 SXM": Card(79 * GIB, 67e12, 989e12, 989e12, 3.35e12, _PCIE_5, 50 * MIB, 0.70, 0.88, "H100 data sheet"),
    "H200": Card(
        139 * GIB,
        67e12,
        989e12,
        989e12,
        4.8e12,
        _PCIE_5,
        50 * MIB,
        0.77,
        0.86,
        "H200 data sheet; bench/results/nvidia-h200",
        {"bf16": 780e12, "bandwidth": 4.15e12},
    ),
}


def card_of(name: str) -> str | None:
    """Returns the name in ``CARDS`` of a card by the name that CUDA gives it ("NVIDIA H200"), None where there is none.

    Cards of one name that differ in memory are told apart by it: "NVIDIA A100-SXM4-80GB".
    """
    words = name.replace("-", " ").split()
    return next((known for known in CARDS if _named(known, words)), None)


def _named(known: str, words: list[str]) -> bool:
    first, *rest = known.split()
    needed = [rest[0]] if first == "RTX" else [first, *(word for word in rest if word.endswith("GB"))]
    return all(word in words for word in needed)
