"""A training step of M2M-418M's shape with LoRA on q and v: ours ("ours" is tier 1), beside PEFT.

Random weights, bf16, 12 layers a side and 128,112 words, 4 x 128 source and as many target tokens on a CPU, 64 x 128 on
a GPU, dropout 0.1 as the checkpoints have it. The step is the loss of model(labels=...), and the gradients of the
adapters. The frozen weights are made once on the device, and all implementations train adapters beside the same ones.
"""

from __future__ import annotations

import gc

import counts
import pytest
import torch
from measure import Case, record
from random_model import frozen_model, random_weights
from shapes import MODELS, m2m_config

import petl_kernels as pk

SHAPE = MODELS["m2m-418m"]
ROWS = {"cpu": 4, "cuda": 64}
LENGTH = 128
ROUNDS = {"cpu": 5, "cuda": 3}


def with_peft(model, autocast_adapter_dtype: bool):
    import peft

    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)


def with_tier(model, tier: int):
    return pk.lean(pk.adapt(model, pk.LoRA(rank=16, alpha=32.0)), tier)


# What decides most comes first: time may run out.
IMPLEMENTATIONS = {
    "ours": lambda model: with_tier(model, 1),
    "PEFT, bf16 adapters": lambda model: with_peft(model, False),
    "PEFT, defaults": lambda model: with_peft(model, True),
    "ours, tier 2": lambda model: with_tier(model, 2),
    "ours, tier 3": lambda model: with_tier(model, 3),
}
PEERS = [name for name in IMPLEMENTATIONS if name.startswith("PEFT")]


@pytest.fixture(scope="module")
def weights(device):
    return random_weights(m2m_config(*SHAPE), device)


@pytest.mark.parametrize(
    "implementation", [pytest.param(n, marks=pytest.mark.peer if n in PEERS else ()) for n in IMPLEMENTATIONS]
)
def test_step(benchmark, implementation, weights, device):
    gc.collect()  # modules refer to one another: adapters and gradients of the last ones are still there
    layers, d, ffn, _, words = SHAPE
    torch.manual_seed(0)
    net = IMPLEMENTATIONS[implementation](frozen_model(m2m_config(*SHAPE), weights)).train()
    source, labels = (torch.randint(4, words, (ROWS[device], LENGTH), device=device) for _ in range(2))
    counted = counts.step(layers, source.numel(), d, ffn, words, torch.bfloat16.itemsize)
    case = Case("step", "m2m-418m", source.numel(), "bfloat16", device, "LoRA r=16", rounds=ROUNDS[device])
    record(benchmark, case, implementation, step_of(net, source, labels), counted)


def step_of(net, source: torch.Tensor, labels: torch.Tensor):
    parameters, mask = [parameter for parameter in net.parameters() if parameter.requires_grad], torch.ones_like(source)

    def step() -> None:
        loss = net(input_ids=source, attention_mask=mask, labels=labels, use_cache=False).loss
        torch.autograd.grad(loss, parameters)

    return step
