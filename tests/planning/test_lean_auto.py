"""``pk.lean(model, "auto")``: the least recomputation that fits, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from methods.models import build

import petl_kernels as pk
from petl_kernels.errors import InputError
from petl_kernels.methods.owner import owner
from petl_kernels.planning import planner as planning
from petl_kernels.planning.cost import ASSUMED
from petl_kernels.step.cap import capped

MIB = 2**20
BATCH = {"batch_tokens": 2048, "max_length": 64}


@pytest.fixture(autouse=True)
def fixed_rates(monkeypatch):
    monkeypatch.setattr(planning, "measure_rates", lambda *_: ASSUMED)


@pytest.fixture(scope="module")
def model():
    model = build("m2m100", vocab_size=2000, d_model=128, encoder_ffn_dim=512, decoder_ffn_dim=512, encoder_layers=3)
    return pk.adapt(model, pk.LoRA(rank=4)).train()


def tiers(model) -> list[int]:
    return [layer.tier for layer in pk.report(model).layers]


def step(model) -> None:
    ids = torch.randint(5, 2000, (32, 64), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()


@pytest.mark.slow
def test_less_memory_is_leaner_and_weights_stay(model):
    before = {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()}
    found = [tiers(pk.lean(model, "auto", memory=memory, **BATCH)) for memory in ("1GiB", 34 * MIB)]
    assert found[0] == [1] * 5
    assert min(found[1]) > 1
    assert before == {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()}
    assert owner(model).streamed is None


@pytest.mark.slow
def test_a_step_stays_inside(model):
    pytest.importorskip("petl_kernels._C")
    pk.lean(model, "auto", memory=40 * MIB, **BATCH)
    assert max(tiers(model)) > 1
    always = sum(p.nbytes for p in model.parameters())  # made before the cap, which counts from there on
    with capped(40 * MIB - always, torch.device("cpu")):
        step(model)
    model.zero_grad()


def test_what_is_free_is_the_default(model):
    assert tiers(pk.lean(model, tier="auto", **BATCH)) == [1] * 5  # this machine has a few hundred MiB


def test_available_is_what_the_system_says_and_what_the_model_has(model):
    lines = open("/proc/meminfo").read().splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    size = sum(p.nbytes for p in model.parameters())
    assert size < planning._free_with(model, torch.device("cpu")) <= total + size


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"tier": "auto", "memory": "9MiB"},
            r"a batch of 2,048 tokens needs [\d.]+ MiB, and there are 9 MiB",
        ),
        ({"tier": "auto", "memory": "much"}, "memory size 'much'"),
        ({"tier": "auto", "memory": "1GiB", "batch_tokens": 0}, "batch_tokens 0: expected"),
        ({"tier": 2, "memory": "1GiB"}, "memory '1GiB': expected with tier 'auto' only, and tier is 2"),
        ({"tier": "automatic"}, "tier 'automatic': expected 1 to 5"),
    ],
)
def test_wrong_input(model, arguments, message):
    before = tiers(model)
    with pytest.raises(InputError, match=message) as error:
        pk.lean(model, **{**BATCH, **arguments})
    assert "\n" not in str(error.value)
    assert tiers(model) == before


def test_models_that_it_cannot_count(model):
    with pytest.raises(InputError, match="tier 'auto': the model is on 'meta'; expected cpu or cuda"):
        pk.lean(build("m2m100").to("meta"), "auto")
    with pytest.raises(InputError):
        pk.lean(torch.nn.Linear(2, 2), "auto", memory="1GiB")
