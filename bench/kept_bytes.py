"""The table of docs/MEMORY.md: bytes kept between forward and backward, by model, method of saving, and tier.

    python -m bench.kept_bytes            writes the table into docs/MEMORY.md, between its two markers

One encoder and one decoder layer of each shape, random weights, bf16, LoRA of rank 16 on q and v, dropout 0.1. Bytes
are those of all storages that live after the forward pass because of it, per source and target token: the slope over
two batches, so that what no token adds (casts of adapters) drops out. Work is that of the
matrix products outside attention, over the forward pass and the input gradients of the frozen linear layers.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn

import petl_kernels as pk
from bench.run.peers import lora_by_peft
from bench.shapes import MODELS, m2m_config
from bench.show import markdown
from bench.where import ROOT
from petl_kernels.accounting.live import Born
from petl_kernels.accounting.work import linear_flops

NAMES = ("nllb-600m", "nllb-1.3b", "nllb-3.3b")
LENGTH = 64
BUDGETS = (1.0, 0.5, 0.25)
DOCUMENT = ROOT / "docs" / "MEMORY.md"
MARKERS = ("<!-- table: python -m bench.kept_bytes -->", "<!-- end of table -->")


class Layers(nn.Module):
    """Source and target (rows, length, d) through one encoder and one decoder layer."""

    def __init__(self, model):
        super().__init__()
        (self.encoder,), (self.decoder,) = model.model.encoder.layers, model.model.decoder.layers

    def forward(self, source, target):
        return self.decoder(target, None, self.encoder(source, None))


def base(d: int, ffn: int, heads: int) -> nn.Module:
    from transformers import M2M100ForConditionalGeneration

    torch.manual_seed(0)
    config = m2m_config(1, d, ffn, heads, 64, max_position_embeddings=LENGTH)
    return cast(nn.Module, M2M100ForConditionalGeneration(config)).to(torch.bfloat16)


def with_peft(model: nn.Module, fp32_adapters: bool) -> Layers:
    return Layers(lora_by_peft(copy.deepcopy(model), fp32_adapters).base_model.model).train()


def with_tier(model: nn.Module, tier: int) -> Layers:
    return Layers(pk.lean(pk.adapt(copy.deepcopy(model), pk.LoRA(rank=16)), tier)).train()


def inputs(rows: int, d: int) -> list[torch.Tensor]:
    torch.manual_seed(rows)
    return [torch.randn(rows, LENGTH, d, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]


def kept(layers: nn.Module, d: int, rows: int, in_host_memory: int = 0) -> int:
    """Returns the bytes that a forward pass keeps, its inputs among them, its output not."""
    given = inputs(rows, d)
    with Born() as born:
        output = layers(*given)
    held = 0 if in_host_memory else sum(tensor.untyped_storage().nbytes() for tensor in given)
    return born.alive() - output.untyped_storage().nbytes() - in_host_memory * rows * LENGTH + held


def kept_by_compiled(layers: nn.Module, d: int, rows: int, budget: float) -> int:
    """Returns the same under torch.compile, whose one backward node has what it holds."""
    from torch._functorch import config

    torch._dynamo.reset()
    config.activation_memory_budget = budget
    given = inputs(rows, d)
    output = torch.compile(layers, backend="aot_eager_decomp_partition")(*given)
    known = {parameter.untyped_storage().data_ptr() for parameter in layers.parameters()}
    storages = {}
    for tensor in output.grad_fn.saved_tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def slope(measure: Callable[[int], int]) -> float:
    """Returns bytes per source and target token and layer."""
    return (measure(4) - measure(2)) / (2 * 2 * LENGTH)


def flops(layers: nn.Module, d: int) -> int:
    given = inputs(2, d)
    return linear_flops(lambda: layers(*given).sum().backward())


def rows_of(name: str) -> list[tuple[str, ...]]:
    """Returns the lines of one model."""
    layers, d, ffn, heads, _ = MODELS[name]
    model = base(d, ffn, heads)
    linear = 2 * 2 * 2 * LENGTH * (12 * d * d + 4 * d * ffn)  # forward and input gradients of both layers
    defaults = with_peft(model, True)
    reference, work = slope(lambda rows: kept(defaults, d, rows)), flops(defaults, d)
    lines = []

    def add(what: str, count: float, extra: float | None) -> None:
        whole = count * 2 * layers * 4096 / 2**30
        shown = "" if extra is None else f"{extra:+.1%}"
        lines.append((name.upper(), what, f"{count:,.0f}", f"{count / reference:.2f}", f"{whole:.2f} GiB", shown))
        print("  ".join(lines[-1]), file=sys.stderr)

    add("PEFT, defaults", reference, 0.0)
    narrow = with_peft(model, False)
    add("PEFT, bf16 adapters", slope(lambda rows: kept(narrow, d, rows)), (flops(narrow, d) - work) / linear)
    for budget in BUDGETS:
        count = slope(lambda rows, budget=budget: kept_by_compiled(narrow, d, rows, budget))
        add(f"the same, torch.compile, activation_memory_budget {budget}", count, None)
    for tier in (1, 2, 3, 4, 5):
        lean = with_tier(model, tier)
        host = 2 * 2 * d if tier == 5 else 0
        count = slope(lambda rows, lean=lean, host=host: kept(lean, d, rows, host))
        add(f"tier {tier}", count, (flops(lean, d) - work) / linear)
    return lines


def main() -> None:
    head = ("model", "what", "bytes per token and layer", "of PEFT's", "all layers, 4,096 + 4,096 tokens", "more work")
    lines: list[tuple[str, ...]] = [head]
    for name in NAMES:
        lines += rows_of(name)
    write_table(lines, 4, *MARKERS)


def write_table(lines: Sequence[tuple[str, ...]], numbers: int, begin: str, end: str) -> None:
    """Puts the table into docs/MEMORY.md, between the two markers."""
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(markdown.filled(text, begin, end, markdown.table(lines, numbers)), encoding="utf-8")


if __name__ == "__main__":
    main()
