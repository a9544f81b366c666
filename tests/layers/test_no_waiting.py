"""A lean step reads nothing from the device: forward, loss and backward are queued without the host waiting."""

from __future__ import annotations

import pytest
import torch
from methods.models import FAMILIES, build

import petl_kernels as pk
from petl_kernels.layers import device_masks
from petl_kernels.methods import METHODS
from petl_kernels.models.transformers_names import drop_no_layer

from .lean_cases import DROPOUT, SETTINGS, adapted, ragged, step, worst
from .waiting import waits

# The attention function that a prefix brings with it makes its own masks.
WITHOUT_PREFIX = [method for method in METHODS if method != "prefix"]


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Lets the CPU be a device that the host does not wait for."""
    monkeypatch.setattr(device_masks, "WAITED_FOR", ("cpu",))


def inputs_of(model) -> dict[str, torch.Tensor]:
    inputs = ragged(model)
    del inputs["decoder_attention_mask"]
    return inputs


def counted(inputs: dict[str, torch.Tensor]) -> int:
    return int((inputs["labels"] != -100).sum())


@pytest.mark.parametrize(("method", "tier"), [*((m, 2) for m in WITHOUT_PREFIX), *(("lora", t) for t in (1, 3, 4))])
@pytest.mark.parametrize("family", ["m2m100", "t5"])
def test_a_step_waits_for_nothing(family, method, tier, like_a_gpu):
    rates = {} if family == "t5" else DROPOUT
    model = build(family, **rates).train()
    pk.lean(pk.adapt(model, METHODS[method](**SETTINGS.get(method, {}))), tier)
    drop_no_layer(model)  # transformers 5.17 draws a number on the host to skip layers, which reads no device
    inputs = inputs_of(model)
    number = counted(inputs)
    step(model, inputs, counted=number, reduction="sum")  # work that is done once a process
    model.zero_grad(set_to_none=True)
    with waits() as found:
        model(**inputs, counted=number, reduction="sum").loss.backward()
    # the loss' own check of labels is a device's assertion on CUDA
    assert [place for place in found if ":_first_rows" not in place] == []


def test_waiting_is_found():
    """On a CPU the masks are read, and the labels that count are searched."""
    model = pk.lean(adapted("m2m100", "lora"), 1)
    inputs = inputs_of(model)
    with waits() as found:
        model(**inputs).loss.backward()
    assert any("masking_utils.py" in place for place in found)
    assert any(place.startswith("nonzero") and "linear_cross_entropy.py" in place for place in found)
    with waits() as found:
        torch.ones(3)[torch.tensor([True, False, True])]
        float(torch.ones(()))
    assert {place.partition(":")[0] for place in found} == {"boolean index", "__float__", "_local_scalar_dense"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tier", [0, 1, 4])
def test_the_masks_hide_the_same(family, tier, monkeypatch):
    model = pk.lean(adapted(family, "lora"), tier)
    inputs = inputs_of(model)
    plain = step(model, inputs)
    monkeypatch.setattr(device_masks, "WAITED_FOR", ("cpu",))
    difference, name = worst(step(model, inputs), plain)
    assert difference < 1e-9, (name, difference)


def test_other_attentions_keep_their_masks(like_a_gpu):
    model = pk.lean(adapted("m2m100", "lora", attention="eager"), 0)
    inputs = inputs_of(model)
    assert device_masks.without_waiting(model, {**inputs, "decoder_input_ids": inputs["labels"]}).keys() == {
        *inputs,
        "decoder_input_ids",
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tier", [1, 4])
def test_cuda_is_not_waited_for(family, tier):
    model = pk.lean(pk.adapt(build(family).cuda().train(), pk.LoRA(rank=4)), tier)
    inputs = {name: tensor.cuda() for name, tensor in inputs_of(model).items()}
    number = counted(inputs)
    for _ in range(2):
        step(model, inputs, counted=number, reduction="sum")
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs, counted=number, reduction="sum").loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
