"""T5Gemma's lean layers: what they save, dropout, 16 bits, caches and searches, and what lets their own forward run.

Gradients of every method in every tier are in ``test_lean_exact.py``.
"""

from __future__ import annotations

import copy

import pytest
import torch
from methods.models import batch, build
from torch import nn

import petl_kernels as pk
from petl_kernels.accounting.saved import saved_bytes
from petl_kernels.errors import InputError
from petl_kernels.layers import border
from petl_kernels.layers.rotary import Rotary, rotated, rotated_back
from petl_kernels.weights.quantized import quantize_model

from .lean_cases import adapted, borders, ragged, step, without_recomputation, worst

TIERS = (1, 2, 3, 4, 5)
NORMS = {f"{block}.rstd" for block in ("self", "self.post", "ffn", "ffn.post")}
ALWAYS = NORMS | {"self.o", "ffn.end"}
QKV = {"self.q", "self.k", "self.v"}
# method -> tier -> names of the tensors that an encoder layer saves beside its input.
TABLE = {
    "lora": {
        1: ALWAYS | QKV | {"self.qkv.latent0", "self.read", "ffn.z", "ffn.gate"},
        2: ALWAYS | {"self.qkv.latent0", "self.read"},
        3: ALWAYS | {"self.qkv.latent0"},
        4: set(),
        5: set(),
    },
    "adapter-sublayer": {
        1: ALWAYS - {"ffn.end"} | QKV | {"self.read", "ffn.adapted_read", "ffn.z", "ffn.gate"},
        2: ALWAYS - {"ffn.end"} | {"self.read", "ffn.adapted_read"},
        3: ALWAYS - {"ffn.end"} | {"ffn.adapted_read"},
    },
}


def first_layer(model: nn.Module) -> nn.Module:
    return model.get_encoder().layers[0]


def rotary_of(model: nn.Module, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.zeros(1, tokens, model.config.encoder.hidden_size, dtype=model.dtype)
    return model.get_encoder().rotary_emb(x, torch.arange(tokens)[None])


def saved(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns what the first encoder layer saves beside its input and the trained tensors, by name."""
    x = torch.randn(2, 5, 32, dtype=model.dtype, requires_grad=True)
    node = first_layer(model)(x, rotary_of(model, 5)).grad_fn
    return dict(zip(node.names, node.saved_tensors[len(node.saved_tensors) - len(node.names) :], strict=True))


@pytest.mark.parametrize("method", TABLE)
def test_a_tier_saves_the_names_of_the_table(method):
    model = adapted("t5gemma", method)
    for tier, names in TABLE[method].items():
        assert set(saved(pk.lean(model, tier))) == names, tier


def test_bytes_of_the_table():
    """In bytes a token for fp32: d = 32, 4 heads and 2 groups of 12 features, 56 hidden units."""
    model = pk.lean(adapted("t5gemma", "lora", dtype=torch.float32), 1)
    sizes = {"q": 4 * 48, "k": 4 * 24, "v": 4 * 24, "o": 4 * 48, "read": 4 * 32, "end": 4 * 32, "rstd": 4}
    sizes |= {"latent0": 4 * 2 * 3, "z": 4 * 56, "gate": 4 * 56}
    for name, tensor in saved(model).items():
        assert tensor.nbytes / 10 == sizes[name.rpartition(".")[2]], name


def test_each_tier_saves_less_than_the_one_before():
    """Of a whole step, loss included; the plain model saves scores and logits as well."""
    model = adapted("t5gemma", "lora", dtype=torch.float32)
    inputs, found = ragged(model), []
    for tier in (0, *TIERS[:4]):
        pk.lean(model, tier)
        with saved_bytes(exclude=[*model.parameters()]) as counted:
            loss = model(**inputs).loss
        found.append(counted.bytes)
        del loss
    assert all(more > fewer for more, fewer in zip(found, found[1:], strict=False)), found
    assert found[2] < found[0] / 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "adapter-sublayer", "parallel", "prefix", "full"])
def test_dropout(method):
    """Each layer's rule draws the masks of the ops that it stands for: all tiers agree with autograd over those ops."""
    model = adapted("t5gemma", method, dropout_rate=0.2, attention_dropout=0.15)
    inputs = ragged(model)
    plain = step(without_recomputation(pk.lean(model, 1)), inputs)
    assert worst(step(pk.lean(model, 1), inputs, seed=6), plain)[0] > 1e-3  # other masks, another loss
    for tier in TIERS:
        difference, name = worst(step(pk.lean(model, tier), inputs), plain)
        assert difference < 1e-10, (tier, name, difference)


def test_ssf_behind_the_norms_of_outputs():
    """By the rule and op by op; T5Gemma is the family with norms that no block reads."""
    model = adapted("t5gemma", "ssf")
    inputs = ragged(model)
    plain = step(model, inputs)
    assert worst(step(without_recomputation(pk.lean(copy.deepcopy(model), 1)), inputs), plain)[0] < 1e-9
    for tier in TIERS:
        assert worst(step(pk.lean(model, tier), inputs), plain)[0] < 1e-9, tier
        states = pk.report(model).layers
        assert all((state.tier, state.reason, state.composed) == (tier, "", "") for state in states), states[0]


def test_rates_are_those_of_the_model():
    model = pk.lean(adapted("t5gemma", "lora", dropout_rate=0.2, attention_dropout=0.15), 1)
    for layer in (*model.get_encoder().layers, *model.get_decoder().layers):
        for rates in ((0.15, 0.2), (0.0, 0.0)):
            attentions, ffn = layer.blocks(True)
            assert all((own.dropout, own.residual_dropout) == rates for own in attentions)
            assert (ffn.dropout, ffn.residual_dropout) == (rates[1], rates[1])
            layer.eval()


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("tier", [1, 3, pytest.param(4, marks=pytest.mark.repeat)])
def test_sixteen_bits(precision, tier):
    """The error against float64 is at most twice the plain model's own."""
    exact = adapted("t5gemma", "lora")
    inputs = ragged(exact, rows=6)
    expected = step(exact, inputs)
    model = copy.deepcopy(exact).float()
    del model._loss_function
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        if precision != "autocast":
            model.to(getattr(torch, precision))
        plain = distance(step(model, inputs), expected)
        assert plain < 0.2
        lean = distance(step(pk.lean(copy.deepcopy(model), tier), inputs), expected)
    assert lean <= 2 * plain, (lean, plain)
    layers = pk.report(pk.lean(model, tier)).layers
    assert all(state.tier == tier and (precision == "autocast" or not state.composed) for state in layers)


def distance(found: dict, expected: dict) -> float:
    names = [name for name in expected if name != "loss"]
    difference = sum((found[name].double() - expected[name]).square().sum() for name in names)
    return (difference / sum(expected[name].square().sum() for name in names)).sqrt().item()


def test_dtypes_are_the_plain_models():
    for dtype in (torch.bfloat16, torch.float32):
        model = adapted("t5gemma", "lora", dtype=dtype)
        inputs = ragged(model)
        outputs = [own(**inputs, output_hidden_states=True) for own in (model, pk.lean(copy.deepcopy(model), 2))]
        for one, other in zip(*(output.encoder_hidden_states for output in outputs), strict=True):
            assert one.dtype == other.dtype == dtype
            torch.testing.assert_close(one, other, rtol=0.1, atol=0.1)


def test_op_by_op_where_the_rule_does_not_serve():
    """A layer with a module of another class in the place of a linear."""

    class Other(nn.Linear):
        pass

    for method in ("lora", "adapter-sublayer", "prefix"):
        model = adapted("t5gemma", method)
        for layer in (*model.get_encoder().layers, *model.get_decoder().layers):
            layer.mlp.up_proj.__class__ = Other
        inputs = ragged(model)
        plain = step(pk.lean(model, 0), inputs)
        for tier in TIERS:
            found = step(pk.lean(model, tier), inputs)
            assert all("Other" in state.composed for state in pk.report(model).layers)
            difference, name = worst(found, plain)
            assert difference < 1e-9, (method, tier, name, difference)


@pytest.mark.slow
def test_compiled():
    torch._dynamo.reset()
    model = pk.lean(adapted("t5gemma", "lora"), 2)
    inputs = ragged(model)
    plain = step(pk.lean(copy.deepcopy(model), 0), inputs)
    difference, name = worst(step_of(torch.compile(model, backend="aot_eager"), model, inputs), plain)
    assert difference < 1e-9, (name, difference)


def step_of(compiled, model: nn.Module, inputs: dict) -> dict:
    model.zero_grad(set_to_none=True)
    loss = compiled(**inputs).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["lora", "prefix"])
@pytest.mark.parametrize("beams", [1, 3])
def test_search_finds_the_same_words(method, beams):
    model = adapted("t5gemma", method, dtype=torch.float32).eval()
    inputs = batch(model)
    del inputs["decoder_input_ids"]
    model.lm_head.out_proj.weight = nn.Parameter(torch.randn(99, 32, generator=torch.Generator().manual_seed(2)))
    options = {"num_beams": beams, "do_sample": False, "max_new_tokens": 12}
    found = [pk.lean(model, tier).generate(**inputs, **options) for tier in (0, 1)]
    assert torch.equal(*found) and len(found[0].unique()) > 6


def test_a_cache_that_is_filled_in_training():
    """Keys are turned by their positions there, and gradients that come through them count."""
    model = adapted("t5gemma", "lora").eval()
    results = []
    for tier in (0, 1, 3, 4):
        model.zero_grad()
        output = pk.lean(model, tier)(**batch(model), use_cache=True)
        layers = [*output.cache.self_attention_cache.layers, *output.cache.cross_attention_cache.layers]
        held = [own for layer in layers for own in (layer.keys, layer.values)]
        (output.logits.square().mean() + sum(own.square().mean() for own in held)).backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append([output.logits.detach(), *(own.detach() for own in held), *grads])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two)


def test_a_longer_source_than_the_window_is_masked():
    model = adapted("t5gemma", "lora")
    inputs = {name: own.repeat(1, 4) for name, own in ragged(model).items() if name != "decoder_attention_mask"}
    plain = step(pk.lean(model, 0), inputs)
    wide = copy.deepcopy(model)
    wide.config.encoder.sliding_window = 99
    assert worst(step(wide, inputs), plain)[0] > 1e-3  # the window has an effect
    assert worst(step(pk.lean(model, 2), inputs), plain)[0] < 1e-9


@pytest.mark.parametrize("cap", [None, 2.0])
def test_without_caps_and_masks(cap):
    model = adapted("t5gemma", "full", attn_logit_softcapping=cap, final_logit_softcapping=cap)
    inputs = {name: own for name, own in ragged(model).items() if "mask" not in name}
    inputs["input_ids"] = inputs["input_ids"].clamp(min=3)
    plain = step(pk.lean(model, 0), inputs)
    for tier in (1, 3):
        assert worst(step(pk.lean(model, tier), inputs), plain)[0] < 1e-9


def test_attentions_and_other_functions_are_the_models_own():
    model = adapted("t5gemma", "lora")
    inputs = ragged(model)
    outputs = [pk.lean(model, tier)(**inputs, output_attentions=True) for tier in (0, 2)]
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        for one, other in zip(*(output[name] for output in outputs), strict=True):
            torch.testing.assert_close(one, other)
    for stack in (model.get_encoder(), model.get_decoder()):
        stack.config._attn_implementation = "sdpa"
    reasons = {state.reason for state in pk.report(model).layers}
    assert reasons == {"attention implementation 'sdpa', expected eager"}


def test_a_mask_for_each_head_is_left_to_the_layer():
    model = pk.lean(adapted("t5gemma", "lora"), 2)
    x, rotary = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True), rotary_of(model, 5)
    mask = torch.zeros(2, 1, 5, 5, dtype=torch.float64)
    mask[..., 3:] = torch.finfo(mask.dtype).min
    outputs = [first_layer(model)(x, rotary, own) for own in (mask, mask.expand(-1, 4, -1, -1), mask == 0)]
    torch.testing.assert_close(outputs[0], outputs[1])
    assert type(outputs[0].grad_fn).__name__ == "_OneNodeBackward"
    assert all(type(output.grad_fn).__name__ != "_OneNodeBackward" for output in outputs[1:])


def test_packed_rows_are_refused():
    model = pk.lean(adapted("t5gemma", "lora"), 2)
    row = pk.pack([{"input_ids": [5, 6, 7], "labels": [5, 6]}, {"input_ids": [8, 9], "labels": [7]}])
    with pytest.raises(InputError, match="^cu_seqlens: .*T5GemmaEncoder"):
        model(**row)


def test_linears_in_a_border(monkeypatch):
    """q, k and v of different widths stand in one buffer on a card; here a test lets a CPU have it."""
    monkeypatch.setattr(border, "DEVICES", {"cuda", "cpu"})
    model = adapted("t5gemma", "lora")
    inputs = ragged(model)
    plain = step(pk.lean(copy.deepcopy(model), 0), inputs)
    for tier in TIERS:
        found = step(pk.lean(model, tier), inputs)
        assert borders(model) == 2 * ["self.qkv"] + 2 * ["self.qkv", "cross.q", "cross.kv"]
        difference, name = worst(found, plain)
        assert difference < 1e-9, (tier, name, difference)


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_quantized(storage):
    """Lean layers with quantized weights have the gradients of the plain model with the same weights."""
    model = build("t5gemma").double()
    pk.adapt(model, pk.LoRA(rank=2))
    quantize_model(model, storage)
    inputs = ragged(model.train())
    plain = step(pk.lean(model, 0), inputs)
    for tier in (1, 3):
        assert worst(step(pk.lean(model, tier), inputs), plain)[0] < 1e-5  # transformers' norms are fp32


def test_a_change_between_forward_and_backward():
    model = pk.lean(adapted("t5gemma", "lora"), 2)
    loss = model(**ragged(model)).loss
    with torch.no_grad():
        first_layer(model).post_self_attn_layernorm.weight.add_(1)
    with pytest.raises(RuntimeError, match="post_self_attn_layernorm.weight: changed since the forward pass"):
        loss.backward()


def test_rotation_and_its_gradient():
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(1, 5, 3, dtype=torch.float64).repeat(1, 1, 2)
    rotary = Rotary(angles.cos(), angles.sin())
    y, dy = rotated(x, rotary), torch.randn(2, 3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(rotated_back(dy, rotary), torch.autograd.grad(y, x, dy)[0])
    torch.testing.assert_close(rotated_back(rotated(x, rotary), rotary), x)
