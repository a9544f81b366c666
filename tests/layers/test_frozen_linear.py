from __future__ import annotations

import pytest
import torch
from torch import nn

import petl_kernels as pk
from petl_kernels.accounting.saved import saved_bytes
from petl_kernels.errors import InputError
from petl_kernels.layers.frozen_linear import FrozenLinear


@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_is_the_same_layer(bias):
    linear = nn.Linear(7, 5, bias=bias)
    layer = FrozenLinear.from_linear(linear)
    x = torch.randn(2, 3, 7)
    torch.testing.assert_close(layer(x), linear(x))
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not layer.weight.requires_grad and (not bias or layer.bias.requires_grad)
    assert layer.state_dict().keys() == linear.state_dict().keys()
    assert isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (7, 5)


def test_state_dicts_fit_both_ways():
    linear, layer = nn.Linear(7, 5), FrozenLinear(7, 5)
    layer.load_state_dict(linear.state_dict())
    x = torch.randn(3, 7)
    torch.testing.assert_close(layer(x), linear(x))
    nn.Linear(7, 5).load_state_dict(layer.state_dict())


def test_keeps_mode_dtype_and_gradients():
    linear = nn.Linear(7, 5, dtype=torch.float64).eval()
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(linear(x).sum(), (x, linear.bias))
    layer = FrozenLinear.from_linear(linear)
    assert not layer.training and layer.weight.dtype == torch.float64
    for ours, theirs in zip(torch.autograd.grad(layer(x).sum(), (x, layer.bias)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_saves_nothing():
    layer = pk.nn.FrozenLinear(7, 5)
    x = torch.randn(3, 7, requires_grad=True)
    with saved_bytes(exclude=layer.parameters()) as saved:
        y = layer(x)
    assert saved.bytes == 0 and y.requires_grad


def test_an_unfrozen_weight_is_refused():
    layer = FrozenLinear(7, 5)
    layer.requires_grad_(True)
    with pytest.raises(InputError, match="weight requires grad"):
        layer(torch.randn(3, 7))
