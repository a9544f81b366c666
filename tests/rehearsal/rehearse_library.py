"""The library's own calls with devices, on a CUDA device that host memory plays; ``test_rehearsal.py`` runs these."""

from __future__ import annotations

import pytest
import torch
from layers.lean_cases import adapted, ragged, step
from methods.models import build
from weights.test_streamed import Copies

import petl_kernels as pk
from petl_kernels.device import resolve
from petl_kernels.errors import InputError
from petl_kernels.planning import cost, planner
from petl_kernels.step import cap
from petl_kernels.weights import streamed as stream
from petl_kernels.weights.slots import SlotCopies, Slots
from rehearsal import card

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def quick_rates(monkeypatch):
    monkeypatch.setattr(planner, "measure_rates", lambda device, dtype: cost.ASSUMED)


def test_a_device_gets_its_number():
    for given in (None, "cuda", torch.device("cuda"), "cuda:0"):
        assert resolve(given) == CUDA
    assert resolve("cpu") == torch.device("cpu") and resolve("cuda:3") == torch.device("cuda", 3)


@pytest.mark.parametrize("device", [torch.device("cuda"), CUDA])
def test_a_cap_holds_and_goes(device):
    big = 256 << 20
    with cap.capped(card.CONTEXT + card.allocated() + (big // 2), device):
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(big, dtype=torch.uint8, device=device)
        cap.reset_peak(device)
        held = torch.empty(big // 4, dtype=torch.uint8, device=device)
        assert cap.peak(device) >= held.nbytes and cap.context_bytes(device) == card.CONTEXT
    torch.empty(big, dtype=torch.uint8, device=device)
    with pytest.raises(InputError, match="the device has 2 GiB"), cap.capped(card.TOTAL + 1, device):
        pass


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: torch.tensor(1.0, device=CUDA),
        lambda x: x.copy_(torch.ones(2), non_blocking=True),  # which is not pinned
        lambda x: x.copy_(torch.ones(2).pin_memory()),
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
    ],
)
def test_a_capture_refuses_to_wait(wait):
    """So that what is captured here can be captured on a card."""
    x = torch.zeros(2, device=CUDA)
    with pytest.raises(RuntimeError, match="operation failed"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        wait(x)
    graph = torch.cuda.CUDAGraph()
    pinned = torch.ones(2).pin_memory()
    with torch.cuda.graph(graph):
        x.copy_(pinned, non_blocking=True)
    assert x.tolist() == [0, 0]
    graph.replay()
    assert x.tolist() == [1, 1]


@pytest.mark.parametrize("memory", [None, "1GiB"])
def test_tiers_for_a_model_that_is_there(memory):
    model = pk.lean(adapted("m2m100", "lora").to("cuda"), "auto", memory=memory, batch_tokens=64, max_length=16)
    assert {layer.tier for layer in pk.report(model).layers} == {1}


@pytest.mark.parametrize("device", ["cuda", "cuda:0", None])
def test_a_plan_is_applied(device, monkeypatch):
    """Made for a model on the CPU, with layers that travel, and run on the card: the gradients are the CPU's."""
    monkeypatch.setattr(stream, "_store", lambda own, slots, device, *_: Slots(own, slots, checked(device), Copies()))
    model, plain = (adapted("m2m100", "lora", dtype=torch.float32) for _ in range(2))
    inputs = ragged(plain)
    plan = pk.plan(model, "1GiB", batch_tokens=64, max_length=16, device=device)
    object.__setattr__(plan, "streamed", 2)
    plan.apply(model)
    model.to("cuda")
    found = step(model, {name: value.to("cuda") for name, value in inputs.items()})
    expected = step(plain, inputs)
    torch.testing.assert_close({name: value.cpu() for name, value in found.items()}, expected, rtol=1e-3, atol=1e-5)


def checked(device: torch.device) -> torch.device:
    """Returns ``device`` as the ring of slots takes it, which is C++ and wants a number."""
    assert SlotCopies(device)._device.index == 0
    return device


@pytest.mark.parametrize("family", ["m2m100", "t5"])
def test_merging(family):
    model = pk.adapt(build(family).to("cuda"), pk.LoRA(rank=2))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    pk.unmerge(pk.merge(model))
    for name, parameter in model.named_parameters():
        assert parameter.device == CUDA and torch.equal(parameter, before[name])
