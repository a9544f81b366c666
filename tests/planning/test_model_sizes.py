"""Plans of large public models from their shapes alone: each fits 24 GiB of a card, and nothing of it is read."""

from __future__ import annotations

import pytest
import torch
from transformers import M2M100Config, MT5Config, T5Config, T5GemmaConfig, UMT5Config

import petl_kernels as pk
from petl_kernels.interop.hf import skeleton
from petl_kernels.planning import planner as planning
from petl_kernels.planning.chooser import Chooser
from petl_kernels.planning.cost import ASSUMED

_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_heads": 64,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}
_BART_12B = {
    "vocab_size": 128_112,
    "d_model": 4096,
    **{f"{side}_layers": 24 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 16384 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 16 for side in ("encoder", "decoder")},
    **{f"{side}_layerdrop": 0.0 for side in ("encoder", "decoder")},
}
# The shapes of google/mt5-xxl and CohereLabs/aya-101, google/umt5-xxl, google/byt5-xxl, facebook/m2m100-12B and
# google/t5gemma-2b-2b-ul2.
CONFIGS = {
    "mt5-xxl and aya-101": (12.9e9, lambda: MT5Config(**_XXL, vocab_size=250_112)),
    "umt5-xxl": (13.0e9, lambda: UMT5Config(**_XXL, vocab_size=256_384)),
    "byt5-xxl": (
        12.9e9,
        lambda: T5Config(
            **{**_XXL, "d_model": 4672, "d_ff": 12352, "num_layers": 36, "num_decoder_layers": 12}, vocab_size=384
        ),
    ),
    "m2m100-12b": (12.0e9, lambda: M2M100Config(**_BART_12B)),
    "t5gemma-2b-2b": (5.6e9, T5GemmaConfig),
}


FIRST = "umt5-xxl"  # a position bias in every layer


@pytest.mark.parametrize("name", [FIRST, *(pytest.param(n, marks=pytest.mark.repeat) for n in CONFIGS if n != FIRST)])
@pytest.mark.slow
def test_a_plan_from_the_config(name, monkeypatch):
    monkeypatch.setattr(planning, "measure_rates", lambda *_: ASSUMED)
    monkeypatch.setattr(Chooser, "more", lambda *_: ())  # what larger budgets would bring
    parameters, config = CONFIGS[name]
    model = skeleton(config())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.03)
    for parameter in pk.adapt(model, pk.LoRA(rank=8)).parameters():
        if parameter.dim() > 1 and not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    memory = "8GiB" if name.startswith("t5gemma") else "24GiB"
    plan = pk.plan(model, memory, 1024, max_length=64, tier=4, device="cuda", autocast=torch.bfloat16, beam=1)
    assert plan.peak <= plan.memory and not plan.approximations and 0 < plan.streamed <= 52
