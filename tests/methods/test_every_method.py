"""What holds for every method on every family."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import petl_kernels as pk
from petl_kernels import methods
from petl_kernels.methods import METHODS, adapter_state, load_adapter_state

from .models import FAMILIES, RELATIVES, batch, build, logits, train_a_little

SMALL = {"lora": {"rank": 3}, "dora": {"rank": 3}, "prefix": {"length": 5}}
SMALL |= {key: {"bottleneck": 5} for key in ("adapter", "adapter-sublayer", "pfeiffer", "parallel")}
NEAR_START = ("adapter", "adapter-sublayer", "pfeiffer", "parallel")


def make(key: str):
    return METHODS[key](**SMALL.get(key, {}))


@pytest.fixture
def family():
    """One of ``families``: pytest_generate_tests says which."""


def pytest_generate_tests(metafunc) -> None:
    if "family" not in metafunc.fixturenames:
        metafunc.parametrize("key", METHODS)
        return
    tests = [name for name in vars(metafunc.module) if name.startswith("test_")]
    turn = tests.index(metafunc.function.__name__)
    cases = [(key, family, mark_of(family, turn + i)) for i, key in enumerate(METHODS) for family in FAMILIES]
    metafunc.parametrize(("key", "family"), [pytest.param(k, f, marks=mark) for k, f, mark in cases])


def mark_of(family: str, turn: int):
    """Returns no mark for one family in turn: each test meets each family, and so does each method. Of T5 and one of
    the three of BART's kind, the other is a slow case; the rest are repeats."""
    other = ("m2m100", "mbart", "marian")[turn % 3]
    if family not in ("t5", other):
        return pytest.mark.repeat
    return () if family == ("t5" if turn % 4 == 0 else other) else pytest.mark.slow


def test_starts_from_the_base_model(model, key):
    base = logits(model)
    pk.adapt(model, make(key))
    if key == "prefix":
        assert not torch.allclose(logits(model), base, atol=1e-2)
    elif key in NEAR_START:
        torch.testing.assert_close(logits(model), base, atol=2e-3, rtol=0)
        assert not torch.equal(logits(model), base)
    else:
        assert torch.equal(logits(model), base)


def test_trains_all_of_its_parameters_and_nothing_else(model, key):
    names = set(dict(model.named_parameters()))
    pk.adapt(model, make(key))
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert len(trained) == len(pk.trainable_parameters(model)) > 0
    train_a_little(model)
    now = dict(model.named_parameters())
    assert all(not torch.equal(now[name], before) for name, before in trained.items())
    assert all(torch.equal(now[name], before) for name, before in frozen.items())
    # full fine-tuning leaves out at most the tables of sines, methods with modules of their own train no base tensor
    if key == "full":
        assert all("embed_positions" in name for name in names - set(trained))
    elif not make(key).base_tensors(build("m2m100")):
        assert names.isdisjoint(trained)


def test_counts_what_it_stores(model, key):
    config = make(key)
    expected = config.count(model)
    pk.adapt(model, config)
    assert sum(tensor.numel() for tensor in adapter_state(model, "default").values()) == expected
    assert config.count(model) == expected  # the adapted model gives the same answer
    report = pk.report(model)
    assert report.stored == expected and report.method == key
    if key != "prefix":
        assert report.trained == expected == sum(p.numel() for p in pk.trainable_parameters(model))


def test_base_comes_back_bit_for_bit(model, key):
    base, before = logits(model), copy.deepcopy(model.state_dict())
    pk.adapt(model, make(key), name="a")
    train_a_little(model)
    adapted = logits(model)
    assert not torch.allclose(adapted, base, atol=1e-2)
    pk.use_adapter(model, None)
    assert torch.equal(logits(model), base)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert pk.trainable_parameters(model) == []
    pk.use_adapter(model, "a")
    assert torch.equal(logits(model), adapted)


@pytest.mark.check
def test_state_makes_the_same_adapter_on_a_plain_model(family, key):
    model = pk.adapt(build(family), make(key), name="a")
    train_a_little(model)
    state = {name: tensor.clone() for name, tensor in adapter_state(model, "a").items()}
    assert not any("petl" in name or ".a." in name for name in state)
    plain_modules = dict(build(family).named_modules())
    assert all(name.rsplit(".", 1)[0] in plain_modules or ".adapter." in name or ".prefix." in name for name in state)
    settings = make(key).to_dict()
    again = pk.adapt(build(family), methods.from_dict(settings), name="b")
    load_adapter_state(again, "b", state)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)


def test_deep_copy_is_independent(model, key):
    pk.adapt(model, make(key))
    train_a_little(model)
    before = logits(model)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), before)
    train_a_little(other)
    assert not torch.allclose(logits(other), before, atol=1e-3)
    assert torch.equal(logits(model), before)
    pk.use_adapter(other, None)
    assert torch.equal(logits(model), before)


def test_generates_with_beams_as_without_cache(model, key):
    pk.adapt(model, make(key))
    train_a_little(model)
    inputs = batch(model)
    inputs.pop("decoder_input_ids")
    settings = {"num_beams": 4, "max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    cached = model.generate(**inputs, **settings, use_cache=True)
    assert torch.equal(cached, model.generate(**inputs, **settings, use_cache=False))


def _checkpoint(model) -> None:
    with warnings.catch_warnings():  # transformers 5.20 renames it
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch(model), use_cache=False).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_gives_the_same_gradients(model, key):
    pk.adapt(model, make(key)).train()
    plain = gradients(model)
    _checkpoint(model)
    again = gradients(model)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "relative", [name if name == "t5gemma" else pytest.param(name, marks=pytest.mark.slow) for name in RELATIVES]
)
def test_relatives_of_the_families(relative, key):
    model = build(relative)
    base = logits(model)
    torch.manual_seed(3)  # with some seeds all of an adapter's few ReLUs are 0
    pk.adapt(model, make(key))
    train_a_little(model)
    assert not torch.allclose(logits(model), base, atol=1e-2)
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not without
    pk.use_adapter(model, None)
    assert torch.equal(logits(model), base)


def test_config_round_trip(key):
    config = make(key)
    assert config.label == key
    assert methods.from_dict(config.to_dict()) == config


def test_other_dtypes_train(family, key):
    dtype = torch.float64 if family == "mbart" else torch.bfloat16
    model = build(family).to(dtype)
    if hasattr(model, "shared"):  # as transformers loads T5: the feed-forward block's last linear stays in fp32
        for layer in methods.describe(model).layers:
            model.get_submodule(layer.ffn.out).to(torch.promote_types(dtype, torch.float32))
    plain = set(model.parameters())
    pk.adapt(model, make(key))
    added = [p for p in pk.trainable_parameters(model) if p not in plain]
    if not key.startswith("bitfit"):  # T5's new biases go into the base's own linears, in its dtype
        assert {p.dtype for p in added} <= {torch.promote_types(dtype, torch.float32)}
    train_a_little(model)
    assert logits(model).isfinite().all()
    assert all(p.grad.dtype == p.dtype for p in pk.trainable_parameters(model))


def test_autocast_trains(model, key):
    pk.adapt(model, make(key))
    with torch.autocast("cpu", torch.bfloat16):
        train_a_little(model)
        assert logits(model).isfinite().all()


def test_saves_the_plain_checkpoint_only(model, key, tmp_path):
    base = logits(model)
    pk.adapt(model, make(key), name="a")
    train_a_little(model)
    pk.use_adapter(model, None)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    torch.testing.assert_close(logits(again), base)
