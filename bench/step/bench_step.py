"""A training step of NLLB-600M's shape with LoRA on q and v: ours ("ours" is tier 1), beside PEFT.

Random weights, bf16, vocabulary of 128,112 words, 4 x 128 source and as many target tokens on a CPU, dropout 0.1 as the
checkpoints have it. The step is the loss of model(labels=...), and the gradients of the adapters.
"""

from __future__ import annotations

import counts
import pytest
import torch
from measure import Case, record
from shapes import MODELS, m2m_config

import petl_kernels as pk

LAYERS, D, FFN, HEADS, WORDS = SHAPE = MODELS["m2m-418m"]
ROWS = {"cpu": 4, "cuda": 64}
LENGTH = 128


def model(device: str):
    from transformers import M2M100ForConditionalGeneration

    torch.manual_seed(0)
    config = m2m_config(*SHAPE)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return M2M100ForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)


def with_peft(device: str, autocast_adapter_dtype: bool):
    import peft

    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(model(device), config, autocast_adapter_dtype=autocast_adapter_dtype)


def with_tier(device: str, tier: int):
    return pk.lean(pk.adapt(model(device), pk.LoRA(rank=16, alpha=32.0)), tier)


IMPLEMENTATIONS = {
    "PEFT, defaults": lambda device: with_peft(device, True),
    "PEFT, bf16 adapters": lambda device: with_peft(device, False),
    "ours": lambda device: with_tier(device, 1),
    "ours, tier 2": lambda device: with_tier(device, 2),
    "ours, tier 3": lambda device: with_tier(device, 3),
}
PEERS = [name for name in IMPLEMENTATIONS if name.startswith("PEFT")]


@pytest.mark.parametrize(
    "implementation", [pytest.param(n, marks=pytest.mark.peer if n in PEERS else ()) for n in IMPLEMENTATIONS]
)
def test_step(benchmark, implementation, device):
    net = IMPLEMENTATIONS[implementation](device).train()
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    rows = ROWS[device]
    source, labels = (torch.randint(4, WORDS, (rows, LENGTH), device=device) for _ in range(2))
    mask = torch.ones_like(source)

    def step() -> None:
        loss = net(input_ids=source, attention_mask=mask, labels=labels, use_cache=False).loss
        torch.autograd.grad(loss, parameters)

    tokens = rows * LENGTH
    record(
        benchmark,
        Case("step", "m2m-418m", tokens, "bfloat16", device, "LoRA r=16", rounds=5),
        implementation,
        step,
        counts.step(LAYERS, tokens, D, FFN, WORDS, torch.bfloat16.itemsize),
    )
