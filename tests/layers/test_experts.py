"""NLLB-MoE: layers are lean but for their experts, which run as the model's own, and so do the routers' losses."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from methods.models import _BART, batch
from torch import nn
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

import petl_kernels as pk
from petl_kernels.accounting.saved import saved_bytes
from petl_kernels.errors import InputError
from petl_kernels.layers import recompute
from petl_kernels.layers.families.m4t import LeanM4TLayer
from petl_kernels.layers.lean import LeanLayer
from petl_kernels.methods import METHODS
from petl_kernels.models.structure import describe
from petl_kernels.models.transformers_names import cache_of
from petl_kernels.planning.levers import Request
from petl_kernels.planning.planner import card_planner, plan_search
from petl_kernels.weights.streamed import stream_layers

from .lean_cases import DROPOUT, SETTINGS, TIERS, distance, ragged, step, without_recomputation, worst

EXPERTS = ("encoder.layers.1", "decoder.layers.1")
_ROUTED = {"num_experts": 3, "expert_capacity": 8, "router_jitter_noise": 0.0, "moe_token_dropout": 0.0}


def model_of(method: str = "lora", **settings) -> nn.Module:
    """Returns an adapted model in training mode and float64; the second layer of each side has experts."""
    torch.manual_seed(7)
    given = {**_BART, **_ROUTED, "activation_dropout": 0.0, "pad_token_id": 1}
    given |= {"encoder_sparse_step": 2, "decoder_sparse_step": 2, **settings}
    model = NllbMoeForConditionalGeneration(NllbMoeConfig(**given, router_dtype="float32"))
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


FEW = ("lora", "adapter", "prefix", "full")


@pytest.mark.parametrize(
    "method",
    [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "parallel"],
)
@pytest.mark.parametrize("routers", [pytest.param(False, marks=pytest.mark.repeat), True])
def test_loss_and_gradients(method, routers):
    """With the routers' losses and without; only methods that train all of the base, or all its biases, reach
    experts."""
    model = model_of(method, output_router_logits=routers)
    inputs = ragged(model)
    plain = step(pk.lean(model, 0), inputs)
    for tier in TIERS:
        found = step(pk.lean(model, tier), inputs)
        difference, name = worst(found, plain)
        assert difference < 1e-9, (tier, name, difference)
    for state in pk.report(model).layers:
        assert (state.tier, state.reason, state.composed) == (5, "", "")
        assert state.own == ("a feed-forward network of experts" if state.path.endswith(EXPERTS) else "")
    if method != "full" and not method.startswith("bitfit"):
        assert not any(in_experts(name) for name in plain)


# What a router and its experts draw at random, or leave out.
ROUTERS = {
    "few places": {"expert_capacity": 2},
    "the likely ones first": {"expert_capacity": 2, "batch_prioritized_routing": True},
    "a second expert by chance": {"second_expert_policy": "random"},
    "a second expert by Gumbel": {"second_expert_policy": "sampling"},
    "padding has places": {"router_ignore_padding_tokens": True, "expert_capacity": 3},
    "tokens are dropped": {"moe_token_dropout": 0.3},
}


@pytest.mark.parametrize("router", ROUTERS)
def test_choices_are_the_routers_own(router):
    """Where nothing else is drawn, the experts draw what those of the plain model do, in backward too."""
    model = model_of(output_router_logits=True, **ROUTERS[router])
    inputs = ragged(model)
    plain = step(model, inputs)
    for tier in TIERS:
        difference, name = worst(step(pk.lean(model, tier), inputs), plain)
        assert difference < 1e-9, (tier, name, difference)
    if "expert_capacity" not in ROUTERS[router]:  # it draws something
        assert worst(step(model, inputs, seed=6), plain)[0] > 1e-3


def test_evaluation_with_gradients():
    """In evaluation mode an expert has places for a share of the batch, which the router notes at each call."""
    model = model_of(moe_token_dropout=0.3, moe_eval_capacity_token_fraction=0.3).eval()
    inputs = ragged(model)
    plain = step(model, inputs)
    for tier in TIERS:
        difference, name = worst(step(pk.lean(model, tier), inputs), plain)
        assert difference < 1e-9, (tier, name, difference)
    assert model.model.encoder.layers[1].ffn.router.expert_capacity == 7  # of 3 · 7 tokens


@pytest.mark.parametrize("method", ["lora", "full", pytest.param("adapter-sublayer", marks=pytest.mark.repeat)])
def test_dropout(method):
    model = model_of(method, **DROPOUT, moe_token_dropout=0.2)
    inputs = ragged(model)
    plain = step(without_recomputation(pk.lean(model, 1)), inputs)
    assert worst(step(pk.lean(model, 1), inputs, seed=6), plain)[0] > 1e-3
    for tier in TIERS:
        difference, name = worst(step(pk.lean(model, tier), inputs), plain)
        assert difference < 1e-10, (tier, name, difference)


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.repeat)])
def test_op_by_op_gives_the_same(method, monkeypatch):
    model = model_of(method, second_expert_policy="random", output_router_logits=True)
    inputs = ragged(model)
    plain = step(pk.lean(model, 0), inputs)
    monkeypatch.setattr(LeanLayer, "_rule", lambda self, *_, **__: None)
    for tier in TIERS:
        difference, name = worst(step(pk.lean(model, tier), inputs), plain)
        assert difference < 1e-9, (tier, name, difference)


@pytest.mark.parametrize("tier", [1, 2, pytest.param(5, marks=pytest.mark.repeat)])
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "autocast"])
def test_sixteen_bits(precision, tier):
    """The error against float64 is at most twice the plain model's own."""
    exact = model_of()
    inputs = ragged(exact, rows=6)
    expected = step(exact, inputs)
    model = copy.deepcopy(exact).float()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        if precision != "autocast":
            model.to(getattr(torch, precision))
        plain = distance(step(model, inputs), expected)
        assert plain < 0.2
        assert distance(step(pk.lean(model, tier), inputs), expected) <= 2 * plain


def test_what_a_layer_saves():
    """In bytes a token for fp32: the rule's table, and beside it what its experts read; see ``layers/experts.py``."""
    model = model_of(dropout=0.1, activation_dropout=0.1).float()
    layer, d = model.model.encoder.layers[1], model.config.d_model
    heads, tokens = model.config.encoder_attention_heads, 2 * 5
    x = torch.randn(2, 5, d, requires_grad=True)
    statistics, latent, block = 4 * 2, 4 * 2 * 3, 4 * d  # a norm's, LoRA's, a tensor like x
    always = statistics + latent + block + 4 * heads + block  # o, lse and the input of the experts
    for tier, expected in {2: always, 3: always, 4: block, 5: 0}.items():
        pk.lean(model, tier)
        layer(x, None)  # a router casts its classifier at its first call
        with saved_bytes([*model.parameters(), x]) as saved:
            layer(x, None)
        assert saved.bytes == expected * tokens + 8, tier  # 8: the seed of the last dropout
    with saved_bytes([*model.parameters(), x]) as plain:
        layer.ffn(layer.ff_layer_norm(x), None)
    pk.lean(model, 1)
    with saved_bytes([*model.parameters(), x]) as saved:
        layer(x, None)
    assert saved.bytes > (always + 3 * block) * tokens + plain.bytes // 2


@pytest.mark.parametrize("change", ["mode", "places", "weight"])
def test_experts_are_not_run_again_as_others(change):
    """Other choices in backward than in the forward pass would be other gradients."""
    model = pk.lean(model_of(), 2)
    loss = model(**ragged(model)).loss
    ffn = model.model.decoder.layers[1].ffn
    if change == "mode":
        model.eval()
    elif change == "places":
        ffn.router.expert_capacity = 1
    else:
        with torch.no_grad():
            ffn.experts["expert_1"].fc2.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"model\.decoder\.layers\.1.*backward computes it again"):
        loss.backward()


def test_hooks_on_experts_run_and_leave_the_layer_lean():
    model = pk.lean(model_of(), 1)
    calls = []
    layer = model.model.encoder.layers[1]
    layer.ffn.router.register_forward_hook(lambda *_: calls.append("router"))
    layer.ff_layer_norm.register_forward_hook(lambda *_: calls.append("norm"))
    model(**ragged(model)).loss.backward()
    assert calls == ["norm", "router"] and {state.tier for state in pk.report(model).layers} == {1}
    layer.self_attn.register_forward_hook(lambda *_: calls.append("attention"))
    assert [state.reason for state in pk.report(model).layers] == ["", "a hook on self_attn", "", ""]


def test_a_change_of_a_layer_is_seen():
    """Rules hold modules, which are compared at each call: another network or rate is that of the next call."""
    model = pk.lean(model_of(), 2)
    layer, x = model.model.encoder.layers[1], torch.randn(2, 5, model.config.d_model, dtype=torch.float64)
    before = layer(x, None)
    own, layer.ffn = layer.ffn, copy.deepcopy(layer.ffn)
    torch.testing.assert_close(layer(x, None), before)
    with torch.no_grad():
        for parameter in layer.ffn.parameters():
            parameter.zero_()
    assert not torch.equal(layer(x, None), before)
    layer.ffn, layer.ff_dropout.p = own, 0.9
    assert not torch.equal(layer(x, None), before)


def test_gradients_through_the_keys_of_a_cache():
    model = model_of()
    inputs = ragged(model)

    def gradients():
        output = model(**inputs, use_cache=True)
        caches = cache_of(output).self_attention_cache, cache_of(output).cross_attention_cache
        keys = sum(layer.keys.square().mean() + layer.values.sin().mean() for own in caches for layer in own.layers)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        found = torch.autograd.grad(output.loss + keys, pk.trainable_parameters(model))
        return dict(zip(names, found, strict=True))

    expected = gradients()
    for tier in TIERS:
        pk.lean(model, tier)
        difference, name = worst(gradients(), expected)
        assert difference < 1e-9, (tier, name, difference)


@pytest.mark.parametrize("tier", [2, 5])
def test_random_numbers_are_those_of_the_device(tier, monkeypatch):
    """A checkpoint keeps those of its arguments' devices, and there need be no mask among these."""
    seen = []

    def checkpoint(fn, *inputs, **options):
        seen.append([own.device.type for own in inputs if isinstance(own, torch.Tensor)])
        return fn(*inputs)

    monkeypatch.setattr(recompute, "checkpoint", checkpoint)
    model = pk.lean(model_of(), tier)
    model.model.encoder.layers[1](torch.randn(2, 5, 32, dtype=torch.float64), None)
    assert seen == [["cpu"]]


@pytest.mark.parametrize("tier", [1, 2, 5])
def test_a_streamed_model(tier, tmp_path):
    """The linears of attentions and dense networks are streamed; experts stay in memory."""
    model = pk.lean(model_of().float(), tier)
    inputs = ragged(model)
    expected = step(model, inputs)
    stream_layers(model, folder=tmp_path)
    found = step(model, inputs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_experts_that_transformers_runs():
    """Its experts take the router's mask for their numbers (docs/reference/models.md). Once they do not, this fails."""
    ffn = model_of(num_experts=6).get_submodule("model.encoder.layers.1.ffn")
    rows = {}
    for i in range(6):
        hook = partial(lambda i, _, args, __: rows.update({i: len(args[0])}), i)
        ffn.experts[f"expert_{i}"].register_forward_hook(hook)
    ffn(torch.randn(2, 3, 32, dtype=torch.float64), None)
    assert rows == {0: 5 * 6, 1: 6}


def test_packed_rows_are_refused():
    """Which tokens experts have places for depends on the other rows, and on padding: in the plain model, too."""
    model = pk.lean(model_of(expert_capacity=2), 1)
    row = pk.pack([([5, 6, 7], [5, 6, 2]), ([8, 9], [7, 2])])
    with pytest.raises(InputError, match=r"^cu_seqlens: .* \(a feed-forward network of experts, which have places for"):
        model(**row)
    inputs = ragged(pk.lean(model, 0))
    alone = {name: value[:1] for name, value in inputs.items()}
    together, one = (model(**given).logits[0, :, :] for given in (inputs, alone))
    assert (together - one).abs().max() > 1e-3


def test_report_names_what_is_the_models_own():
    lines = str(pk.report(pk.lean(model_of(), 3)))
    assert "lean: 4 of 4 layers at tier 3" in lines
    assert "the model's own in: model.encoder.layers.1 and 1 more: a feed-forward network of experts" in lines


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
    plans = (
        lambda: pk.plan(model, "1GiB", 64),
        lambda: pk.lean(model, "auto"),
        lambda: card_planner(model, Request(64, 8, device=torch.device("cuda"))),
        lambda: plan_search(model, 2**30, ("dense", "dense"), 2, 8, torch.device("cpu")),
    )
    for plan in plans:
        with pytest.raises(InputError, match=r"model.encoder.layers.1.ffn is a network of experts, and no plan counts"):
            plan()


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
