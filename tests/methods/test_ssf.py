from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration, T5GemmaModuleConfig

import petl_kernels as pk
from petl_kernels.errors import InputError
from petl_kernels.methods import adapter_state
from petl_kernels.models.structure import describe, norms

from .models import build, logits


def shaken(family: str, **settings):
    model = pk.adapt(build(family), pk.SSF(**settings))
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, mean=1.0 if name.endswith("scale") else 0.0, std=0.2)
    return model


def test_places_and_shapes(model, family):
    config = pk.SSF()
    count = config.count(model)
    pk.adapt(model, config)
    state = adapter_state(model, "default")
    hosts = {*norms(model), *describe(model).linears}
    assert {key.rpartition(".")[0] for key in state} == hosts and len(state) == 2 * len(hosts)
    assert not any("lm_head" in key or "embed_tokens" in key for key in state)
    assert sum(tensor.numel() for tensor in state.values()) == count
    for key, own in state.items():
        host = model.get_submodule(key.rpartition(".")[0])
        assert own.shape == host.weight.shape[:1] and own.eq(1.0 if key.endswith("scale") else 0.0).all()


def test_parameters_of_a_layer():
    """Encoder layer 14 d + 2 f, decoder layer 24 d + 2 f, 2 d for each norm behind them (facts of the method)."""
    model = build("m2m100")
    config, d = model.config, model.config.d_model
    encoder = config.encoder_layers * (14 * d + 2 * config.encoder_ffn_dim)
    decoder = config.decoder_layers * (24 * d + 2 * config.decoder_ffn_dim)
    assert pk.SSF().count(model) == encoder + decoder + 2 * 2 * d


def test_computes_the_formula(family):
    """Hooks on a plain model, each with γ and β of one module, are the same model."""
    model, reference = shaken(family), build(family)
    state = adapter_state(model, "default")
    for path in {key.rpartition(".")[0] for key in state}:
        scale, shift = state[f"{path}.ssf_scale"], state[f"{path}.ssf_shift"]
        reference.get_submodule(path).register_forward_hook(lambda _, __, y, a=scale, b=shift: a * y + b)
    adapted = logits(model)
    torch.testing.assert_close(adapted, logits(reference), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(adapted, logits(build(family)), atol=0.05)


@pytest.mark.parametrize("shift", [True, False])
def test_merges_where_a_bias_holds_the_shift(family, shift, tmp_path):
    model = shaken(family, shift=shift)
    adapted = logits(model)
    if family == "t5" and shift:
        with pytest.raises(InputError, match="has no bias at .* that could hold SSF's shift; expected .* shift false"):
            pk.merge(model)
        assert torch.equal(logits(model), adapted)
        return
    pk.merge(model)
    torch.testing.assert_close(logits(model), adapted, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path)), adapted, atol=1e-5, rtol=1e-4)
    pk.unmerge(model)
    assert torch.equal(logits(model), adapted)


def test_noise_moves_the_start_and_only_where_it_is_wanted():
    plain = logits(build("m2m100"))
    assert torch.equal(logits(pk.adapt(build("m2m100"), pk.SSF())), plain)
    model = pk.adapt(build("m2m100"), pk.SSF(noise=0.02))
    scales = torch.cat([t for key, t in adapter_state(model, "default").items() if key.endswith("scale")])
    assert 0.015 < scales.std() < 0.025 and abs(scales.mean() - 1) < 0.005
    assert not torch.allclose(logits(model), plain, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shift": 1}, "ssf shift 1: expected True or False"),
        ({"noise": -0.1}, "ssf noise -0.1: expected a number from 0 to below 1"),
        ({"noise": True}, "ssf noise True: expected a number"),
        ({"noise": float("nan")}, "ssf noise nan: expected a number"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(InputError, match=message):
        pk.SSF(**settings)


def test_a_norm_that_multiplies_by_one_and_its_weight_is_merged():
    """T5Gemma's norms compute x̂ ⊙ (1 + w): γ is put into w as γ ⊙ (1 + w) - 1."""
    config = T5GemmaConfig(
        encoder=(module := T5GemmaModuleConfig(
            vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8,
        )), decoder=module, vocab_size=60,
    )  # fmt: skip
    torch.manual_seed(0)
    model = pk.adapt(T5GemmaForConditionalGeneration(config).eval(), pk.SSF(shift=False))
    for parameter in pk.trainable_parameters(model):
        nn.init.normal_(parameter, mean=1.0, std=0.2)
    ids = torch.randint(5, 60, (2, 7))
    inputs = {"input_ids": ids, "decoder_input_ids": ids}
    with torch.no_grad():
        adapted = model(**inputs).logits
        pk.merge(model)
        torch.testing.assert_close(model(**inputs).logits, adapted, atol=1e-5, rtol=1e-4)
