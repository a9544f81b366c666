from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import petl_kernels as pk
from petl_kernels import dispatch
from petl_kernels.errors import InputError
from petl_kernels.methods import METHODS, adapter_state, from_dict, load_adapter_state

from .models import build, logits, train_a_little


@pytest.fixture
def m2m100():
    return build("m2m100")


@pytest.mark.slow
def test_all_methods_on_one_model(model):
    base, outputs = logits(model), {}
    for key in METHODS:
        pk.adapt(model, METHODS[key](), name=key)
        train_a_little(model)
        outputs[key] = logits(model)
    for key in reversed(METHODS):
        pk.use_adapter(model, key)
        assert torch.equal(logits(model), outputs[key]), key
        assert pk.report(model).stored == METHODS[key]().count(model)
    pk.use_adapter(model, None)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("taken", "adapter name 'taken'|adapter 'taken': already on this model"),
        ("a.b", "adapter name 'a.b': expected letters, digits, - and _"),
        ("", "adapter name '': expected letters"),
        ("../up", "adapter name '../up': expected letters"),
        ("train", "adapter name 'train': an attribute of PyTorch modules"),
        ("active", "adapter name 'active': an attribute"),
        (None, "adapter name None: expected letters"),
    ],
)
def test_refuses_names(m2m100, name, message):
    pk.adapt(m2m100, pk.LoRA(rank=2), name="taken")
    with pytest.raises(InputError, match=message):
        pk.adapt(m2m100, pk.LoRA(rank=2), name=name)


def test_refuses_what_is_no_config(m2m100):
    with pytest.raises(InputError, match="config 'lora': expected a method's config"):
        pk.adapt(m2m100, "lora")


@pytest.mark.parametrize("wrong", [None, 3, "nllb", torch.zeros(99), {}])
def test_refuses_what_is_no_model_and_no_name(m2m100, wrong):
    calls = [lambda f=f: f(wrong) for f in (pk.merge, pk.unmerge, pk.report, pk.lean)]
    calls += [lambda: pk.adapt(wrong, pk.LoRA()), lambda: pk.use_adapter(wrong, None), lambda: pk.plan(wrong, "1GiB")]
    for call in calls:
        with pytest.raises(InputError, match="model .*: expected a PyTorch module") as error:
            call()
        assert "\n" not in str(error.value) and len(str(error.value)) < 120
    if not isinstance(wrong, (str, type(None))):
        with pytest.raises(InputError, match="adapter name .*: expected a name"):
            pk.use_adapter(m2m100, wrong)


def test_a_refused_adapter_leaves_the_active_one(m2m100):
    pk.adapt(m2m100, pk.BitFit(), name="a")
    train_a_little(m2m100)
    before, trained = logits(m2m100), pk.trainable_parameters(m2m100)
    with pytest.raises(InputError):
        pk.adapt(m2m100, pk.LoRA(rank=99), name="b")
    assert torch.equal(logits(m2m100), before) and pk.report(m2m100).others == ()
    assert all(a is b for a, b in zip(trained, pk.trainable_parameters(m2m100), strict=True))


def test_an_adapter_that_fails_half_way_leaves_nothing(m2m100, monkeypatch):
    keys, original, calls = list(m2m100.state_dict()), pk.nn.LoRALinear.add, []

    def out_of_memory(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("none left")
        original(self, *args)

    monkeypatch.setattr(pk.nn.LoRALinear, "add", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        pk.adapt(m2m100, pk.LoRA(rank=2))
    assert list(m2m100.state_dict()) == keys and pk.report(m2m100).adapter is None
    pk.adapt(m2m100, pk.LoRA(rank=2))


def test_switching_names_what_is_there(m2m100):
    pk.adapt(m2m100, pk.LoRA(rank=2), name="en-sw")
    with pytest.raises(InputError, match="adapter 'en-sv': not on this model, which has en-sw"):
        pk.use_adapter(m2m100, "en-sv")
    with pytest.raises(InputError, match="adapter 'x': not on this model, which has none"):
        pk.use_adapter(build("t5"), "x")


def test_merged_model_refuses_changes(m2m100):
    with pytest.raises(InputError, match="merge: no adapter of the model is active"):
        pk.merge(m2m100)
    with pytest.raises(InputError, match="unmerge: no adapter of the model is merged"):
        pk.unmerge(m2m100)
    pk.adapt(m2m100, pk.LoRA(rank=2))
    pk.merge(m2m100)
    for action in (
        lambda: pk.merge(m2m100),
        lambda: pk.use_adapter(m2m100, None),
        lambda: pk.adapt(m2m100, pk.LoRA(rank=2), name="b"),
        lambda: load_adapter_state(m2m100, "default", adapter_state(m2m100, "default")),
    ):
        with pytest.raises(InputError, match="adapter 'default': merged into the model, unmerge it before"):
            action()
    pk.use_adapter(m2m100, "default")  # it is
    assert pk.report(m2m100).merged


@pytest.mark.parametrize("key", ("adapter", "adapter-sublayer", "pfeiffer", "parallel", "prefix"))
def test_refuses_to_merge_what_no_weight_can_hold(m2m100, key):
    pk.adapt(m2m100, METHODS[key](), name="x")
    before = logits(m2m100)
    with pytest.raises(InputError, match="adapter 'x': .*") as error:
        pk.merge(m2m100)
    assert "\n" not in str(error.value)
    assert torch.equal(logits(m2m100), before) and pk.trainable_parameters(m2m100)


@pytest.mark.parametrize("key", METHODS)
def test_state_is_strict(m2m100, key):
    pk.adapt(m2m100, METHODS[key](), name="x")
    state = {name: tensor.clone() for name, tensor in adapter_state(m2m100, "x").items()}
    before = logits(m2m100)
    first = next(iter(state))
    without = {name: torch.zeros_like(tensor) for name, tensor in state.items() if name != first}
    with pytest.raises(InputError, match=f"adapter 'x': tensor '{first}' is missing \\(1 of {len(state)} are\\)"):
        load_adapter_state(m2m100, "x", without)
    with pytest.raises(InputError, match="adapter 'x': tensor 'extra' has no place in it"):
        load_adapter_state(m2m100, "x", {**without, first: state[first], "extra": torch.zeros(1)})
    with pytest.raises(InputError, match=f"tensor '{first}' has shape .*, expected "):
        load_adapter_state(m2m100, "x", {**without, first: torch.zeros(2, 3, 4)})
    assert torch.equal(logits(m2m100), before)


def test_state_of_an_adapter_that_is_not_active(model):
    pk.adapt(model, pk.CrossAttention(), name="a")
    train_a_little(model)
    a, state = logits(model), {key: tensor.clone() for key, tensor in adapter_state(model, "a").items()}
    pk.adapt(model, pk.CrossAttention(), name="b")
    assert all(torch.equal(tensor, state[key]) for key, tensor in adapter_state(model, "a").items())
    load_adapter_state(model, "b", state)
    assert torch.equal(logits(model), a)
    zeros = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    load_adapter_state(model, "a", zeros)
    assert torch.equal(logits(model), a)  # b is active
    pk.use_adapter(model, "a")
    assert not torch.allclose(logits(model), a, atol=1e-2)


def test_from_dict_names_what_is_unknown():
    with pytest.raises(InputError, match="method 'lorra': unknown, expected lora"):
        from_dict({"method": "lorra"})
    with pytest.raises(InputError, match="method lora: unknown setting 'ranc', expected rank"):
        from_dict({"method": "lora", "ranc": 3})


def test_report(m2m100):
    total = sum(p.numel() for p in m2m100.parameters())
    plain = pk.report(m2m100)
    assert f"no adapter is active; trained {total:,} of {total:,} parameters\n" in str(plain) and plain.frozen == 0
    pk.adapt(m2m100, pk.BitFit(), name="first")
    pk.adapt(m2m100, pk.LoRA(rank=4, targets=("q_proj", "fc1")), name="second")
    report = pk.report(m2m100)
    assert (report.adapter, report.method, report.others) == ("second", "lora", ("first",))
    assert report.trained == report.stored == 6 * 4 * 64 + 2 * 4 * (32 + 56) + 2 * 4 * (32 + 40)
    assert report.total == report.frozen == sum(p.numel() for p in build("m2m100").parameters())
    assert report.share == report.trained / report.total
    places = {where: (what, modules, n) for where, what, modules, n in report.places}
    assert places["model.decoder.layers.*.encoder_attn.q_proj"] == ("LoRA", 2, 2 * 4 * (32 + 32))
    assert places["model.encoder.layers.*.fc1"] == ("LoRA", 2, 2 * 4 * (32 + 56))
    assert sum(n for *_, n in report.places) == report.trained
    assert report.backends.keys() == {"lora_linear"}
    text = str(report)
    assert "adapter 'second': lora (rank 4, targets ('q_proj', 'fc1'))" in text
    assert f"trained {report.trained:,}" in text and "other adapters: first" in text
    assert "lora_linear served by " in text
    json.dumps(report.to_dict())
    pk.use_adapter(m2m100, "first")
    report = pk.report(m2m100)
    assert report.frozen == report.total - report.trained and report.backends == {}
    assert ("model.encoder.layers.*.final_layer_norm", "weight, bias", 2, 2 * 64) in report.places
    assert ("model.decoder.layers.*.fc1", "bias", 2, 2 * 40) in report.places
    assert sum(n for *_, n in report.places) == report.trained


def test_report_of_a_prefix_tells_trained_from_stored(m2m100):
    report = pk.report(pk.adapt(m2m100, pk.PrefixTuning(length=5)))
    assert report.stored == 6 * 2 * 5 * 32
    assert report.trained == report.stored + 3 * (2 * 32 * 512 + 512 + 32)
    assert report.frozen == report.total
    assert report.places[0] == ("model.encoder.layers.*.self_attn", "prefix", 2, 2 * 2 * 5 * 32)
    assert report.places[-1][:2] == ("M2M100ForConditionalGeneration", "MLPs of the prefix")


def test_shared_parameters_are_given_once(m2m100):
    pk.adapt(m2m100, pk.FullFineTuning())
    parameters = pk.trainable_parameters(m2m100)
    assert len(parameters) == len(set(parameters)) and all(isinstance(p, nn.Parameter) for p in parameters)


def test_the_report_says_what_was_turned_down_on_the_models_device(m2m100, monkeypatch):
    cpu, card = torch.device("cpu"), torch.device("cuda", 0)
    errors = {
        ("lora_linear", "triton", cpu, torch.float32): "_group: dx is off by 1, allowed 0.1",
        ("attention", "triton", cpu, torch.bfloat16): None,
        ("attention", "triton", card, torch.bfloat16): "_causal: o is off by 1, allowed 0.1",
    }
    monkeypatch.setattr(dispatch, "_parity_errors", errors)
    expected = "triton lora_linear is not used on cpu in float32: _group: dx is off by 1, allowed 0.1"
    for model in (m2m100.requires_grad_(False), pk.adapt(m2m100, pk.LoRA(rank=2))):
        report = pk.report(model)
        assert report.turned_down == (expected,) and expected in str(report).splitlines()
        assert json.loads(json.dumps(report.to_dict()))["turned_down"] == [expected]
    monkeypatch.setattr(dispatch, "_parity_errors", {})
    assert pk.report(m2m100).turned_down == () and "is not used" not in str(pk.report(m2m100))
