"""Linears of a layer in one product, with LoRA in a border of their weights: forced on a CPU."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from methods.models import build, logits

import petl_kernels as pk
from petl_kernels.accounting.saved import saved_bytes
from petl_kernels.layers import border
from petl_kernels.layers.lean import LeanLayer
from petl_kernels.layers.rule import border as rule_border
from petl_kernels.models.structure import describe
from petl_kernels.ops import define
from petl_kernels.weights.quantized import quantize_model
from petl_kernels.weights.streamed import stream_layers, unstream

from .lean_cases import DROPOUT, adapted, assert_same, borders, ragged, step, worst

# m2m100's: two encoder layers with one border each, two decoder layers with three.
LORA = ["self.qkv", "self.qkv", *["self.qkv", "cross.q", "cross.kv"] * 2]
FROZEN = [name for name in LORA if name != "cross.q"]


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(border, "DEVICES", {"cpu", "cuda"})


@pytest.fixture
def ran(monkeypatch) -> Counter:
    """Counts the runs of each op of a layer's linears."""
    counted = Counter()
    for name in ("lora_border", "lora_border_backward", "lora_linear", "frozen_linear"):
        kernel = define._kernels[name]
        monkeypatch.setitem(define._kernels, name, lambda *args, n=name, k=kernel: counted.update([n]) or k(*args))
    return counted


def projections(model) -> dict[str, torch.nn.Module]:
    """Returns q, k and v of every attention, by path."""
    paths = (path for attention in describe(model).attentions for path in (attention.q, attention.k, attention.v))
    return {path: model.get_submodule(path) for path in paths}


CASES = [(family, method) for family in ("m2m100", "t5") for method in ("lora", "bitfit")] + [("marian", "lora")]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_exact(case, ran):
    """Loss and every gradient, in each tier."""
    model = adapted(*case)
    inputs = ragged(model)
    expected = step(model, inputs)
    for tier in (1, 2, 3, 4, 5):
        pk.lean(model, tier)
        ran.clear()
        assert_same(step(model, inputs), expected)
        assert ran["lora_border_backward"] == len(borders(model)) > 0 and not ran["lora_linear"]
        assert all(not state.composed for state in pk.report(model).layers)
    assert borders(model) == (LORA if case[1] == "lora" else FROZEN)


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_other_ranks_scales_and_trained_biases(bias):
    settings = {"targets": ("q_proj", "k_proj", "v_proj"), "rank": 2, "bias": bias}
    model = build("m2m100").double()
    pk.adapt(model, pk.LoRA(**settings, rank_pattern={"v_proj": 7}, alpha_pattern={"k_proj": 3.0}))
    for parameter in pk.trainable_parameters(model):
        torch.nn.init.normal_(parameter, std=0.2)
    inputs = ragged(model)
    expected = step(model, inputs)
    for tier in (1, 3):
        assert_same(step(pk.lean(model, tier), inputs), expected)


def test_dropout_elsewhere_and_autocast():
    """Rows that are cast, or come from outside of the layer, are copied."""
    for settings, autocast in ((DROPOUT, False), ({}, True)):
        dtype = torch.float32 if autocast else torch.float64
        plain = pk.lean(adapted("m2m100", "lora", dtype=dtype, **settings), 2)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(border, "DEVICES", set())
            apart = pk.lean(copy.deepcopy(plain), 2)
        pk.lean(plain, 2)
        assert borders(plain) == LORA and borders(apart) == []
        inputs = ragged(plain)
        exact = step(apart, inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, expected = step(plain, inputs), step(apart, inputs)
        assert found.keys() == expected.keys()
        assert worst(found, exact)[0] <= 1e-9 + 2 * worst(expected, exact)[0]


def test_lora_dropout_leaves_the_linears_apart(ran):
    model = build("m2m100").double()
    pk.adapt(model, pk.LoRA(rank=2, dropout=0.3))
    pk.lean(model, 1)
    assert borders(model) == []
    model.train()
    step(model, ragged(model))
    assert ran["lora_linear"] and not ran["lora_border"]


def test_dora_leaves_the_linears_apart(ran):
    """Also where it comes to a model that has borders."""
    model = adapted("m2m100", "dora")
    assert borders(pk.lean(model, 1)) == []
    assert all(border.border_bytes(model, layer, "cuda") == 0 for layer in describe(model).layers)
    model = pk.lean(adapted("m2m100", "lora"), 1)
    pk.adapt(model, pk.LoRA(rank=2, dora=True), name="dora")
    inputs = ragged(model)
    ran.clear()
    found = step(model.train(), inputs)
    assert ran["lora_linear"] and not ran["lora_border"]
    assert worst(found, step(pk.lean(model, 0), inputs))[0] < 1e-9


def test_dropout_that_is_set_afterwards(ran):
    model = pk.lean(adapted("m2m100", "lora"), 1)
    for linear in projections(model).values():
        if hasattr(linear, "lora"):
            linear.lora.current().dropout = 0.5
    step(model, ragged(model))
    assert ran["lora_linear"] and not ran["lora_border"]


# ---- values between forward and backward -----------------------------------------------------------------------------


def test_what_is_changed_in_place_is_named():
    model = pk.lean(adapted("m2m100", "lora"), 1)
    for changed in ("k_proj.weight", "q_proj.weight", "v_proj.bias"):
        loss = model(**ragged(model)).loss
        path = f"model.encoder.layers.1.self_attn.{changed}"
        with torch.no_grad():
            model.get_parameter(path).mul_(1.5)
        with pytest.raises(RuntimeError, match=path):
            loss.backward()


def test_the_weights_may_go_between_forward_and_backward():
    model = adapted("m2m100", "lora")
    inputs = ragged(model)
    expected = step(model, inputs)
    model.zero_grad()
    loss = pk.lean(model, 1)(**inputs).loss
    pk.lean(model, 0)
    loss.backward()
    assert_same(
        {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}, expected
    )


# ---- where the weights are ------------------------------------------------------------------------------------------


def test_the_weights_keep_their_values_and_stand_in_one_memory():
    model = adapted("m2m100", "lora")
    before = {name: p.clone() for name, p in model.named_parameters()}
    pk.lean(model, 1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    first = describe(model).layers[0].attentions[0]
    storages = {model.get_submodule(path).weight.untyped_storage()._cdata for path in (first.q, first.k, first.v)}
    assert len(storages) == 1
    pk.lean(model, 0)
    assert all(torch.equal(p, before[name]) and p.is_contiguous() for name, p in model.named_parameters())
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())


def test_bytes_are_what_a_plan_counts():
    model = adapted("m2m100", "lora", dtype=torch.bfloat16)
    layers = describe(model).layers
    counted = [border.border_bytes(model, layer, "cuda") for layer in layers]
    on_meta = copy.deepcopy(model).to("meta")
    assert [border.border_bytes(on_meta, layer, "cuda") for layer in layers] == counted
    assert border.border_bytes(model, layers[0], "mps") == 0
    pk.lean(model, 1)
    step(model, ragged(model))
    for layer, expected in zip(layers, counted, strict=True):
        linears = [model.get_submodule(path) for attention in layer.attentions for path in attention.linears[:3]]
        storages = {linear.weight.untyped_storage()._cdata: linear.weight.untyped_storage() for linear in linears}
        room = sum(storage.nbytes() for storage in storages.values()) - sum(linear.weight.nbytes for linear in linears)
        own = model.get_submodule(layer.path).petl_lean.bound._rules.values()
        biases = [group.bordered.bias for rule in own for attention in rule.attentions for group in attention.linears]
        assert room + sum(bias.nbytes for bias in biases) == expected


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_a_tier_saves_what_it_saves_without_a_border(method, monkeypatch):
    """q, k and v are columns of one tensor, and nothing of the wide rows is saved with them."""
    model = adapted("m2m100", method, dtype=torch.float32)
    inputs = ragged(model)
    kept = {}
    for devices in (set(), {"cpu"}):
        monkeypatch.setattr(border, "DEVICES", devices)
        for tier in (1, 2, 3):
            pk.lean(model, tier)
            with saved_bytes(exclude=list(model.parameters())) as saved:
                loss = model(**inputs).loss
            kept.setdefault(tier, []).append(saved.bytes)
            del loss
    assert all(apart == together for apart, together in kept.values()), kept


def test_copies_other_dtypes_and_devices():
    model = pk.lean(adapted("m2m100", "lora"), 1)
    inputs = ragged(model)
    expected = step(model, inputs)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert borders(copied) == LORA
        assert worst(step(copied, inputs), expected)[0] == 0  # to the bit
        copied.model.encoder.layers[0].self_attn.k_proj.weight.data.zero_()
    assert worst(step(model, inputs), expected)[0] == 0
    model.to(torch.float32)
    assert borders(model) == LORA
    assert_same(step(model, inputs), expected, 1e-3)
    model.to("meta")
    assert borders(model) == [] and all(p.is_meta for p in model.parameters())


def test_a_replica_of_another_device_has_its_own_weights():
    """DataParallel's replicas have parameters as attributes, and nothing of the first device."""
    model = pk.lean(adapted("m2m100", "lora"), 1)
    layer = model.model.encoder.layers[0]
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    expected = layer(x, None)
    replica = layer._replicate_for_data_parallel()
    assert replica.petl_lean is not layer.petl_lean and replica.petl_lean.borders is None
    assert torch.equal(layer(x, None), expected) and borders(model) == LORA


def test_streamed_and_quantized_layers_have_none(tmp_path):
    model = pk.lean(adapted("m2m100", "lora", dtype=torch.float32), 1)
    inputs = ragged(model)
    expected = step(model, inputs)
    first = describe(model).layers[0].path
    stream_layers(model, [first], folder=tmp_path)
    pk.lean(model, 1)
    assert borders(model) == LORA[1:]
    assert_same(step(model, inputs), expected, 1e-4)
    model.to(torch.float32)
    assert borders(model) == LORA[1:]
    unstream(model)
    pk.lean(model, 1)
    assert borders(model) == LORA
    quantize_model(model, "int8", "dense")
    assert borders(model) == []
    assert worst(step(model, inputs), expected)[0] < 0.1
    pk.lean(model, 1)
    assert borders(model) == []


def test_weights_of_other_dtypes_or_shared_ones_stay_apart():
    model = adapted("m2m100", "lora", dtype=torch.float32)
    layers = model.model.encoder.layers
    layers[0].self_attn.k_proj.to(torch.float64)
    layers[1].self_attn.k_proj.weight = layers[1].self_attn.q_proj.weight
    assert borders(pk.lean(model, 1)) == LORA[2:]


def test_adapters_that_train_the_base_are_chosen():
    plain = adapted("m2m100", "lora")
    pk.adapt(plain, pk.methods.METHODS["cross-attention"](), "base")
    pk.adapt(plain, pk.methods.METHODS["bitfit"](), "biases")
    lean = pk.lean(copy.deepcopy(plain), 2)
    inputs = ragged(plain)
    for name, names in (("base", LORA[:2] + ["self.qkv"] * 2), ("default", LORA), ("biases", LORA), ("base", None)):
        for model in (plain, lean):
            pk.use_adapter(model, name)
        assert_same(step(lean, inputs), step(plain, inputs))
        assert names is None or sorted(borders(lean)) == sorted(names)


def test_merging():
    plain = adapted("m2m100", "lora")
    lean = pk.lean(copy.deepcopy(plain), 1)
    before = {name: p.clone() for name, p in lean.named_parameters()}
    expected = logits(plain.eval())
    pk.merge(lean.eval())
    assert_same({"logits": logits(lean)}, {"logits": expected})
    assert borders(lean) == LORA
    pk.unmerge(lean)
    assert borders(lean) == LORA
    assert all(torch.equal(p, before[name]) for name, p in lean.named_parameters())
    inputs = ragged(plain)
    assert_same(step(lean.train(), inputs), step(plain.train(), inputs))


def test_a_state_dict_is_loaded_into_the_border():
    model = pk.lean(adapted("m2m100", "lora", dtype=torch.float32), 1)
    state = {name: value + 1 for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert borders(model) == LORA and all(torch.equal(v, state[n]) for n, v in model.state_dict().items())


def test_files_of_a_frozen_model_without_adapters(tmp_path):
    model = pk.lean(build("m2m100").requires_grad_(False), 1)
    assert borders(model) == FROZEN and all(p.is_contiguous() for p in model.parameters())
    model.save_pretrained(tmp_path)
    found = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())


def test_data_that_is_assigned_leaves_the_border(ran):
    plain = adapted("m2m100", "lora")
    lean = pk.lean(copy.deepcopy(plain), 1)
    inputs = ragged(plain)
    step(lean, inputs)
    for model in (plain, lean):
        model.model.encoder.layers[0].self_attn.k_proj.weight.data = torch.ones(32, 32, dtype=torch.float64) / 32
    ran.clear()
    assert_same(step(lean, inputs), step(plain, inputs))
    assert ran["lora_border"] == len(LORA) - 1


def test_other_weights_for_one_call_are_not_moved():
    """``functional_call`` puts tensors of the caller in the place of the parameters."""
    model = pk.lean(adapted("m2m100", "lora"), 1)
    inputs = ragged(model)
    expected = step(model, inputs)
    given = {name: p.detach() * 1.1 for name, p in model.named_parameters() if name.endswith("_proj.weight")}
    before = {name: value.data_ptr() for name, value in given.items()}
    found = torch.func.functional_call(model, given, (), inputs).loss
    assert all(value.data_ptr() == before[name] for name, value in given.items())
    plain = pk.lean(copy.deepcopy(model), 0)
    assert_same({"loss": found}, {"loss": torch.func.functional_call(plain, given, (), inputs).loss})
    assert worst(step(model, inputs), expected)[0] == 0 and borders(model) == LORA


def test_a_source_of_the_same_layout_is_not_written_to(monkeypatch):
    """The source is columns of a wider tensor of the caller: what is behind its rows is no room."""
    model = pk.lean(adapted("m2m100", "lora"), 1)
    layer, room = model.model.decoder.layers[0], 8
    whole = torch.randn(2, 5, 32 + room, dtype=torch.float64)
    before, x = whole.clone(), torch.randn(2, 3, 32, dtype=torch.float64)
    layer(x, None, whole[..., :32], None)
    assert layer.petl_lean.borders["cross.kv"].buffer.shape[1] == 32 + room and torch.equal(whole, before)
    assert rule_border.whole_rows([whole[..., :32]], room) is not None


def test_what_the_norm_has_left_room_for_is_not_copied(monkeypatch):
    """In a pre-norm layer only the source is copied, and no gradient is."""
    model = pk.lean(adapted("m2m100", "lora"), 1)
    copied = []
    own = rule_border.copied_rows
    monkeypatch.setattr(rule_border, "copied_rows", lambda parts, room: copied.append(len(parts)) or own(parts, room))
    step(model, ragged(model))
    assert copied == [1, 1]  # k and v of the source, in both decoder layers


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_a_state_dict_has_tensors_of_their_own(method):
    """Writers of safetensors leave out all but one of the tensors that share memory, or refuse them."""
    model = adapted("m2m100", method, dtype=torch.float32)
    expected = model.state_dict()
    lean = pk.lean(model, 1)
    assert borders(lean)
    found, own = lean.state_dict(), lean.state_dict(keep_vars=True)
    assert list(found) == list(expected) and all(found[name].equal(expected[name]) for name in found)
    tied = {name for name in found if name.endswith(("embed_tokens.weight", "shared.weight", "lm_head.weight"))}
    storages = [value.untyped_storage().data_ptr() for name, value in found.items() if name not in tied]
    assert len(storages) == len(set(storages)) and all(value.is_contiguous() for value in found.values())
    for name in projections(lean):
        assert own[f"{name}.weight"] is lean.get_parameter(f"{name}.weight")
    lean.load_state_dict(found)
    assert borders(lean)


def test_the_bias_stays_where_captured_graphs_write_it(monkeypatch):
    """It stays when the layer is bound anew, as after an evaluation."""
    model = pk.lean(adapted("m2m100", "lora"), 1)
    own = [
        border
        for layer in model.modules()
        if isinstance(layer, LeanLayer)
        for border in layer.petl_lean.borders.values()
    ]
    written, kernel = [], define._kernels["lora_border"]
    monkeypatch.setitem(define._kernels, "lora_border", lambda *args: written.append(args[2]) or kernel(*args))
    step(model, ragged(model))
    model.eval()
    with torch.no_grad():
        logits(model)
    step(model.train(), ragged(model))
    assert len(written) >= 2 * len(own) and all(any(bias is border.bias for border in own) for bias in written)
