from __future__ import annotations

import pytest
import torch
from torch import nn

import petl_kernels as pk
from petl_kernels.errors import InputError
from petl_kernels.methods import adapter_state

from .models import build, logits


def shaken(family: str, **settings):
    model = pk.adapt(build(family), pk.IA3(**settings))
    torch.manual_seed(5)
    for parameter in pk.trainable_parameters(model):
        nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model


def test_places_and_shapes(model, family):
    pk.adapt(model, pk.IA3())
    state = adapter_state(model, "default")
    assert len(state) == 6 * 2 + 4
    for key, scale in state.items():
        assert key.endswith(".ia3_l") and scale.eq(1).all()
        linear = model.get_submodule(key.removesuffix(".ia3_l"))
        is_ffn = key.removesuffix(".ia3_l").endswith(("fc2", "wo"))
        assert scale.shape == ((1, linear.in_features) if is_ffn else (linear.out_features, 1))


def test_computes_the_formula_and_merges(family, tmp_path):
    model = shaken(family)
    reference = build(family)
    with torch.no_grad():
        for key, scale in adapter_state(model, "default").items():
            linear = reference.get_submodule(key.removesuffix(".ia3_l"))
            linear.weight *= scale
            if scale.shape[1] == 1 and linear.bias is not None:
                linear.bias *= scale.flatten()
    adapted = logits(model)
    torch.testing.assert_close(adapted, logits(reference), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(adapted, logits(build(family)), atol=0.05)
    pk.merge(model)
    torch.testing.assert_close(logits(model), adapted, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path)), adapted, atol=1e-5, rtol=1e-5)
    pk.unmerge(model)
    assert torch.equal(logits(model), adapted)


def test_targets_and_which_of_them_are_feed_forward():
    model = build("m2m100")
    assert pk.IA3(targets=("fc2", "q_proj")).places(model)["model.decoder.layers.0.fc2"] is True
    assert not any(pk.IA3(targets=("fc2",), feedforward=()).places(model).values())
    assert all(pk.IA3(targets=("fc1",), feedforward=("fc1",)).places(model).values())
    with pytest.raises(InputError, match="ia3 target 'wo': matches no module"):
        pk.adapt(model, pk.IA3(targets=("wo",)))
