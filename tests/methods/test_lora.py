from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import petl_kernels as pk
from petl_kernels.errors import InputError
from petl_kernels.methods import adapter_state

from .models import build, logits, train_a_little


def shake(model) -> None:
    """Adapters away from where they start."""
    torch.manual_seed(5)
    for parameter in pk.trainable_parameters(model):
        nn.init.normal_(parameter, std=0.2)


def targets_of(family: str) -> tuple[str, ...]:
    return ("q", "v", "wi_1") if family == "t5" else ("q_proj", "v_proj", "fc2")


def test_linear_computes_the_formula():
    torch.manual_seed(0)
    linear = nn.Linear(13, 9)
    lora = pk.nn.LoRALinear.from_linear(linear, rank=3, alpha=12)
    assert lora.weight is linear.weight and lora.bias is linear.bias and not lora.weight.requires_grad
    x = torch.randn(2, 5, 13)
    assert torch.equal(lora(x), linear(x))
    piece = lora.lora["default"]
    bound = 1 / 13**0.5  # kaiming_uniform with a = √5
    assert not piece.B.any() and piece.A.abs().max() <= bound and piece.A.std() > 0.4 * bound
    nn.init.normal_(piece.B)
    torch.testing.assert_close(lora(x), linear(x) + 4 * F.linear(F.linear(x, piece.A), piece.B))


def test_linear_merges_and_unmerges():
    torch.manual_seed(0)
    lora = pk.nn.LoRALinear.from_linear(nn.Linear(13, 9), rank=3)
    nn.init.normal_(lora.lora["default"].B)
    x, weight, before = torch.randn(4, 13), lora.weight, lora.weight.clone()
    adapted = lora(x)
    lora.merge()
    torch.testing.assert_close(lora(x), adapted)
    assert lora.weight is not weight
    with pytest.raises(InputError, match="not merged yet"):
        lora.merge()
    lora.unmerge()
    assert lora.weight is weight and torch.equal(weight, before) and torch.equal(lora(x), adapted)
    with pytest.raises(InputError, match="no adapter is merged"):
        lora.unmerge()


def test_linear_drops_in_training_only():
    torch.manual_seed(0)
    lora = pk.nn.LoRALinear.from_linear(nn.Linear(64, 9), rank=3, dropout=0.5)
    nn.init.normal_(lora.lora["default"].B)
    x = torch.randn(4, 64)
    assert not torch.equal(lora(x), lora(x))
    torch.manual_seed(1)
    once = lora(x)
    torch.manual_seed(1)
    assert torch.equal(lora(x), once)
    assert torch.equal(lora.eval()(x), lora(x))


def test_grouped_equals_one_by_one():
    torch.manual_seed(0)
    linears = [nn.Linear(13, out, bias=bias) for out, bias in ((9, True), (4, False), (13, True))]
    grouped = pk.nn.GroupedLoRALinear.from_linears(linears, rank=3, dropout=0.25)
    for linear in grouped.linears:
        nn.init.normal_(linear.lora["default"].B)
    x = torch.randn(2, 5, 13)
    torch.manual_seed(3)
    together = grouped(x)
    for linear, y in zip(grouped.linears, together, strict=True):
        torch.manual_seed(3)
        torch.testing.assert_close(linear(x), y)
    with pytest.raises(InputError, match="at least one"):
        pk.nn.GroupedLoRALinear.from_linears([])


def test_adapted_model_computes_the_formula(family):
    model = pk.adapt(build(family), pk.LoRA(rank=3, alpha=7, targets=targets_of(family)))
    shake(model)
    state = adapter_state(model, "default")
    reference = build(family)
    with torch.no_grad():
        for key, a in state.items():
            if key.endswith(".lora_A"):
                path = key.removesuffix(".lora_A")
                reference.get_submodule(path).weight += 7 / 3 * state[f"{path}.lora_B"] @ a
    torch.testing.assert_close(logits(model), logits(reference), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits(model), logits(build(family)), atol=0.05)


def test_module_paths_and_types_stay(model, family):
    before = {path: type(module) for path, module in model.named_modules()}
    pk.adapt(model, pk.LoRA(rank=3, targets=targets_of(family)))
    now = {path: module for path, module in model.named_modules() if "lora" not in path}
    assert list(now) == list(before)
    assert all(isinstance(now[path], kind) for path, kind in before.items())


def test_ranks_alphas_and_scales_by_pattern():
    config = pk.LoRA(
        rank=4, alpha=8, targets=("q_proj", "fc1"), rank_pattern={"fc1": 2}, alpha_pattern={r"decoder.*\.q_proj": 20}
    )
    plan = config.resolve(build("m2m100"))
    assert plan["model.encoder.layers.0.fc1"] == (2, 4.0)
    assert plan["model.encoder.layers.0.self_attn.q_proj"] == (4, 2.0)
    assert plan["model.decoder.layers.1.encoder_attn.q_proj"] == (4, 5.0)
    assert pk.LoRA(rank=4, alpha=8, rslora=True).resolve(build("m2m100")).popitem()[1] == (4, 4.0)


def test_default_targets_are_q_and_v(model, family):
    names = {path.rpartition(".")[2] for path in pk.LoRA().target_paths(model)}
    assert names == ({"q", "v"} if family == "t5" else {"q_proj", "v_proj"})


# -- merging --------------------------------------------------------------------------------------------------------


def cases(family: str) -> dict[str, tuple[str, ...]]:
    return {
        "layers": targets_of(family),
        "head": ("lm_head",),
        "embeddings": ("embed_tokens",),
        "decoder embeddings": ("decoder.embed_tokens",),
        "both": ("lm_head", "embed_tokens", targets_of(family)[0]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", cases("m2m100"))
def test_merges_ties_included(family, case, tmp_path):
    model = build(family)
    base, before = logits(model), copy.deepcopy(model.state_dict())
    tied = {name: p.data_ptr() for name, p in model.named_parameters(remove_duplicate=False)}
    assert model.lm_head.weight is model.get_input_embeddings().weight
    pk.adapt(model, pk.LoRA(rank=3, alpha=2, targets=cases(family)[case]))
    shake(model)
    adapted = logits(model)
    assert not torch.allclose(adapted, base, atol=0.05)

    pk.merge(model)
    torch.testing.assert_close(logits(model), adapted, atol=1e-5, rtol=1e-5)
    assert pk.trainable_parameters(model) == []
    assert model.config.tie_word_embeddings == (case == "layers")
    model.save_pretrained(tmp_path)  # a plain checkpoint that transformers loads as it is
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    torch.testing.assert_close(logits(again), adapted, atol=1e-5, rtol=1e-5)

    pk.unmerge(model)
    assert torch.equal(logits(model), adapted)
    now = dict(model.named_parameters(remove_duplicate=False))
    assert all(now[name].data_ptr() == pointer for name, pointer in tied.items())
    assert model.config.tie_word_embeddings
    assert pk.trainable_parameters(model)
    pk.use_adapter(model, None)
    assert torch.equal(logits(model), base)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_adapted_embeddings_compute_the_formula(family):
    model = pk.adapt(build(family), pk.LoRA(rank=3, alpha=6, targets=("encoder.embed_tokens",)))
    assert torch.equal(logits(model), logits(build(family)))
    train_a_little(model)
    table = model.get_encoder().embed_tokens
    ids, piece = torch.tensor([[3, 98, 41]]), table.petl["default"]
    plain = table.weight[ids] + 2 * (piece.B @ piece.A).T[ids]
    torch.testing.assert_close(table(ids), plain * getattr(table, "embed_scale", 1.0))


def test_merge_in_bf16_rounds_once():
    model = build("m2m100").to(torch.bfloat16)
    pk.adapt(model, pk.LoRA(rank=3))
    shake(model)
    linear = model.model.encoder.layers[0].self_attn.q_proj
    exact = linear.weight.float() + linear.lora["default"].delta()
    before = linear.weight.clone()
    pk.merge(model)
    assert torch.equal(model.model.encoder.layers[0].self_attn.q_proj.weight, exact.bfloat16())
    pk.unmerge(model)
    assert torch.equal(linear.weight, before)


def test_lora_on_a_linear_that_carries_another_adapter(model, family):
    pk.adapt(model, pk.Adapter(bottleneck=5, placement="sublayer"), name="houlsby")
    train_a_little(model)
    houlsby = logits(model)
    out = ("o", "wo") if family == "t5" else ("out_proj", "fc2")
    pk.adapt(model, pk.LoRA(rank=3, targets=out), name="lora")
    shake(model)
    lora = logits(model)
    pk.use_adapter(model, "houlsby")
    assert torch.equal(logits(model), houlsby)
    pk.use_adapter(model, "lora")
    assert torch.equal(logits(model), lora) and not torch.allclose(lora, houlsby, atol=1e-2)


def test_dropout_of_one_drops_all_of_it():
    """As nn.Dropout(1.0) does: in training the plain layer with gradients of 0, in evaluation the whole adapter."""
    x = torch.randn(5, 64, requires_grad=True)
    linear = nn.Linear(64, 9).eval()
    lora = pk.nn.LoRALinear.from_linear(linear, rank=3, dropout=1.0)
    nn.init.normal_(lora.lora["default"].B)
    (whole,) = pk.nn.GroupedLoRALinear([lora])(x)
    assert (whole - linear(x)).abs().max() > 1e-2  # it came in evaluation mode
    for layer in (lora, pk.nn.GroupedLoRALinear([lora])):
        layer.train()
        y = layer(x)
        y = y if isinstance(y, torch.Tensor) else y[0]
        torch.testing.assert_close(y, linear(x))
        lora.zero_grad()
        dx, dy = torch.autograd.grad(linear(x).sum(), x)[0], torch.ones_like(y)
        torch.testing.assert_close(torch.autograd.grad(y, x, dy, retain_graph=True)[0], dx)
        y.backward(dy)
        assert all(not parameter.grad.any() for parameter in lora.lora.parameters())
    torch.testing.assert_close(lora.eval()(x), whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "lora rank 0: expected a whole number of at least 1"),
        ({"rank": 33}, "lora rank 33: larger than 'model.encoder.layers.0.self_attn.q_proj' .* at most 32"),
        ({"rank_pattern": {"q_proj": 99}}, "lora rank 99: larger than"),
        ({"alpha": 0}, "lora alpha 0: expected a number above 0"),
        ({"alpha_pattern": {"q_proj": -1.0}}, "lora alpha -1.0: expected a number above 0"),
        ({"bias": "all"}, "lora bias 'all': expected 'none' or 'lora_only'"),
        ({"dropout": 1.1}, "lora dropout 1.1: expected a number from 0 to 1"),
        (
            {"dropout": 1e-6},
            "lora dropout 1e-06: expected 1, 0, or a number that is 1 to 65535 when rounded to 1 / 65536",
        ),
        ({"targets": ()}, r"lora targets \(\): expected at least one"),
        ({"targets": ("qproj",)}, "lora target 'qproj': matches no module of M2M100.*near: q_proj"),
        ({"targets": ("shared",)}, "lora target 'model.shared': .* expected 'embed_tokens'"),
        ({"targets": ("final_layer_norm",)}, "a LayerNorm, expected Linear or Embedding"),
    ],
)
def test_refuses_settings_and_leaves_the_model(settings, message):
    model = build("m2m100")
    modules = [path for path, _ in model.named_modules()]
    with pytest.raises(InputError, match=message):
        pk.adapt(model, pk.LoRA(**settings))
    assert [path for path, _ in model.named_modules()] == modules
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("petl" in vars(module) for module in model.modules())


def test_refuses_learned_positions():
    with pytest.raises(InputError, match="not a table of token embeddings"):
        pk.adapt(build("mbart"), pk.LoRA(targets=("embed_positions",)))


def test_refuses_packed_weights():
    model = build("m2m100")
    packed = torch.zeros(512, 1, dtype=torch.uint8)
    model.model.encoder.layers[1].fc1.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(InputError, match="lora target 'model.encoder.layers.1.fc1': a Linear with packed weights"):
        pk.adapt(model, pk.LoRA(rank=2, targets=("fc1",)))


def test_trains_biases_of_its_targets_when_asked(model, family):
    pk.adapt(model, pk.LoRA(rank=3, targets=targets_of(family), bias="lora_only"))
    config = pk.LoRA(rank=3, targets=targets_of(family), bias="lora_only")
    state = adapter_state(model, "default")
    assert sum(key.endswith(".bias") for key in state) == (0 if family == "t5" else 6 * 2 + 4)
    assert sum(tensor.numel() for tensor in state.values()) == config.count(model)
    train_a_little(model)
    adapted = logits(model)
    pk.merge(model)
    torch.testing.assert_close(logits(model), adapted, atol=1e-5, rtol=1e-5)
    pk.unmerge(model)
    pk.use_adapter(model, None)
    assert torch.equal(logits(model), logits(build(family)))


def test_a_linear_whose_weight_is_trained_too_is_refused():
    lora = pk.nn.LoRALinear.from_linear(nn.Linear(5, 4), rank=2)
    lora.weight.requires_grad_(True)
    with pytest.raises(InputError, match="weight requires grad"):
        lora(torch.zeros(1, 5))


def test_adapts_a_model_of_ones_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 5))
    x = torch.randn(3, 7)
    base = model(x)
    pk.adapt(model, pk.LoRA(rank=2, targets=("2",)))
    assert torch.equal(model(x), base)
    shake(model)
    assert len(pk.trainable_parameters(model)) == 2 and not torch.allclose(model(x), base, atol=1e-2)
