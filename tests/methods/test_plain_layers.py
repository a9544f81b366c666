"""Adapters on FSMT and T5Gemma 2, whose layers stay their own, and T5Gemma: with the plain model's gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from layers.every_model import build, inputs_of
from layers.lean_cases import SETTINGS, step, worst
from torch import nn

import petl_kernels as pk
from petl_kernels.errors import InputError
from petl_kernels.methods import METHODS

MODELS = ("fsmt", "t5gemma", "t5gemma2")
REFUSED = ("fsmt", "prefix"), ("t5gemma2", "cross-attention")


def adapted(model_type: str, method: str) -> nn.Module:
    model = pk.adapt(build(model_type), METHODS[method](**SETTINGS.get(method, {})))
    with torch.no_grad():
        for parameter in pk.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


@pytest.mark.parametrize("model_type", MODELS)
def test_gradients_are_those_of_the_weights_that_they_make(model_type):
    """With W + s B A in the place of W: dA = s Bᵀ dW and dB = s dW Aᵀ, of a model that has never been adapted."""
    model = pk.adapt(build(model_type), pk.LoRA(rank=2, alpha=6.0, targets="all-linear"))
    plain = build(model_type)
    hosts = {path: module for path, module in model.named_modules() if hasattr(module, "lora")}
    with torch.no_grad():
        for path, host in hosts.items():
            piece = host.lora["default"]
            piece.B.normal_(std=0.1)
            plain.get_parameter(f"{path}.weight").add_(3.0 * piece.B @ piece.A)
    inputs = inputs_of(model)
    expected, found = step(plain, inputs), step(pk.lean(model.train(), 2), inputs)
    assert len(hosts) >= 8
    exact = {"rtol": 1e-4, "atol": 1e-6} if model_type == "fsmt" else {"rtol": 1e-9, "atol": 1e-12}  # fp32, fp64
    torch.testing.assert_close(found["loss"], expected["loss"], **exact)
    for path, host in hosts.items():
        piece, dw = host.lora["default"], expected[f"{path}.weight"]
        torch.testing.assert_close(found[f"{path}.lora.default.A"], 3.0 * piece.B.T @ dw, **exact)
        torch.testing.assert_close(found[f"{path}.lora.default.B"], 3.0 * dw @ piece.A.T, **exact)
    tier = 2 if model_type == "t5gemma" else 0
    assert all(state.tier == tier and bool(state.reason) == (tier == 0) for state in pk.report(model).layers)


@pytest.mark.parametrize(
    "method", [name if name in ("lora", "prefix") else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
@pytest.mark.parametrize("model_type", MODELS)
def test_every_method_trains_or_is_refused(model_type, method):
    try:
        model = adapted(model_type, method)
    except InputError as error:
        assert (model_type, method) in REFUSED and "\n" not in str(error)
        return
    inputs = inputs_of(model)
    first = step(model, inputs)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    missing = [name for name in trained if name not in first and ".vision_tower." not in name]  # there is no picture
    missing = [name for name in missing if ".multi_modal_projector." not in name]
    assert not missing
    optimizer = torch.optim.SGD(pk.trainable_parameters(model), lr=1e-3)
    before = copy.deepcopy(first)
    optimizer.step()
    assert step(model, inputs)["loss"] < before["loss"]
    assert worst(step(pk.lean(model, 3), inputs), step(model, inputs))[0] == 0
