"""Cards by what they are known to reach, and the seconds that a launch takes on one."""

from __future__ import annotations

from dataclasses import dataclass

from bench.predict.counts import Counts, Launch

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


# NVIDIA's data sheets and architecture papers: A100 80GB SXM, H100 SXM5, H200 SXM, L4, Ada (RTX 4090; bf16 with sums in
# fp32). Without sparsity. An H200's fractions are those of its own copies and of the limits that are products (d = 768
# takes 1.24 times what they say, the others 0.96 to 1.12). L4's products are held back by 72 W.
DEVICES = {
    "A100 80GB": Device(312e12, 19.5e12, 2.039e12, 40 << 20, products=0.80, copies=0.85),
    "H100 SXM": Device(989e12, 67e12, 3.35e12, 50 << 20, products=0.70, copies=0.88),
    "H200": Device(989e12, 67e12, 4.8e12, 50 << 20, products=0.77, copies=0.86),
    "L4": Device(121e12, 30.3e12, 0.3e12, 48 << 20, products=0.55, copies=0.85),
    "RTX 4090": Device(165.2e12, 82.6e12, 1.008e12, 72 << 20, products=0.90, copies=0.90),
}


def device_of(card: str) -> Device | None:
    """Returns the entry of a card by the name that CUDA gives it ("NVIDIA H200"), None where the table has none."""
    words = card.replace("-", " ").split()
    return next((device for name, device in DEVICES.items() if _main_word(name) in words), None)


def _main_word(name: str) -> str:
    return name.split()[1] if name.startswith("RTX") else name.split()[0]


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
