"""Cards by what they are known to reach, and the seconds that a launch takes on one."""

from __future__ import annotations

from dataclasses import dataclass

from bench.predict.counts import Counts, Launch
from petl_kernels.planning.cards import CARDS, Card, card_of

# Our own main loops over the library's: 0.72 to 0.83 for LoRA's two products on an H200 (d = 2048 and 4096, r = 8 and
# 16), when its four passes over an activation are taken off the whole.
OURS = 0.75
# The share of the L2 cache that a working set may have.
L2_SHARE = 0.8


@dataclass(frozen=True)
class Device:
    """Dense bf16 and fp32 FLOP/s, bytes/s, bytes of L2 cache; the fractions of both rates that are reached; a launch.

    ``launch``: seconds from one kernel to the next in a full queue, with filling and draining the card.
    """

    bf16: float
    fp32: float
    bandwidth: float
    l2: int
    products: float
    copies: float
    launch: float = 3e-6

    def rate(self, dtype: str) -> float:
        return (self.fp32 if dtype == "float32" else self.bf16) * self.products

    @property
    def instructions(self) -> float:
        """Instructions of single threads a second: a multiply-add of fp32 is one."""
        return self.fp32 / 2


def _device(card: Card) -> Device:
    assert card.bf16 is not None
    return Device(card.bf16, card.fp32, card.bandwidth, card.l2, card.products, card.copies)


# The cards of planning/cards.py that have been predicted for so far.
DEVICES = {name: _device(CARDS[name]) for name in ("A100 80GB", "H100 SXM", "H200", "L4", "RTX 4090")}


def device_of(card: str) -> Device | None:
    """Returns the entry of a card by the name that CUDA gives it ("NVIDIA H200"), None where the table has none."""
    return DEVICES.get(card_of(card) or "")


def launch_seconds(launch: Launch, device: Device, dtype: str = "bfloat16") -> float:
    rate = device.rate(dtype) * (1.0 if launch.library else OURS)
    fits = launch.working_set <= L2_SHARE * device.l2
    moved = launch.bytes - (launch.cached if fits else 0)
    work = (launch.flops / rate, moved / (device.bandwidth * device.copies), launch.instructions / device.instructions)
    return max(work) + device.launch


def predicted(counted: Counts, device: Device, dtype: str = "bfloat16") -> float | None:
    """Returns seconds, None where ours has no GPU kernel."""
    return None if counted.kernels is None else seconds_of(counted, device, dtype)


def seconds_of(counted: Counts, device: Device, dtype: str = "bfloat16") -> float:
    """Returns the seconds of what has launches."""
    return sum(launch_seconds(launch, device, dtype) for launch in counted.launched())
