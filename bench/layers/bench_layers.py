"""One encoder and one decoder layer of each family, forward and backward, in bf16 with dropout 0.1.

The limit is the frozen layer with the model's own code: its forward and the gradient of its input, nothing trained.
"ours" is tier 1; LoRA of rank 16 on q and v stands beside PEFT and PEFT compiled, adapters (m = 64) beside the same
adapter in the model's own layer. `saved_bytes` in extra_info: what a forward pass keeps for backward, for each token.

Checked without dropout: ours against the model's own layer with the same adapter in float64, output and all gradients;
PEFT's, whose B is 0, against the frozen layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn

import petl_kernels as pk
from bench.predict import counts
from bench.run.check import close, error, outcome
from bench.run.measure import copies, record, rotation
from bench.run.peers import compiled, installed, lora_by_peft, peer, require
from bench.run.work import Case, Work, step
from bench.shapes import MODELS, T5_MODELS, m2m_config, shape, t5_config
from petl_kernels.accounting.saved import saved_bytes

LENGTH, WORDS = 128, 64
DTYPE = torch.bfloat16
METHODS = {
    "LoRA r=16": lambda: pk.LoRA(rank=16, alpha=32.0),
    "adapter m=64": lambda: pk.Adapter(bottleneck=64),
    "parallel adapter m=64": lambda: pk.Adapter(bottleneck=64, parallel=True),
}
TIERS = {"ours": 1, "ours, tier 2": 2, "ours, tier 3": 3, "ours, tier 4": 4}
PEERS = {"PEFT, defaults": True, "PEFT, bf16 adapters": False, "torch.compile": False}
NAMES = ["nllb-600m", "nllb-1.3b", "nllb-3.3b", "t5", "madlad-3b"]


def base(name: str, device: str) -> nn.Module:
    """A frozen model of one layer a side, random weights."""
    import transformers

    torch.manual_seed(0)
    if name in T5_MODELS:
        _, d, ffn, heads, _, head_dim = T5_MODELS[name]
        config = t5_config(1, d, ffn, heads, WORDS, head_dim)
        model = transformers.T5ForConditionalGeneration(config)
    else:
        _, d, ffn, heads, _ = MODELS[name]
        config = m2m_config(1, d, ffn, heads, WORDS, max_position_embeddings=LENGTH)
        model = transformers.M2M100ForConditionalGeneration(config)
    return cast(nn.Module, model).to(device, DTYPE).requires_grad_(False)


def layer_of(model: nn.Module, side: str) -> Callable:
    """(x, source) -> y by the only layer of one side; the decoder's attends to its own past and to the source."""
    stack = getattr(getattr(model, "model", model), side)
    t5 = hasattr(stack, "block")
    (layer,) = stack.block if t5 else stack.layers

    def run(x: Tensor, source: Tensor) -> Tensor:
        mask = None if side == "encoder" else causal(x)
        if t5:
            bias = torch.zeros(1, layer.layer[0].SelfAttention.n_heads, LENGTH, LENGTH, device=x.device, dtype=x.dtype)
            more = {} if side == "encoder" else {"encoder_hidden_states": source}
            y = layer(x, mask, bias, **more)
        else:
            y = layer(x, mask) if side == "encoder" else layer(x, mask, source)
        return y if isinstance(y, Tensor) else y[0]

    return run


def causal(x: Tensor) -> Tensor:
    """Additive, (batch, 1, length, length)"""
    hidden = torch.ones(LENGTH, LENGTH, device=x.device, dtype=torch.bool).triu(1)
    mask = torch.zeros(LENGTH, LENGTH, device=x.device, dtype=x.dtype)
    return mask.masked_fill(hidden, torch.finfo(x.dtype).min).expand(x.shape[0], 1, LENGTH, LENGTH)


def trained(model: nn.Module) -> tuple[Tensor, ...]:
    return tuple(parameter for parameter in model.parameters() if parameter.requires_grad)


def adapted(name: str, device: str, method: str) -> nn.Module:
    model = pk.adapt(base(name, device), METHODS[method]())
    torch.manual_seed(1)
    for parameter in trained(model):
        nn.init.normal_(parameter, std=0.02)
    return model


def with_peft(name: str, device: str, fp32_adapters: bool) -> nn.Module:
    installed("peft", "PEFT")
    targets = ("q", "v") if name in T5_MODELS else ("q_proj", "v_proj")
    return lora_by_peft(base(name, device), fp32_adapters, targets=targets).base_model.model


def work(model: nn.Module, run: Callable, side: str, x: Tensor, source: Tensor) -> Work:
    own = [p for path, p in model.named_parameters() if p.requires_grad and f".{side}." in f".{path}"]
    leaves = (x, *own) if side == "encoder" else (x, source, *own)
    return Work(lambda: run(x, source), leaves)


def inputs(rows: int, d: int, device: str) -> tuple[Tensor, Tensor]:
    x, source = (torch.randn(rows, LENGTH, d, device=device, dtype=DTYPE, requires_grad=True) for _ in range(2))
    return x, source


def check(model: nn.Module, run: Callable, reference: nn.Module, side: str, given: tuple[Tensor, ...]) -> None:
    """Output and gradients of ``model`` without dropout against ``reference`` in float64 and in its own dtype."""
    model.eval()
    reference.eval()
    exact_model = copy.deepcopy(reference).double()
    doubles = tuple(tensor.detach().double().requires_grad_() for tensor in given)
    found = outcome(work(model, run, side, *given))
    theirs = outcome(work(reference, layer_of(reference, side), side, *given))
    exact = outcome(work(exact_model, layer_of(exact_model, side), side, *doubles))
    for index, (ours, other, true) in enumerate(zip(found, theirs, exact, strict=False)):
        assert close(ours, other, true), f"output or gradient {index} differs: {error(ours, true):.2e} relative"
    model.train()


IMPLEMENTATIONS = ["limit", "eager", *TIERS, *(peer(name) for name in PEERS)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("name", NAMES)
def test_layer(benchmark, name, side, method, implementation, device):
    require(name, device, implementation, small=name != "nllb-3.3b" and method == "LoRA r=16")
    if device == "cpu" and side == "decoder" and (method != "LoRA r=16" or implementation == "torch.compile"):
        pytest.skip("a CPU runs fewer cases: adapters, and what compiles, in the encoder alone")
    if implementation in PEERS and method != "LoRA r=16":
        pytest.skip("PEFT has no bottleneck adapter")
    s = shape(name, device)
    rows = s.tokens // LENGTH
    few = inputs(2, s.d, device)
    if implementation == "limit":
        model = base(name, device).train()
        run = layer_of(model, side)
    elif implementation in PEERS:
        model = with_peft(name, device, PEERS[implementation])
        run = layer_of(model, side)
        check(model, run, base(name, device), side, few)
        run = compiled(run) if implementation == "torch.compile" else run
    else:
        model, reference = (adapted(name, device, method) for _ in range(2))
        if implementation in TIERS:
            pk.lean(model, TIERS[implementation])
        run = layer_of(model, side)
        check(model, run, reference, side, few)
    model.train()
    works = [work(model, run, side, *given) for given in copies(lambda: inputs(rows, s.d, device), device)]
    with saved_bytes(exclude=[*model.parameters(), *works[0].leaves]) as saved:
        works[0].forward()
    # A layer's input is kept by every implementation: some save it, some only hold it. It counts once in each.
    benchmark.extra_info["saved_bytes"] = round(saved.bytes / s.tokens) + s.d * DTYPE.itemsize
    del saved
    gated = name in T5_MODELS
    counted = counts.layer(side, rows, LENGTH, s.d, s.ffn, s.heads, s.head_dim, gated, DTYPE.itemsize)
    case = Case("layer", name, s.tokens, "bfloat16", device, f"{side} {method}", 15 if device == "cuda" else 5)
    record(benchmark, case, implementation, rotation([step(each) for each in works]), counted)
