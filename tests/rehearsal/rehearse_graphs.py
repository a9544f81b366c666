"""Packed steps of all families and tiers as CUDA graphs, on a device that host memory plays."""

from __future__ import annotations

import pytest
import torch
from layers.lean_cases import adapted
from methods.models import FAMILIES

import petl_kernels as pk
from petl_kernels.layers.lean import LeanLayer
from petl_kernels.step.graphs import CudaGraphs, Graphed

CUDA = torch.device("cuda", 0)
CASES = [(family, "lora", 1) for family in FAMILIES]
CASES += [("m2m100", "lora", tier) for tier in (2, 3, 4)]
CASES += [("t5", "prefix", 2), ("mbart", "prefix", 1), ("marian", "bitfit", 3), ("m2m100", "parallel", 1)]
CASES += [("m2m100", "cross-attention", 1)]
CASES += [pytest.param("m2m100", method, 1, marks=pytest.mark.repeat) for method in ("pfeiffer", "ia3", "ln")]


def row(seed: int) -> dict:
    draw = torch.Generator().manual_seed(seed)
    pairs = [torch.randint(3, 97, (3, n), generator=draw).unbind() for n in (5, 7, 2, 6)]
    return pk.pack(pairs, tokens=(32, 24), sentences=9)


def step_of(model):
    names = [name for name, value in row(0).items() if name != "longest"]

    def step(*tensors):
        given = dict(zip(names, tensors, strict=True))
        loss = model(**given, longest=7, reduction="sum", counted=given["labels"].numel()).loss
        loss.backward()
        return loss

    return step


def inputs_of(seed: int) -> list[torch.Tensor]:
    return [value.as_subclass(torch.Tensor) for name, value in row(seed).items() if name != "longest"]


@pytest.mark.parametrize(("family", "method", "tier"), CASES)
def test_a_replay_gives_the_gradients_of_the_cpu(family, method, tier):
    """The second row is captured, not run; the third is a replay of the same graph on other tokens."""
    plain = pk.lean(adapted(family, method), tier)
    model = pk.lean(adapted(family, method), tier).to(CUDA)
    if method == "lora":  # q, k and v stand together on a card
        assert all(module.petl_lean.borders for module in model.modules() if isinstance(module, LeanLayer))
    parameters = pk.trainable_parameters(model)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    recorder = CudaGraphs(CUDA)
    graphed, eager = Graphed(step_of(model), recorder), step_of(plain)
    for seed in (1, 2, 3):
        loss, expected = graphed(*inputs_of(seed)), eager(*inputs_of(seed))
        torch.testing.assert_close(loss.cpu(), expected.detach(), rtol=1e-9, atol=1e-9)
    assert recorder.reason == "" and len(graphed) == 1
    for found, other in zip(parameters, pk.trainable_parameters(plain), strict=True):
        torch.testing.assert_close(found.grad.cpu(), other.grad, rtol=1e-9, atol=1e-9)
