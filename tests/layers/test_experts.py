"""NLLB-MoE: dense layers are lean, those of experts stay as they are, and the routers' losses are the plain model's."""

from __future__ import annotations

import pytest
import torch
from methods.models import _BART, batch
from torch import nn
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

import petl_kernels as pk
from petl_kernels.errors import InputError
from petl_kernels.layers.families.m4t import LeanM4TLayer
from petl_kernels.methods import METHODS
from petl_kernels.models.structure import describe

from .lean_cases import SETTINGS, ragged, step, worst

EXPERTS = ("encoder.layers.1", "decoder.layers.1")
_ROUTED = {"num_experts": 3, "expert_capacity": 8, "router_jitter_noise": 0.0, "moe_token_dropout": 0.0}


def model_of(method: str = "lora", **settings) -> nn.Module:
    """Returns an adapted model in training mode and float64; the second layer of each side has experts."""
    torch.manual_seed(7)
    given = {**_BART, **_ROUTED, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "pad_token_id": 1, **settings}
    model = NllbMoeForConditionalGeneration(NllbMoeConfig(**given, router_dtype="float32", activation_dropout=0.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    pk.adapt(model.double(), METHODS[method](**SETTINGS.get(method, {})))
    with torch.no_grad():
        for parameter in pk.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def in_experts(name: str) -> bool:
    return ".experts." in name or ".router." in name


@pytest.mark.parametrize("method", [method for method in METHODS if method != "parallel"])
@pytest.mark.parametrize("routers", [False, True])
def test_loss_and_gradients(method, routers):
    """With the routers' losses and without; only methods that train all of the base, or all its biases, reach
    experts."""
    model = model_of(method, output_router_logits=routers)
    inputs = ragged(model)
    plain = step(pk.lean(model, 0), inputs)
    for tier in (1, 3, 5) if method in ("lora", "full") else (2,):
        found = step(pk.lean(model, tier), inputs)
        difference, name = worst(found, plain)
        assert difference < 1e-9, (tier, name, difference)
        states = pk.report(model).layers
        for state in states:
            is_expert = state.path.endswith(EXPERTS)
            assert state.tier == (0 if is_expert else tier) and ("experts" in state.reason) == is_expert
    if method != "full" and not method.startswith("bitfit"):
        assert not any(in_experts(name) for name in plain)


def test_the_routers_losses_are_part_of_it():
    model = model_of()
    inputs = ragged(model)
    without = step(pk.lean(model, 2), inputs)["loss"]
    model.config.output_router_logits = True
    output = model(**inputs)
    added = model.config.router_aux_loss_coef * (output.encoder_aux_loss + output.decoder_aux_loss)
    assert added > 0
    torch.testing.assert_close(output.loss, without + added)
    with pytest.raises(InputError, match="^reduction: beside output_router_logits.*expected output_router_logits=F"):
        model(**inputs, reduction="sum")
    assert torch.isfinite(model(**inputs, reduction="sum", output_router_logits=False).loss)


def test_experts_stay_what_they_are():
    model = pk.lean(model_of("lora"), 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if in_experts(name)}
    optimizer = torch.optim.SGD(pk.trainable_parameters(model), lr=0.1)
    step(model, ragged(model))
    optimizer.step()
    assert len(before) > 10
    for name, parameter in model.named_parameters():
        assert name not in before or (torch.equal(parameter, before[name]) and not parameter.requires_grad)


def test_what_has_no_place_in_experts():
    model = model_of("ia3")
    blocks = [layer.ffn for layer in describe(model).layers]
    assert [bool(block.linears) for block in blocks] == [True, False, True, False]
    assert not any(hasattr(module, "petl") for name, module in model.named_modules() if in_experts(name))
    with pytest.raises(InputError, match=r"^adapter parallel: model.encoder.layers.1.ffn is a network of experts"):
        model_of("parallel")
    with pytest.raises(InputError, match=r"model.encoder.layers.1.ffn is a network of experts, which no plan counts"):
        pk.plan(model, "1GiB", 64)


def test_search_finds_the_same_words():
    model = model_of().eval()
    inputs = batch(model)
    del inputs["decoder_input_ids"]
    found = [pk.lean(model, tier).generate(**inputs, num_beams=3, do_sample=False, max_new_tokens=9) for tier in (0, 1)]
    assert torch.equal(*found)


def test_a_dense_model_is_lean_as_a_whole():
    model = model_of(encoder_sparse_step=0, decoder_sparse_step=0)
    inputs = ragged(model)
    plain = step(model, inputs)
    difference, name = worst(step(pk.lean(model, 4), inputs), plain)
    assert difference < 1e-9, (name, difference)
    assert {state.tier for state in pk.report(model).layers} == {4}


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_overflow_in_fp16_is_clamped_as_the_layer_does_it(side):
    layer = model_of().half().get_submodule(f"model.{side}.layers.0")
    for x in (torch.tensor([1.0, -2.0]), torch.tensor([65504.0, 1.0]), torch.tensor([65504.0, -torch.inf])):
        x = x.half()
        overflows = torch.isinf(x).any()
        expected = x.clamp(-64504, 64504) if overflows else x
        assert torch.equal(LeanM4TLayer.finished(layer, x), expected)
