"""Seconds of an update, as far as a choice of plans needs them: matrix work and bytes that travel.

    t(micro-batch) = max(work / r_products + bytes of weights read / r_memory, bytes from the host / r_host)

Work is that of the linear layers and of the vocabulary projection, forward and input gradients, and what the tier
recomputes. The rates are measured on the device in about a second; the same shapes give the same order of plans on any
card whose rates stand in the same proportions.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from petl_kernels.models.structure import Attention, Layer, Structure
from petl_kernels.models.transformers_names import activation_of, head_linear
from petl_kernels.ops.product import product_into
from petl_kernels.planning.simulate import Batch


@dataclass(frozen=True)
class Rates:
    """Operations, bytes of device memory and bytes from host memory, each in a second."""

    products: float
    memory: float
    host: float
    measured: bool


# Assumed of a card that is not here: rates between those of an L4 and of an A100.
ASSUMED = Rates(100e12, 0.6e12, 20e9, measured=False)


@dataclass(frozen=True)
class LayerWork:
    """Multiplications of a layer's linears for one token of its own side, and of the source that it attends to.

    Tiers recompute ``qkv``, ``out`` and ``inner``, the first half of a feed-forward block.
    """

    side: str
    own: int
    source: int
    qkv_own: int
    qkv_source: int
    out: int
    inner: int

    def step(self, tier: int, own: int, source: int) -> float:
        """Returns the operations of forward, input gradients and recomputation, for that many tokens of each side."""
        forward = self.own * own + self.source * source
        recomputed = 0.0
        if tier >= 4:
            recomputed = forward
        elif tier >= 2:
            recomputed = self.qkv_own * own + self.qkv_source * source + self.inner * own
            recomputed += self.out * own if tier == 3 else 0
        return 2 * (2 * forward + recomputed)


@dataclass(frozen=True)
class ModelWork:
    """layers: encoder first. head: values of the vocabulary projection, words × width."""

    layers: tuple[LayerWork, ...]
    head: int

    def step(self, tiers: tuple[int, ...], batch: Batch) -> float:
        """Returns the operations of forward and backward for ``batch``."""
        source, target = batch.pairs * batch.source, batch.pairs * batch.target
        operations = 4.0 * self.head * target
        for layer, tier in zip(self.layers, tiers, strict=True):
            operations += layer.step(tier, source if layer.side == "encoder" else target, source)
        return operations


@dataclass(frozen=True)
class Traffic:
    """Bytes of a micro-batch. weights: read forward, and as many backward. host: from host memory, both ways."""

    weights: int
    host: int


def model_work(model: nn.Module, structure: Structure) -> ModelWork:
    head = getattr(model, "lm_head", None)
    layers = tuple(_layer_work(model, structure, layer) for layer in structure.layers)
    return ModelWork(layers, 0 if head is None else head_linear(head).weight.numel())


def _layer_work(model: nn.Module, structure: Structure, layer: Layer) -> LayerWork:
    def size(path: str) -> int:
        linear: Any = model.get_submodule(path)
        return linear.weight.numel()

    def projections(attention: Attention) -> tuple[int, int]:
        """Returns the multiplications of q, k and v for a token of the layer's own side and for one of the source."""
        kv = size(attention.k) + size(attention.v)
        return (size(attention.q), kv) if attention.kind == "cross" else (size(attention.q) + kv, 0)

    own, source = (sum(each) for each in zip(*map(projections, layer.attentions), strict=True))
    out = sum(size(attention.out) for attention in layer.attentions)
    inner = sum(map(size, layer.ffn.inputs))
    bits = len(layer.ffn.inputs) == 1 and activation_of(model.get_submodule(layer.path)) == "relu"
    ffn = inner + size(layer.ffn.out)
    return LayerWork(layer.side, own + out + ffn, source, own, source, out, 0 if bits else inner)


@functools.cache  # one measurement a process, so that several plans go by the same rates
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
    times: list[float] = []
    for _ in range(7):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return sorted(times[2:])[2]


def update_seconds(
    rates: Rates, work: ModelWork, tiers: tuple[int, ...], batch: Batch, micro_batches: int, traffic: Traffic
) -> float:
    """Returns the seconds of an update of ``micro_batches`` times ``batch``. tiers: one a layer, encoder first."""
    compute = work.step(tiers, batch) / rates.products + 2 * traffic.weights / rates.memory
    return micro_batches * max(compute, traffic.host / rates.host)
