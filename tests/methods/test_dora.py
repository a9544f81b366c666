"""DoRA: LoRA whose rows have lengths of their own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import petl_kernels as pk
from petl_kernels.errors import InputError
from petl_kernels.layers.rule.call import Call
from petl_kernels.layers.rule.linears import Linear
from petl_kernels.methods import adapter_state
from petl_kernels.methods.lora import LoRALinear
from petl_kernels.weights.quantized import quantize_model

from .models import build, logits, train_a_little

FP64 = torch.float64


def shaken(model: nn.Module, seed: int = 5) -> nn.Module:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in pk.trainable_parameters(model):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw).to(parameter))
    return model


def layer(dtype=FP64, bias=True, **place) -> LoRALinear:
    """A linear with DoRA, away from its start."""
    torch.manual_seed(1)
    linear = LoRALinear.wrap(nn.Linear(13, 9, bias=bias).to(dtype)).requires_grad_(False)
    linear.add("default", 3, 1.5, magnitude=linear.weight.detach().to(dtype if dtype == FP64 else None).norm(dim=1))
    linear.lora.active = "default"
    return shaken(linear)


def formula(x, weight, bias, a, b, m, scale=1.5):
    changed = weight + scale * b @ a
    y = (m / changed.norm(dim=1).detach())[:, None] * changed
    return F.linear(x, y, bias)


@pytest.mark.parametrize("bias", [True, False])
def test_computes_the_formula_with_its_gradients(bias):
    linear = layer(bias=bias)
    piece = linear.lora["default"]
    own = {"A": piece.A, "B": piece.B, "magnitude": piece.magnitude}
    x, dy = torch.randn(2, 4, 13, dtype=FP64, requires_grad=True), torch.randn(2, 4, 9, dtype=FP64)
    y = linear(x)
    expected = formula(x, linear.weight, linear.bias, *own.values())
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        *(torch.autograd.grad(result, [x, *own.values()], dy) for result in (y, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_starts_at_the_norms_and_counts_them(model):
    config = pk.LoRA(rank=3, dora=True)
    without, count = pk.LoRA(rank=3).count(model), config.count(model)
    pk.adapt(model, config)
    state = adapter_state(model, "default")
    lengths = {key: tensor for key, tensor in state.items() if key.endswith("lora_magnitude_vector")}
    assert len(lengths) == len(config.target_paths(model)) == len(state) / 3
    assert count - without == sum(tensor.numel() for tensor in lengths.values())
    for key, tensor in lengths.items():
        weight = model.get_submodule(key.rpartition(".")[0]).weight
        torch.testing.assert_close(tensor, weight.detach().norm(dim=1))


def test_a_budget_has_the_lengths():
    model = build("m2m100")
    config = pk.methods.METHODS["dora"].for_budget(model, 5000)
    assert config.dora and config.count(model) <= 5000
    more = pk.LoRA(rank=config.rank + 1, dora=True)
    assert more.count(model) > 5000 >= config.count(model)


def test_merges_and_comes_back(family, tmp_path):
    model = build(family).double()
    paths = pk.LoRA(dora=True).target_paths(model)
    pk.adapt(model, pk.LoRA(rank=3, dora=True))
    shaken(model)
    linear, adapted = model.get_submodule(paths[0]), logits(model)
    piece = linear.lora["default"]
    merged = linear.weight + piece.stored_scale * piece.B @ piece.A
    merged = piece.magnitude[:, None] * merged / merged.norm(dim=1, keepdim=True)
    pk.merge(model)
    torch.testing.assert_close(model.get_submodule(paths[0]).weight, merged.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-6, atol=1e-6)  # T5's norms are in fp32
    pk.unmerge(model)
    assert torch.equal(logits(model), adapted)


def test_one_linear_merges():
    linear = layer()
    x = torch.randn(4, 13, dtype=FP64)
    adapted = linear(x)
    linear.merge()
    torch.testing.assert_close(linear(x), adapted, rtol=1e-12, atol=1e-12)
    linear.unmerge()
    assert torch.equal(linear(x), adapted)


def test_linears_that_read_one_input():
    """One with DoRA, one with LoRA: as one by one."""
    first, second = layer(), LoRALinear.from_linear(nn.Linear(13, 7).double(), rank=2)
    nn.init.normal_(second.lora["default"].B)
    x = torch.randn(4, 13, dtype=FP64)
    for together, alone in zip(pk.nn.GroupedLoRALinear([first, second])(x), (first(x), second(x)), strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-13, atol=1e-13)


def test_the_norm_is_that_of_the_weight_of_now():
    """Weights that are assigned or changed in place, in a lean layer that has run before."""
    model = pk.lean(shaken(pk.adapt(build("m2m100").double(), pk.LoRA(rank=2, dora=True))), 2)
    logits(model)
    with torch.no_grad():
        model.model.encoder.layers[0].self_attn.q_proj.weight.mul_(1.5).add_(0.01)
        value = model.model.decoder.layers[1].encoder_attn.v_proj
        value.weight = nn.Parameter(value.weight.flip(0), requires_grad=False)
    found = logits(model)
    torch.testing.assert_close(found, logits(pk.lean(copy.deepcopy(model), 0)), rtol=1e-9, atol=1e-9)
    fresh = build("m2m100").double()
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if ".lora." not in k}, strict=False)
    pk.adapt(fresh, pk.LoRA(rank=2, dora=True))
    pk.methods.load_adapter_state(fresh, "default", adapter_state(model, "default"))
    torch.testing.assert_close(found, logits(fresh), rtol=1e-9, atol=1e-9)


def test_beside_an_adapter_that_trains_the_weight(family):
    """m starts at the base's norms, and the base's are those that it divides by, whatever another adapter holds."""
    model = build(family)
    base = logits(model)
    pk.adapt(model, pk.FullFineTuning(), name="full")
    train_a_little(model)
    pk.adapt(model, pk.LoRA(rank=2, dora=True), name="dora")
    assert torch.equal(logits(model), base)
    shaken(model)
    adapted = logits(model)
    pk.use_adapter(model, "full")
    assert not torch.allclose(logits(model), adapted, atol=1e-2)
    pk.use_adapter(model, "dora")
    assert torch.equal(logits(model), adapted)


def test_small_changes_of_a_length_count_in_16_bits():
    """A factor of 1.003 is 1 in bf16. The linear and the rule of a lean layer compute the same."""
    model = pk.adapt(build("m2m100").bfloat16(), pk.LoRA(rank=2, dora=True))
    out = model.model.encoder.layers[0].self_attn.v_proj
    nn.init.normal_(out.bias)
    x, bias = torch.randn(500, 32).bfloat16(), out.bias.double()
    with torch.no_grad():
        raw = out(x)
        assert torch.equal(raw, F.linear(x, out.weight, out.bias))
        out.lora["default"].magnitude.mul_(1.003)
        found, by_rule = out(x), Linear("v", out).scaled(raw, Call(2, x))
    assert torch.equal(found, by_rule) and (found != raw).double().mean() > 0.2
    exact = bias + 1.003 * (raw - bias)
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=0)  # half a unit, of a sum in fp32


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_an_untrained_adapter_follows_where_the_base_is_quantized(storage):
    model = pk.adapt(build("mbart"), pk.LoRA(rank=2, dora=True), name="trained")
    shaken(model)
    pk.adapt(model, pk.LoRA(rank=2, dora=True), name="new")
    before = adapter_state(model, "trained")["model.encoder.layers.0.self_attn.q_proj.lora_magnitude_vector"].clone()
    quantize_model(model, storage)
    adapted = logits(model)
    assert torch.equal(adapted, logits(pk.use_adapter(model, None)))
    after = adapter_state(model, "trained")["model.encoder.layers.0.self_attn.q_proj.lora_magnitude_vector"]
    assert torch.equal(after, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dora": 1}, "lora dora 1: expected True or False"),
        ({"dora": True, "dropout": 0.1}, "lora dropout 0.1 with dora: .*; expected 0"),
        ({"dora": True, "dropout": 1.0}, "lora dropout 1.0 with dora: .*; expected 0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(InputError, match=message):
        pk.LoRA(**settings)


def test_what_it_cannot_be_on():
    model = build("m2m100")
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight[4] = 0
    kinds = {name: type(module) for name, module in model.named_modules()}
    for targets, message in (
        (("embed_tokens",), "lora target '.*embed_tokens' with dora: an embedding, expected linear layers"),
        (("q_proj", "fc1"), r"lora target 'model.decoder.layers.0.fc1' with dora: row 4 is zeros"),
    ):
        with pytest.raises(InputError, match=message):
            pk.adapt(model, pk.LoRA(rank=2, dora=True, targets=targets))
        assert {name: type(module) for name, module in model.named_modules()} == kinds
    pk.adapt(model, pk.LoRA(rank=2, dora=True))
    with pytest.raises(InputError, match="dropout 0.5 with dora"):
        model.model.decoder.layers[0].self_attn.q_proj.lora["default"].dropout = 0.5
