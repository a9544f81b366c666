from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import petl_kernels as pk
from petl_kernels.errors import InputError
from petl_kernels.methods import METHODS, adapter_state, describe
from petl_kernels.methods.adapter import _handed

from .models import batch, build, logits, train_a_little


def bottleneck(x, state, path, scale=1.0):
    """scale · (U act(D LN(x) + d) + u), in plain PyTorch; the LayerNorm where there is one."""
    own = {key.removeprefix(f"{path}.adapter."): t for key, t in state.items() if key.startswith(f"{path}.adapter.")}
    if "norm.weight" in own:
        x = F.layer_norm(x, x.shape[-1:], own["norm.weight"], own["norm.bias"])
    hidden = F.linear(x, own["down.weight"], own["down.bias"]).relu()
    return scale * F.linear(hidden, own["up.weight"], own["up.bias"])


def first(output, change):
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def written_out(model, state, label):
    """The plain model with the adapters of ``state`` written out by hand, module by module."""
    structure = describe(model)
    for layer in structure.layers:
        if label == "adapter":
            after_layer(model.get_submodule(layer.path), state, layer.path, norm=None)
        elif label == "adapter-sublayer":
            for path in (*(attention.out for attention in layer.attentions), layer.ffn.out):
                after_linear(model.get_submodule(path), state, path)
        elif label == "parallel":
            beside_ffn(*(model.get_submodule(p) for p in (layer.ffn.inputs[0], layer.ffn.out)), state, layer.ffn.out)
        elif structure.pre_norm:
            norm = model.get_submodule(layer.ffn.norm)
            after_layer(model.get_submodule(layer.path), state, layer.path, norm)
        else:
            around_norm(model.get_submodule(layer.ffn.norm), state, layer.ffn.norm)
    return model


def after_layer(module, state, path, norm):
    old = module.forward

    def forward(*args, **kwargs):
        return first(old(*args, **kwargs), lambda x: x + bottleneck(x if norm is None else norm(x), state, path))

    module.forward = forward


def after_linear(module, state, path):
    old = module.forward
    module.forward = lambda x: (y := old(x)) + bottleneck(y, state, path)


def beside_ffn(inner, outer, state, path):
    seen = []
    inner_forward, outer_forward = inner.forward, outer.forward
    inner.forward = lambda x: seen.append(x) or inner_forward(x)
    outer.forward = lambda x: outer_forward(x) + bottleneck(seen.pop(), state, path, scale=4.0)


def around_norm(module, state, path):
    old = module.forward
    module.forward = lambda x: old(x + bottleneck(old(x), state, path))


@pytest.mark.parametrize("label", ("adapter", "adapter-sublayer", "pfeiffer", "parallel"))
def test_computes_its_formula(family, label):
    model = pk.adapt(build(family), METHODS[label](bottleneck=7))
    train_a_little(model)
    reference = written_out(build(family), adapter_state(model, "default"), label)
    torch.testing.assert_close(logits(model), logits(reference), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(logits(model), logits(build(family)), atol=1e-2)


def test_starts_near_zero_with_a_plain_norm():
    torch.manual_seed(0)
    adapter = pk.nn.BottleneckAdapter(48, 33)
    assert 0.8e-5 < adapter.up.weight.std() < 1.2e-5
    assert not adapter.up.bias.any() and adapter.norm.weight.eq(1).all() and not adapter.norm.bias.any()
    x = torch.randn(3, 5, 48)
    torch.testing.assert_close(adapter(x), x, atol=1e-3, rtol=0)
    assert adapter.state().keys() == {
        f"adapter.{name}" for name in ("norm.weight", "norm.bias", "down.weight", "down.bias", "up.weight", "up.bias")
    }


@pytest.mark.parametrize("activation", ("relu", "gelu", "silu"))
def test_module_alone(activation):
    torch.manual_seed(0)
    adapter = pk.nn.BottleneckAdapter(17, 5, activation, norm=False, scale=3.0)
    torch.nn.init.normal_(adapter.up.weight)
    x, residual = torch.randn(2, 3, 17), torch.randn(2, 3, 17)
    expected = residual + 3 * adapter.up(getattr(F, activation)(adapter.down(x)))
    torch.testing.assert_close(adapter(x, residual), expected)


def test_recorded_hidden_states_are_the_adapted_ones(model):
    inputs = batch(model)
    model(**inputs, output_hidden_states=True, use_cache=False)  # transformers hooks the layers at the first such call
    pk.adapt(model, pk.Adapter(bottleneck=5))
    train_a_little(model)
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, use_cache=False)
    state, path = adapter_state(model, "default"), describe(model).layers[0].path
    pk.use_adapter(model, None)
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True, use_cache=False).encoder_hidden_states[1]
    expected = plain + bottleneck(plain, state, path)
    torch.testing.assert_close(out.encoder_hidden_states[1], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bottleneck": 0}, "adapter bottleneck 0: expected a whole number"),
        ({"bottleneck": 2.5}, "adapter bottleneck 2.5: expected a whole number"),
        ({"parallel": "yes"}, "adapter parallel 'yes': expected true or false"),
        ({"scale": "x"}, "adapter scale 'x': expected a finite number"),
        ({"scale": float("nan")}, "adapter scale nan: expected a finite number"),
        ({"placement": "block"}, "adapter placement 'block': expected 'layer' or 'sublayer'"),
        ({"activation": "tanh"}, "adapter activation 'tanh': expected 'relu' or 'gelu' or 'silu'"),
        ({"parallel": True, "placement": "sublayer"}, "exclude each other"),
        ({"parallel": True, "pfeiffer": True}, "exclude each other"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(InputError, match=message):
        pk.Adapter(**settings)


def test_scale_of_the_parallel_adapter_can_be_set():
    model = pk.adapt(build("mbart"), pk.Adapter(bottleneck=5, parallel=True, scale=2.0))
    assert model.model.encoder.layers[0].fc2.petl["default"].scale == 2.0


def test_a_layer_that_fails_keeps_no_input_of_its_network():
    model = pk.adapt(build("m2m100"), pk.Adapter(bottleneck=3, parallel=True))
    pk.adapt(model, pk.Adapter(bottleneck=3, parallel=True), name="other")
    before = logits(model)
    layer = model.model.decoder.layers[0]
    kept = []

    def fail(module, args):
        kept.extend(_handed.inputs.values())
        raise RuntimeError("no memory")

    handle = layer.fc2.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        logits(model)
    assert len(kept) == 1 and not len(_handed.inputs)
    handle.remove()
    assert torch.equal(logits(model), before) and len(layer._forward_hooks) == 1
