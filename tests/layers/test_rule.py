"""The rule of a layer: the tensors that it saves, what it binds, and layers that run op by op."""

from __future__ import annotations

import pytest
import torch
from methods.models import build
from torch import nn

import petl_kernels as pk
from petl_kernels.layers import rule
from petl_kernels.layers.lean import LeanLayer
from petl_kernels.layers.rule.call import SAVED
from petl_kernels.ops import define
from petl_kernels.ops.define import run

from .lean_cases import DROPOUT, adapted, ragged, step, worst

STATISTICS = {"self.mean", "self.rstd", "ffn.mean", "ffn.rstd"}
ALWAYS = STATISTICS | {"self.o", "self.lse"}
QKV = {"self.q", "self.k", "self.v"}
# (family, method) -> tier -> names of the tensors that an encoder layer saves beside its input.
TABLE = {
    ("m2m100", "lora"): {
        1: ALWAYS | QKV | {"self.qkv.latent0", "self.sum", "ffn.bits"},
        2: ALWAYS | {"self.qkv.latent0", "self.sum", "ffn.bits"},
        3: ALWAYS | {"self.qkv.latent0", "ffn.bits"},
        4: set(),
        5: set(),
    },
    ("m2m100", "adapter-sublayer"): {
        1: ALWAYS | QKV | {"self.read", "self.adapted_sum", "ffn.bits", "ffn.adapted_read"},
        2: ALWAYS | {"self.read", "ffn.bits", "ffn.adapted_read"},
        3: ALWAYS | {"ffn.bits", "ffn.adapted_read"},
    },
    ("m2m100", "full"): {
        1: ALWAYS | QKV | {"self.sum", "ffn.bits", "ffn.hidden"},
        2: ALWAYS | {"self.sum", "ffn.bits"},
    },
    ("marian", "lora"): {
        1: ALWAYS | QKV | {"self.qkv.latent0", "self.sum", "ffn.end", "ffn.z"},
        2: ALWAYS | {"self.qkv.latent0", "self.sum", "ffn.end"},
        3: ALWAYS | {"self.qkv.latent0", "ffn.end"},
    },
    ("t5", "ia3"): {
        1: ALWAYS - {"self.mean", "ffn.mean"} | QKV | {"self.sum", "ffn.z", "ffn.gate", "ffn.hidden"},
        2: ALWAYS - {"self.mean", "ffn.mean"} | {"self.sum"},
    },
}


def node_of(y: torch.Tensor):
    """Returns the autograd node of a layer's rule, which has made its output."""
    return y.grad_fn


def encoder_layer(model: nn.Module) -> nn.Module:
    encoder = model.get_encoder()
    return encoder.layers[0] if hasattr(encoder, "layers") else encoder.block[0]


def saved(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns what the first encoder layer saves beside its input and the trained tensors, by name."""
    d = model.config.d_model
    x = torch.randn(2, 5, d, dtype=model.dtype, requires_grad=True)
    y = encoder_layer(model)(x, None)
    node = node_of(y[0] if isinstance(y, tuple) else y)
    return dict(zip(node.names, node.saved_tensors[len(node.saved_tensors) - len(node.names) :], strict=True))


@pytest.mark.parametrize("case", TABLE, ids=" ".join)
def test_a_tier_saves_the_names_of_the_table(case):
    model = adapted(*case)
    for tier, names in TABLE[case].items():
        assert set(saved(pk.lean(model, tier))) == names, tier


def test_every_name_of_the_table_has_a_tier():
    names = {name for tiers in TABLE.values() for own in tiers.values() for name in own}
    assert {name.rpartition(".")[2].rstrip("0123456789") for name in names} == {
        own for own, last in SAVED.items() if last
    }


def test_bytes_of_the_table():
    """The names stand for these sizes, in bytes a token for fp32 and d = 16."""
    model = pk.lean(adapted("m2m100", "lora", dtype=torch.float32), 1)
    d, heads, ffn = model.config.d_model, model.config.encoder_attention_heads, model.config.encoder_ffn_dim
    sizes = {"q": 4 * d, "k": 4 * d, "v": 4 * d, "o": 4 * d, "sum": 4 * d, "mean": 4, "rstd": 4}
    sizes |= {"lse": 4 * heads, "latent0": 4 * 2 * 3, "bits": -(-ffn // 8)}
    for name, tensor in saved(model).items():
        assert tensor.nbytes / 10 == sizes[name.rpartition(".")[2]], name


# The ops of an encoder layer beside products and attention: forward, and backward.
PASSES = {
    "m2m100": (
        ["layer_norm", "dropout_add_norm", "dropout_add"],
        ["dropout_add_backward", "dropout_add_norm_backward", "dropout_add_norm_backward"],
    ),
    "marian": (["dropout_add_norm", "dropout_add_norm"], ["dropout_add_norm_backward", "dropout_add_norm_backward"]),
    "t5": (
        ["rms_norm", "dropout_add_norm", "dropout_add"],
        ["dropout_add_backward", "dropout_add_norm_backward", "dropout_add_norm_backward"],
    ),
}


@pytest.mark.parametrize("family", PASSES)
def test_between_two_blocks_is_one_kernel(family, monkeypatch):
    """It has the sum, its dropout and the norm that reads it; backward their gradients and the residual stream's."""
    model = pk.lean(adapted(family, "lora", **({} if family == "t5" else DROPOUT)), 1)
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.p = 0.2
    x = torch.randn(2, 5, model.config.d_model, dtype=model.dtype, requires_grad=True)
    seen = []
    for module in (rule.norm, rule.residual):
        monkeypatch.setattr(module, "run", lambda name, *args: seen.append(name) or run(name, *args))
    y = encoder_layer(model)(x, None)
    forward, seen[:] = list(seen), []
    torch.autograd.grad((y[0] if isinstance(y, tuple) else y).sin().sum(), x)
    backward = [name for name in seen if not name.endswith("_from_statistics")]  # recomputed, for LoRA
    assert (forward, backward) == PASSES[family]


def test_a_layer_has_the_numbers_of_the_ops_one_after_the_other(monkeypatch):
    """A step is the same to the bit, in bf16 and with dropout, with the ops that one kernel replaces."""
    results = []
    for together in (True, False):
        if not together:
            for name, kernel in (("dropout_add_norm", one_by_one), ("dropout_add_norm_backward", one_by_one_backward)):
                monkeypatch.setitem(define._kernels, name, kernel)
        model = pk.lean(adapted("m2m100", "lora", dtype=torch.bfloat16, **DROPOUT), 2)
        inputs = ragged(model)
        torch.manual_seed(0)
        results.append(step(model, inputs))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def one_by_one(y, residual, weight, bias, eps, p, seed, centred, backend):
    h = define.run("dropout_add", y, residual, p, seed, backend) if p else residual + y
    return h, *define.run("layer_norm", h, weight, bias, eps, backend)


def one_by_one_backward(du, dh, h, mean, rstd, weight, dtype, p, seed, need_dweight, need_dbias, backend):
    dx, *sums = define.run("layer_norm_backward", du, h, mean, rstd, weight, True, need_dweight, need_dbias, backend)
    dx = dx if dh is None else dx + dh
    return dx, dx if dtype is None else define.run("dropout_add_backward", dx, dtype, p, seed, backend), *sums


@pytest.mark.parametrize("tier", [1, 2, 3, 4, 5])
def test_backward_twice_gives_the_same(tier):
    model = pk.lean(adapted("m2m100", "lora"), tier)
    trained = pk.trainable_parameters(model)
    loss = model(**ragged(model)).loss
    first = torch.autograd.grad(loss, trained, retain_graph=True)
    second = torch.autograd.grad(loss, trained)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, trained)


@pytest.mark.parametrize("tier", [1, 2, 4])
def test_gradients_through_the_keys_of_a_cache(tier):
    """k and v that a model returns are differentiable, as those of plain layers are."""
    model = adapted("m2m100", "lora")
    inputs = ragged(model)

    def gradients(model):
        output = model(**inputs, use_cache=True)
        keys = output.past_key_values
        total = output.loss + sum(
            (layer.keys.square().mean() + layer.values.sin().mean())
            for cache in (keys.self_attention_cache, keys.cross_attention_cache)
            for layer in cache.layers
        )
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        return dict(zip(names, torch.autograd.grad(total, pk.trainable_parameters(model)), strict=True))

    expected = gradients(pk.lean(model, 0))
    difference, name = worst(gradients(pk.lean(model, tier)), expected)
    assert difference < 1e-9, (name, difference)


def test_a_layer_that_the_rule_does_not_cover_runs_op_by_op_and_is_named():
    model = pk.lean(build("t5").to(torch.float16), 1)
    states = pk.report(model).layers
    assert {state.tier for state in states} == {1}
    assert {state.composed for state in states} == {"T5 with its last projection in fp16, which clamps behind it"}
    assert "lean op by op" in str(pk.report(model))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "adapter-sublayer", "parallel", "prefix", "ia3", "full"])
@pytest.mark.parametrize("family", ["m2m100", "marian", "t5"])
def test_op_by_op_gives_the_same(family, method, monkeypatch):
    """Compiled graphs run so, and layers that the rule does not cover."""
    model = adapted(family, method)
    inputs = ragged(model)
    plain = step(pk.lean(model, 0), inputs)
    monkeypatch.setattr(LeanLayer, "_rule", lambda self, *_, **__: None)
    for tier in (1, 2, 3, 4, 5):
        difference, name = worst(step(pk.lean(model, tier), inputs), plain)
        assert difference < 1e-9, (tier, name, difference)


def test_nothing_wants_a_gradient():
    """Without anything to train the pass is the same, and no node saves anything."""
    model = pk.lean(adapted("m2m100", "lora"), 1)
    inputs = ragged(model)
    expected = model(**inputs).loss
    model.requires_grad_(False)
    loss = model(**inputs).loss
    assert loss.grad_fn is None
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=0)


def test_frozen_inputs_need_no_gradient():
    """The first layer computes no gradient of frozen embeddings, and those of adapters stay the same."""
    model = adapted("m2m100", "lora")
    inputs = ragged(model)
    plain = step(pk.lean(model, 0), inputs)
    for tier in (1, 2, 4):
        difference, name = worst(step(pk.lean(model, tier), inputs), plain)
        assert difference < 1e-9, (tier, name, difference)
