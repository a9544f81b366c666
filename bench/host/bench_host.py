"""The host's time of a training step on tensors so small that nothing else is left: ours beside PEFT's LoRA.

M2M-100's layers, 6 and 6 of them, d = 64, feed-forward 128, 4 heads, 500 words, 2 sentences of 8 tokens a side, bf16,
dropout 0.1 as the checkpoints have it. A step is the loss of model(labels=...), and the gradients of what is trained.
One step of each implementation in turn, so that all meet the same moments of the machine; on a GPU the time is that
until the host has queued the step. The denominator is PEFT's LoRA on q and v, its adapters in bf16, for every method.
"""

from __future__ import annotations

import copy
import functools
import gc
import itertools
from typing import cast

import pytest
import torch

import petl_kernels as pk
from bench.run import clock, turns
from bench.run.peers import lora_by_peft
from petl_kernels.models.transformers_names import drop_no_layer

ROUNDS, WARM = 40, 8
PEFT = "PEFT's LoRA, bf16 adapters"
METHODS = {
    "LoRA r=8": lambda: pk.LoRA(rank=8, alpha=16.0),
    "adapter m=8": lambda: pk.Adapter(bottleneck=8),
    "sublayer adapter m=8": lambda: pk.Adapter(bottleneck=8, placement="sublayer"),
    "parallel adapter m=8": lambda: pk.Adapter(bottleneck=8, parallel=True),
    "prefix 8": lambda: pk.PrefixTuning(length=8),
    "BitFit": lambda: pk.BitFit(),
    "(IA)3": lambda: pk.IA3(),
}
OURS = {"ours": 1, "ours, tier 2": 2}
CASES = list(itertools.product(METHODS, [PEFT, *OURS]))


@pytest.mark.parametrize(("method", "implementation"), CASES)
def test_host(benchmark, device, method, implementation):
    seconds = samples(device)[_timed(method, implementation)]
    benchmark.group = f"host {method}"
    benchmark.extra_info.update(
        op="host",
        shape="6+6 layers of 64",
        case=method,
        dtype="bfloat16",
        tokens=16,
        implementation=implementation,
        of_peers={PEFT: turns.ratio(seconds, samples(device)["LoRA r=8", PEFT])},
    )
    clock.write_down(benchmark, seconds)


@functools.cache
def samples(device: str) -> dict[tuple[str, str], list[float]]:
    """(method, implementation) -> seconds of each round."""
    steps = {}
    for method, implementation in dict.fromkeys(_timed(*case) for case in CASES):
        net = (
            lora_by_peft(model(device), False, rank=8)
            if implementation == PEFT
            else ours(method, OURS[implementation], device)
        )
        steps[method, implementation] = step_of(net.train(), device)
    gc.collect()
    return turns.seconds_in_turn(steps, ROUNDS, WARM, device)


def _timed(method: str, implementation: str) -> tuple[str, str]:
    """Returns the key of ``samples`` that a case reads: PEFT's step is timed once for all methods."""
    return ("LoRA r=8" if implementation == PEFT else method), implementation


def model(device: str) -> torch.nn.Module:
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    torch.manual_seed(0)
    config = M2M100Config(
        vocab_size=500,
        d_model=64,
        encoder_layers=6,
        decoder_layers=6,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
    )
    net = cast(torch.nn.Module, M2M100ForConditionalGeneration(config)).to(device, torch.bfloat16)
    drop_no_layer(net)
    return net


def ours(method: str, tier: int, device: str) -> torch.nn.Module:
    return pk.lean(pk.adapt(copy.deepcopy(model(device)), METHODS[method]()), tier)


def step_of(net: torch.nn.Module, device: str):
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    source, labels = (torch.randint(4, 500, (2, 8), device=device) for _ in range(2))
    mask = torch.ones_like(source)

    def step() -> None:
        loss = net(input_ids=source, attention_mask=mask, labels=labels, use_cache=False).loss
        torch.autograd.grad(loss, parameters)

    return step
