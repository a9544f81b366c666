from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import MvpConfig, MvpForConditionalGeneration, UMT5Config, UMT5ForConditionalGeneration
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import petl_kernels as pk
from petl_kernels.errors import InputError
from petl_kernels.methods import adapter_state, describe, load_adapter_state
from petl_kernels.methods.prefix import fold

from .models import batch, build, logits, set_attention, train_a_little


def prefixed(family: str, attention: str = "sdpa", length: int = 5):
    model = pk.adapt(build(family, attention), pk.PrefixTuning(length=length))
    train_a_little(model)
    return model


def mixture(module, query, key, value, attention_mask, scaling=None, position_bias=None, **kwargs):
    """Attention over the prefix and over the rest apart, mixed by their shares of the softmax's sum."""
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    heads = [own.view(-1, query.shape[1], query.shape[-1]).transpose(0, 1) for own in module.prefix]
    scores = query @ key.transpose(2, 3) * scale
    for extra in (attention_mask, position_bias):
        scores = scores if extra is None else scores + extra
    own_scores = query @ heads[0].transpose(1, 2) * scale
    total, own_total = scores.logsumexp(-1, keepdim=True), own_scores.logsumexp(-1, keepdim=True)
    share = torch.sigmoid(own_total - total)
    output = share * (own_scores.softmax(-1) @ heads[1]) + (1 - share) * (scores.softmax(-1) @ value)
    return output.transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("attention", ("eager", "sdpa"))
def test_computes_the_formula(family, attention):
    follows_the_formula(prefixed(family, attention), build(family, "eager"))


def follows_the_formula(model, reference):
    plain, state = copy.deepcopy(reference), adapter_state(model, "default")
    for where in describe(reference).attentions:
        module = reference.get_submodule(where.path)
        module.prefix = (state[f"{where.path}.prefix.key"], state[f"{where.path}.prefix.value"])
    AttentionInterface.register("mixture_for_test", mixture)
    AttentionMaskInterface.register("mixture_for_test", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    set_attention(reference, "mixture_for_test")
    torch.testing.assert_close(logits(model), logits(reference), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(logits(model), logits(plain), atol=1e-2)


def test_umt5_has_a_position_bias_in_every_layer():
    def make(attention):
        torch.manual_seed(7)
        sizes = {"vocab_size": 99, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        return UMT5ForConditionalGeneration(UMT5Config(**sizes, attn_implementation=attention)).eval()

    # transformers 5.17's own UMT5 has a decoder that sees what comes later under sdpa: no formula to compare with
    same = torch.allclose(logits(make("sdpa")), logits(make("eager")), atol=1e-4)
    for attention in ("eager", "sdpa") if same else ("eager",):
        model = pk.adapt(make(attention), pk.PrefixTuning(length=5))
        train_a_little(model)
        follows_the_formula(model, make("eager"))


def test_an_attention_that_would_pass_over_it_is_refused():
    sizes = {"vocab_size": 99, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    model = MvpForConditionalGeneration(MvpConfig(**sizes, **heads)).eval()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(InputError, match="self_attn' is a MvpAttention, .* expected another method"):
        pk.adapt(model, pk.PrefixTuning(length=2))
    assert names == [name for name, _ in model.named_modules()]


def test_decoder_stays_causal_and_padding_stays_hidden(family):
    """Without padding sdpa gets no mask and makes a causal one itself; with padding it gets one."""
    model = prefixed(family)
    for padded in (False, True):
        inputs = batch(model)
        if not padded:
            inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        before = logits(model, inputs)
        changed = {key: tensor.clone() for key, tensor in inputs.items()}
        changed["decoder_input_ids"][:, 3:] = 7
        after = logits(model, changed)
        torch.testing.assert_close(after[:, :3], before[:, :3])
        assert not torch.allclose(after[:, 3:], before[:, 3:], atol=1e-2)
        if padded:
            changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
            changed["input_ids"][1, 4:] = 7
            torch.testing.assert_close(logits(model, changed), before)


def test_each_attention_kind_has_its_effect(model):
    pk.adapt(model, pk.PrefixTuning(length=5))
    full = logits(model)
    for kind in ("encoder", "decoder", "cross"):
        without = copy.deepcopy(model)
        for where in describe(without).attentions:
            if where.kind == kind:
                without.get_submodule(where.path).petl.active = None
        assert not torch.allclose(logits(without), full, atol=1e-3), kind


def test_fold_keeps_outputs_and_drops_the_mlp(family):
    model = prefixed(family)
    before, state = logits(model), adapter_state(model, "default")
    trained = sum(p.numel() for p in pk.trainable_parameters(model))
    fold(model, "default")
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=1e-6)
    assert pk.report(model).trained == pk.report(model).stored < trained
    assert all(torch.equal(tensor, state[key]) for key, tensor in adapter_state(model, "default").items())
    fold(model, "default")  # nothing left to do
    train_a_little(model)  # and it trains on
    assert not torch.allclose(logits(model), before, atol=1e-3)
    with pytest.raises(InputError, match="adapter 'x': not on this model, which has default"):
        fold(model, "x")
    pk.adapt(model, pk.LoRA(rank=2), name="lora")
    with pytest.raises(InputError, match="adapter 'lora': not a prefix"):
        fold(model, "lora")


def test_loading_folds(family):
    model = prefixed(family)
    other = pk.adapt(build(family), pk.PrefixTuning(length=5))
    load_adapter_state(other, "default", adapter_state(model, "default"))
    torch.testing.assert_close(logits(other), logits(model), atol=1e-6, rtol=1e-6)
    assert pk.report(other).trained == pk.report(other).stored


@pytest.mark.parametrize("attention", ("eager", "sdpa"))
@pytest.mark.parametrize("folded", (False, True), ids=("mlp", "folded"))
def test_beam_search_equals_no_cache(family, attention, folded):
    model = prefixed(family, attention)
    if folded:
        fold(model, "default")
    inputs = {key: tensor for key, tensor in batch(model).items() if key != "decoder_input_ids"}
    settings = {"num_beams": 4, "max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    cached = model.generate(**inputs, **settings, use_cache=True)
    assert torch.equal(cached, model.generate(**inputs, **settings, use_cache=False))
    lone = model.generate(input_ids=inputs["input_ids"][1:2, :4], **settings)  # the padded row alone, without padding
    assert torch.equal(lone[0], cached[1])


def test_attention_weights_keep_their_shape(family):
    model = prefixed(family, "eager")
    with torch.no_grad():
        out = model(**batch(model), output_attentions=True, use_cache=False)
    assert out.cross_attentions[0].shape[-2:] == (5, 7)
    assert out.cross_attentions[0].sum(-1).max() < 1  # the prefix has its part


def test_switching_to_the_base_and_back(family):
    model, plain = prefixed(family), logits(build(family))
    adapted = logits(model)
    pk.use_adapter(model, None)
    assert torch.equal(logits(model), plain)
    pk.adapt(model, pk.PrefixTuning(length=3), name="other")
    assert not torch.allclose(logits(model), adapted, atol=1e-3)
    pk.use_adapter(model, "default")
    assert torch.equal(logits(model), adapted)


def test_refuses_other_attention_implementations(model):
    pk.adapt(model, pk.PrefixTuning(length=3))
    set_attention(model, "eager")
    with pytest.raises(InputError, match="attention implementation 'eager': .* expected petl_prefix_eager"):
        logits(model)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(InputError, match="'flex_attention', expected 'eager' or 'sdpa'"):
        pk.adapt(model, pk.PrefixTuning(length=3), name="b")
    with pytest.raises(InputError, match="prefix length 0"):
        pk.PrefixTuning(length=0)
