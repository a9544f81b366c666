"""Frozen weights in buffers with room for an adapter: borders of q, k and v, forced on a CPU, and wide networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from methods.models import build, logits
from torch import nn

import petl_kernels as pk
from petl_kernels.layers import border

from .lean_cases import adapted, assert_same, borders, ragged, step, wide


@dataclass(frozen=True)
class Kind:
    """method: the adapter that gives m2m100's layers such buffers. other: a second one. held: the buffers there are."""

    method: str
    other: pk.methods.Method
    held: Callable[[nn.Module], list[str]]

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        return adapted("m2m100", self.method, dtype=dtype)

    def with_other(self, model: nn.Module) -> nn.Module:
        """Adds the second adapter, which is not active."""
        torch.manual_seed(3)
        pk.adapt(model, self.other, "other")
        for parameter in pk.trainable_parameters(model):
            nn.init.normal_(parameter, std=0.3)
        return pk.use_adapter(model, "default")


BORDER = Kind("lora", pk.LoRA(rank=11, alpha=5.0), borders)
WIDE = Kind("parallel", pk.Adapter(bottleneck=5, parallel=True), wide)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(border, "DEVICES", {"cpu", "cuda"})


@pytest.fixture(params=[BORDER, WIDE], ids=["border", "wide"])
def kind(request) -> Kind:
    return request.param


def train(models: tuple[nn.Module, ...], inputs: dict, chosen: Callable, optimizer: Callable, steps: int) -> None:
    """Updates the parameters ``chosen(model)`` of each model."""
    for model in models:
        update = optimizer(chosen(model))
        for _ in range(steps):
            step(model, inputs)
            update.step()


def test_training_changes_the_adapter_inside(kind):
    plain = kind.model()
    lean = pk.lean(copy.deepcopy(plain), 1)
    inputs = ragged(plain)
    train((plain, lean), inputs, pk.trainable_parameters, lambda own: torch.optim.AdamW(own, lr=0.05), 3)
    assert_same(step(lean, inputs), step(plain, inputs), 1e-8)
    with torch.no_grad():
        assert_same({"logits": logits(lean)}, {"logits": logits(plain)}, 1e-8)


@pytest.mark.parametrize("tier", [1, 2, 4])
@pytest.mark.parametrize(
    ("kind", "when"), [(BORDER, "before"), (BORDER, "after"), (WIDE, "before")], ids=["border", "border after", "wide"]
)
def test_another_adapter_runs_between_forward_and_backward(kind, tier, when):
    """It is on the model when the layers become lean, or comes after the forward pass, so that the weights move."""
    gradients = []
    for lean in (False, True):
        model = kind.with_other(kind.model()) if when == "before" else kind.model()
        model = pk.lean(model, tier) if lean else model
        inputs = ragged(model)
        loss = model(**inputs).loss
        model = kind.with_other(model) if when == "after" else model
        pk.use_adapter(model, "other")
        second = model(**inputs).loss
        pk.use_adapter(model, "default")
        loss.backward()
        second.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert kind.held(model)
    assert_same(gradients[1], gradients[0])


@pytest.mark.parametrize(
    ("method", "trained"),
    [("bitfit", name) for name in ("q_proj.weight", "v_proj.bias", "")]
    + [("parallel", name) for name in ("fc1.bias", "fc2.bias", "")],
)
def test_base_tensors_that_are_trained(method, trained):
    """They have gradients, and memory of their own: fused optimisers read parameters as contiguous."""
    plain = adapted("m2m100", method)
    lean = pk.lean(copy.deepcopy(plain), 1)
    inputs = ragged(plain)

    def chosen(model: nn.Module) -> list[nn.Parameter]:
        return [p.requires_grad_() for name, p in model.named_parameters() if name.endswith(trained)]

    train((plain, lean), inputs, chosen, lambda own: torch.optim.SGD(own, lr=0.05, fused=True), 2)
    assert_same(step(lean, inputs), step(plain, inputs))


def test_files_are_the_plain_models(kind, tmp_path):
    plain = build("m2m100").state_dict()
    pk.lean(kind.model(torch.float32), 1).save_pretrained(tmp_path)
    found = type(build("m2m100")).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in plain.items())


def test_generation_and_evaluation(kind):
    model = kind.model(torch.float32).eval()
    inputs = {key: value for key, value in ragged(model).items() if not key.startswith(("decoder", "labels"))}
    expected, outputs = model.generate(**inputs, num_beams=3, max_new_tokens=8), logits(model)
    pk.lean(model, 2)
    assert torch.equal(model.generate(**inputs, num_beams=3, max_new_tokens=8), expected)
    torch.testing.assert_close(logits(model), outputs)


def test_lean_in_inference_mode_and_trained_later(kind):
    model = kind.model(torch.float32)
    with torch.inference_mode():
        pk.lean(model, 1)
        pk.use_adapter(model, None)
        pk.use_adapter(model, "default")
        model(**ragged(model))
    assert "loss" in step(model, ragged(model)) and kind.held(model)
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_serves_frees_nothing(kind):
    """``serves`` compares; ``undo`` frees."""
    model = pk.lean(kind.model(), 1)
    lean = model.model.encoder.layers[0].petl_lean
    buffers = lean.wide or lean.borders["self.qkv"]
    module, name, place = buffers.places[0]
    getattr(module, name).requires_grad_()
    assert not buffers.serves(*buffers.modules) if kind is WIDE else not buffers.serves(buffers.linears)
    assert getattr(module, name).data_ptr() == place.data_ptr() and buffers.places
    buffers.undo()
    assert getattr(module, name).data_ptr() != place.data_ptr() and not buffers.places
