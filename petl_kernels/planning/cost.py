"""How long a training step takes, as far as a planner has to know: matrix work, bytes over memory, bytes from the host.

    t(micro-batch) = max(work / r_products + bytes of weights read / r_memory, bytes from the host / r_host)

Work is that of the linear layers and of the vocabulary projection, forward and input gradients, and what the tier makes
again. The rates are measured on the device in about a second; the same shapes give the same order of plans on any
card whose rates stand in the same proportions.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from petl_kernels.layers.blocks import activation_of
from petl_kernels.models.structure import Attention, Layer, Structure
from petl_kernels.ops.product import product_into
from petl_kernels.planning.simulate import Batch


@dataclass(frozen=True)
class Rates:
    """Operations, bytes of device memory and bytes from host memory, each in a second."""

    products: float
    memory: float
    host: float
    measured: bool


# What is assumed of a card that is not here: between an L4 and an A100.
ASSUMED = Rates(100e12, 0.6e12, 20e9, measured=False)


@dataclass(frozen=True)
class LayerWork:
    """Multiplications of a layer's linears for one token of its own side, and of the source that it attends to.

    qkv, out and inner (the first half of a feed-forward block) are those that tiers make again.
    """

    own: int
    source: int
    qkv_own: int
    qkv_source: int
    out: int
    inner: int

    def step(self, tier: int, own: int, source: int) -> float:
        """Operations of forward, input gradients and recomputation, for that many tokens."""
        forward = self.own * own + self.source * source
        again = 0.0
        if tier >= 4:
            again = forward
        elif tier >= 2:
            again = self.qkv_own * own + self.qkv_source * source + self.inner * own
            again += self.out * own if tier == 3 else 0
        return 2 * (2 * forward + again)


def layer_work(model: nn.Module, structure: Structure, layer: Layer) -> LayerWork:
    def size(path: str) -> int:
        return model.get_submodule(path).weight.numel()

    def projections(attention: Attention) -> tuple[int, int]:
        """(of its own tokens, of the source's)"""
        kv = size(attention.k) + size(attention.v)
        return (size(attention.q), kv) if attention.kind == "cross" else (size(attention.q) + kv, 0)

    own, source = (sum(part) for part in zip(*map(projections, layer.attentions), strict=True))
    out = sum(size(attention.out) for attention in layer.attentions)
    inner = sum(map(size, layer.ffn.inputs))
    bits = len(layer.ffn.inputs) == 1 and activation_of(model.get_submodule(layer.path)) == "relu"
    ffn = inner + size(layer.ffn.out)
    return LayerWork(own + out + ffn, source, own, source, out, 0 if bits else inner)


@functools.cache  # of this machine; several plans of a process then go by the same
def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Returns the rates of products (512 a side on a CPU, 4,096 on CUDA), of copies of 64 MiB, and on CUDA of copies
    from pinned memory; medians of five. Products are those that the package's layers make (``product_into``).
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        return ASSUMED
    n = 512 if device.type == "cpu" else 4096
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    x = torch.empty(64 * 2**20, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    host = torch.empty(x.shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    return Rates(
        2 * n**3 / _seconds(lambda: product_into(out, a, b), device),
        2 * x.nbytes / _seconds(lambda: y.copy_(x), device),
        x.nbytes / _seconds(lambda: x.copy_(host, non_blocking=True), device),
        measured=True,
    )


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(7):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return sorted(times[2:])[2]


def update_seconds(
    rates: Rates,
    work: list[tuple[str, LayerWork]],
    tiers: tuple[int, ...],
    head: int,
    batch: Batch,
    micro_batches: int,
    weight_bytes: int,
    host_bytes: int,
) -> float:
    """Of ``micro_batches`` times ``batch``.

    work: (side, its work) a layer. head: words × width. weight_bytes: read once forward and once backward. host_bytes:
    those of a micro-batch that come from host memory, both ways together.
    """
    source, target = batch.rows * batch.source, batch.rows * batch.target
    operations = 4.0 * head * target
    for (side, layer), tier in zip(work, tiers, strict=True):
        operations += layer.step(tier, source if side == "encoder" else target, source)
    compute = operations / rates.products + 2 * weight_bytes / rates.memory
    return micro_batches * max(compute, host_bytes / rates.host)
