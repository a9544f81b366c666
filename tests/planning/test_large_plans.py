"""A plan for MADLAD-400 10B, from its config: under 6 GiB, with layers streamed and nothing approximated."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config

import petl_kernels as pk
from petl_kernels.interop.hf import skeleton
from petl_kernels.planning import planner as planning
from petl_kernels.planning.chooser import Chooser
from petl_kernels.planning.cost import ASSUMED

GIB = 2**30
D, FFN, INNER, LAYERS, WORDS = 2048, 16384, 16 * 256, 32, 256_000


@pytest.fixture(scope="module")
def madlad():
    config = T5Config(
        vocab_size=WORDS,
        d_model=D,
        d_ff=FFN,
        d_kv=256,
        num_heads=16,
        num_layers=LAYERS,
        num_decoder_layers=LAYERS,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    model = pk.adapt(skeleton(config), pk.LoRA(rank=16))
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cuda", pytest.param("cpu", marks=pytest.mark.repeat)])
def test_10b_under_6_gib(madlad, device, monkeypatch):
    monkeypatch.setattr(planning, "measure_rates", lambda *_: ASSUMED)
    monkeypatch.setattr(Chooser, "more", lambda *_: ())  # what larger budgets would bring
    assert 10.6e9 < sum(p.numel() for p in madlad.parameters()) < 10.8e9
    # One tier, since each is counted: which one a plan takes is the subject of test_plan.py.
    given = {"max_length": 128, "device": device, "autocast": torch.bfloat16, "beam": 1}
    plan = pk.plan(madlad, "6GiB", 4096, tier=4, **given)
    assert plan.peak <= 6 * GIB and not plan.approximations and plan.storage == "dense"
    assert plan.streamed == 2 * LAYERS
    # on the device: embeddings, output projection, two slots of a decoder layer
    slots = 2 * (8 * D * INNER + 3 * D * FFN)
    assert plan.parts["frozen weights"] == pytest.approx(2 * (2 * WORDS * D + slots), rel=0.001)
