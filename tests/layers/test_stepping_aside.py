"""Lean layers with hooks or changes on modules that they do not call: their own forward runs, and the report has why.

And modules that backward reads again: they are as the forward pass saw them, or one line names the change.
"""

from __future__ import annotations

import copy
import threading

import accelerate
import pytest
import torch
from methods.models import build, set_attention
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import petl_kernels as pk
from petl_kernels.errors import InputError
from petl_kernels.layers.lean import LeanLayer

from .lean_cases import adapted, ragged, step, worst

FIRST = {"m2m100": "model.encoder.layers.0", "t5": "encoder.block.0", "mbart": "model.encoder.layers.0"}


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Records the paths of the lean layers that run."""
    paths, run = [], LeanLayer.run
    monkeypatch.setattr(LeanLayer, "run", lambda self, *args: paths.append(self.petl_lean.path) or run(self, *args))
    return paths


def reason(model, path: str) -> str:
    (state,) = (state for state in pk.report(model).layers if state.path == path)
    assert bool(state.reason) == (state.tier == 0)
    return state.reason


# ---- hooks ---------------------------------------------------------------------------------------------------------

HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)
SEEN = [
    *(("m2m100", name) for name in ("self_attn", "self_attn.q_proj", "self_attn_layer_norm", "activation_fn", "fc2")),
    *(("t5", f"layer.1.{name}") for name in ("DenseReluDense", "DenseReluDense.act", "DenseReluDense.dropout")),
    *(("t5", name) for name in ("layer.0", "layer.0.dropout", "layer.0.SelfAttention.o", "layer.1.layer_norm")),
]


def _counting(calls: dict, key: tuple):
    def hook(*_):
        calls[key] = calls.get(key, 0) + 1

    return hook


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_run_as_often_as_without_lean_layers(kind):
    for family in ("m2m100", "t5"):
        plain, lean = build(family).double(), build(family).double()
        calls = {}
        for tier, model in ((0, plain), (4, lean)):
            for path in (path for own, path in SEEN if own == family):
                getattr(model.get_submodule(f"{FIRST[family]}.{path}"), kind)(_counting(calls, (tier, path)))
        inputs = ragged(plain)
        expected = step(plain, inputs)
        assert worst(step(pk.lean(lean, 4), inputs), expected)[0] < 1e-6  # T5's norms are fp32's
        for _, path in (seen for seen in SEEN if seen[0] == family):
            assert calls[0, path] == calls[4, path] > 0
        assert reason(lean, FIRST[family]).startswith("a hook on ")
        assert sum(state.tier == 4 for state in pk.report(lean).layers) == 3


@pytest.mark.parametrize("path", ["layers.0.self_attn.q_proj.lora.default", "layers.1.fc1"])
def test_a_hook_is_named_by_its_place(path):
    model = pk.lean(adapted("m2m100", "lora"), 2)
    model.model.encoder.get_submodule(path).register_forward_hook(lambda *_: None)
    layer, _, place = path.partition(".")[2].partition(".")
    assert reason(model, f"model.encoder.layers.{layer}") == f"a hook on {place}"


def test_a_hook_on_all_modules():
    model = pk.lean(adapted("m2m100", "lora"), 2)
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    try:
        assert reason(model, FIRST["m2m100"]) == "a hook on all modules"
        step(model, ragged(model))
    finally:
        handle.remove()
    assert calls.count("M2M100Attention") == 6 and reason(model, FIRST["m2m100"]) == ""


# ---- other forwards ------------------------------------------------------------------------------------------------


def _twice(module: nn.Module) -> None:
    own = module.forward
    module.forward = lambda *args, **kwargs: own(*args, **kwargs) * 2


def _of_class(module: nn.Module) -> None:
    cls = type(module)
    module.__class__ = type(cls.__name__, (cls,), {"forward": lambda self, x: cls.forward(self, x) * 2})


def _parametrized(module: nn.Module) -> None:
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(module, "weight", Twice())


CHANGES = {
    "norm": ("m2m100", "final_layer_norm", _twice),
    "activation": ("m2m100", "activation_fn", _twice),
    "projection": ("m2m100", "self_attn.k_proj", _twice),
    "class of a norm": ("m2m100", "self_attn_layer_norm", _of_class),
    "class of an activation": ("t5", "layer.1.DenseReluDense.act", _of_class),
    "class of a dropout": ("t5", "layer.0.dropout", _of_class),
    "class of a network": ("t5", "layer.1.DenseReluDense", _of_class),
    "wrapper": ("t5", "layer.1", _twice),
    "parametrized norm": ("m2m100", "self_attn_layer_norm", _parametrized),
    "parametrized linear": ("m2m100", "fc1", _parametrized),
    "weight norm": ("mbart", "fc2", parametrizations.weight_norm),
    "pruned": ("mbart", "fc1", lambda module: prune.random_unstructured(module, "weight", 0.5)),
    "pruned norm": ("mbart", "final_layer_norm", lambda module: prune.random_unstructured(module, "weight", 0.5)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_part(change):
    """Before ``lean`` and after it."""
    family, path, apply = CHANGES[change]
    plain, before = build(family).double(), build(family).double()
    after = pk.lean(build(family).double(), 2)
    for model in (plain, before, after):
        torch.manual_seed(2)
        apply(model.get_submodule(f"{FIRST[family]}.{path}"))
    inputs = ragged(plain)
    expected = step(plain, inputs)
    for model in (pk.lean(before, 2), after):
        assert worst(step(model, inputs), expected)[0] < 1e-6
        assert path in reason(model, FIRST[family])
        assert [state.tier for state in pk.report(model).layers] == [0, 2, 2, 2]


def test_a_class_of_layers_with_another_forward(monkeypatch):
    model = pk.lean(build("m2m100").double(), 2)
    layer = type(model.model.encoder.layers[0]).petl_bases[-1]
    own = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, *args, **kwargs: own(self, *args, **kwargs) * 2)
    inputs = ragged(model)
    found = step(model, inputs)
    assert reason(model, FIRST["m2m100"]).startswith("M2M100EncoderLayer has a forward of its own")
    assert worst(found, step(pk.lean(model, 0), inputs))[0] < 1e-9


def test_peft_over_norms_that_are_lean():
    peft = pytest.importorskip("peft")
    configs = (
        peft.LNTuningConfig(target_modules=["final_layer_norm"]),
        peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["self_attn_layer_norm"]),
    )
    for config in configs:
        torch.manual_seed(0)
        plain = peft.get_peft_model(build("m2m100").double(), config)
        torch.manual_seed(0)
        lean = peft.get_peft_model(pk.lean(build("m2m100").double(), 2), config)
        inputs = ragged(plain.base_model.model)
        assert worst(step(lean, inputs), step(plain, inputs))[0] < 1e-9
        assert "layer_norm is a " in reason(lean.base_model.model, FIRST["m2m100"])


def test_weights_elsewhere():
    """accelerate's hooks load each module's weights when it is called, and lean layers do not call all."""
    model = build("m2m100")
    inputs = ragged(model)
    expected = model(**inputs).loss
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(pk.lean(model, 2)(**inputs).loss, expected)
    assert "another forward" in reason(model, FIRST["m2m100"])


def test_a_dispatched_model(ran):
    """The report has what runs: a wrapper around a layer's forward from before ``lean`` stays."""
    model = build("m2m100")
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    pk.lean(model, 2)(**ragged(model))
    assert not ran and {state.tier for state in pk.report(model).layers} == {0}
    model = pk.lean(build("m2m100"), 2)
    accelerate.hooks.add_hook_to_module(model.model.encoder.layers[0], accelerate.hooks.ModelHook())
    model(**ragged(model))
    assert len(ran) == 4 and {state.tier for state in pk.report(model).layers} == {2}


# ---- dropout -------------------------------------------------------------------------------------------------------


def test_a_rate_that_no_mask_has():
    model = pk.lean(build("m2m100", dropout=1e-6), 2).train()
    assert reason(model, FIRST["m2m100"]).startswith("dropout 1e-06, expected 0, or a number that is 1 to 65535")


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout", "activation_dropout", "dropout_rate"])
def test_all_is_dropped(rate):
    family = "t5" if rate == "dropout_rate" else "m2m100"
    model = pk.lean(build(family, **({} if family == "t5" else {rate: 1.0})).double(), 2)
    if family == "t5":
        model.encoder.block[0].layer[1].DenseReluDense.dropout.p = 1.0
    assert reason(model, FIRST[family]) == ""  # nothing is dropped in eval mode
    model.train()
    inputs = ragged(model)
    found = step(model, inputs)
    assert reason(model, FIRST[family]) == "dropout 1.0, expected less than 1"
    assert worst(found, step(pk.lean(model, 0), inputs))[0] < 1e-6


def test_each_part_has_its_own_mode():
    """``eval`` on a dropout or an attention alone switches that one off."""
    for family, path in (("t5", "layer.0.dropout"), ("m2m100", "self_attn")):
        model = build(family).double().train()
        part = model.get_submodule(f"{FIRST[family]}.{path}")
        setattr(part, "p" if family == "t5" else "dropout", 0.9)
        part.eval()
        inputs = ragged(model)
        plain = step(model, inputs)
        assert worst(step(pk.lean(model, 2), inputs), plain)[0] < 1e-6


# ---- caches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["m2m100", "mbart", "marian", "t5"])
def test_a_cache_that_nobody_has_asked_for_is_filled(family, ran):
    """``use_cache`` is on by default: a model with a loss of the caller's is lean, and returns the same cache."""
    model = adapted(family, "lora")
    inputs = ragged(model)
    inputs["decoder_input_ids"] = inputs.pop("labels").clamp(min=3)

    def values(model):
        model.zero_grad()
        output = model(**inputs)
        parts = (output.past_key_values.self_attention_cache, output.past_key_values.cross_attention_cache)
        held = [tensor for part in parts for layer in part.layers for tensor in (layer.keys, layer.values)]
        (output.logits.square().mean() + sum(tensor.square().mean() for tensor in held)).backward()
        found = {f"cache {i}": tensor.detach() for i, tensor in enumerate(held)}
        return {**found, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}

    expected = values(copy.deepcopy(model))
    for tier in (1, 2, 3, 4, 5):
        ran.clear()
        difference, name = worst(values(pk.lean(model, tier)), expected)
        assert difference < 1e-9, (tier, name, difference)
        assert len(ran) == 4


def test_a_cache_with_words_in_it_is_the_layers_own(ran):
    model = pk.lean(adapted("m2m100", "lora"), 2)
    inputs = ragged(model)
    ids = inputs.pop("labels").clamp(min=3)
    del inputs["decoder_attention_mask"]
    whole = model(**inputs, decoder_input_ids=ids).logits
    first = model(**inputs, decoder_input_ids=ids[:, :2])
    ran.clear()
    rest = model(**inputs, decoder_input_ids=ids[:, 2:], past_key_values=first.past_key_values)
    assert not any("decoder" in path for path in ran)
    torch.testing.assert_close(rest.logits, whole[:, 2:])


# ---- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["2-D", "bool", "least"])
@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_a_source_of_nothing_but_padding(attention, kind):
    for family in ("m2m100", "bart", "t5", "seamless"):
        for dtype, limit in ((torch.float64, 1e-9), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)):
            if (family, attention, dtype) == ("t5", "eager", torch.float16):
                continue  # where scores of 16 and more are left beside finfo.min, rounded to multiples of 32
            model = adapted(family, "lora")
            model.to(dtype)
            set_attention(model, attention)
            inputs = ragged(model)
            ids = inputs.pop("labels").clamp(min=3)
            mask = inputs["attention_mask"]
            mask[1] = 0
            inputs["decoder_attention_mask"][:, 0] = 0  # the first word sees nothing
            if kind != "2-D":
                mask = mask[:, None, None].bool()
                least = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
                inputs["attention_mask"] = mask if kind == "bool" else least
            expected = model(**inputs, decoder_input_ids=ids, use_cache=False).logits
            found = pk.lean(model, 2)(**inputs, decoder_input_ids=ids, use_cache=False).logits
            difference = (found.double() - expected.double()).norm() / expected.double().norm()
            assert difference < limit, (family, dtype, difference)


def test_a_row_of_nothing_but_minus_infinity():
    """transformers' eager attention has NaN for it; a lean layer has 0, and other sentences are not affected."""
    for family in ("m2m100", "t5"):
        model = adapted(family, "lora", "eager")
        inputs = ragged(model)
        ids = inputs.pop("labels").clamp(min=3)
        mask = inputs["attention_mask"]
        mask[1] = 0
        hidden = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask == 0, -torch.inf)
        inputs["attention_mask"] = hidden[:, None, None]
        expected = model(**inputs, decoder_input_ids=ids, use_cache=False).logits
        found = pk.lean(model, 2)(**inputs, decoder_input_ids=ids, use_cache=False).logits
        assert expected[1].isnan().all() and found.isfinite().all()
        torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-9, atol=1e-9)


# ---- threads -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("method", "tier"), [("lora", 2), ("parallel", 3), ("parallel", 0), ("adapter", 5)])
def test_one_model_in_several_threads(method, tier):
    model = pk.lean(adapted("m2m100", method), tier)
    if method == "parallel":  # beside the network, by its hooks
        model.model.encoder.layers[0].activation_dropout = 1e-9
    batches = [ragged(model, rows=rows) for rows in (2, 3, 4)]
    for inputs in batches:
        inputs["decoder_input_ids"] = inputs.pop("labels").clamp(min=3)
    trained = pk.trainable_parameters(model)

    def gradients(inputs):
        return torch.autograd.grad(model(**inputs).logits.square().mean(), trained)

    expected = [gradients(inputs) for inputs in batches]
    wrong = []

    def work(k: int) -> None:
        try:
            for _ in range(6):
                for found, right in zip(gradients(batches[k]), expected[k], strict=True):
                    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-9)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]


# ---- modules that backward reads again -----------------------------------------------------------------------------


def _switch(model):
    pk.use_adapter(model, None)
    model.requires_grad_(True)


def _eval(model):
    model.eval()


def _rate(model):
    for module in model.modules():
        if hasattr(module, "lora"):
            module.lora["default"].dropout = 0.1


def _step(model):
    with torch.no_grad():
        for parameter in pk.trainable_parameters(model):
            parameter.mul_(1.5)


def _other_memory(model):
    for layer in (module for module in model.modules() if isinstance(module, LeanLayer)):
        for parameter in layer.parameters():
            parameter.data = parameter.data * 1.5


BETWEEN = {"adapter": _switch, "mode": _eval, "rate": _rate}


def _with_dropout(family: str, tier: int) -> torch.nn.Module:
    model = pk.lean(adapted(family, "lora"), tier)
    for module in model.modules():
        if hasattr(module, "lora"):
            module.lora["default"].dropout = 0.3
    return model


def _gradients(model, inputs, change=lambda model: None) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    loss = model(**inputs).loss
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    change(model)
    return dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))


@pytest.mark.parametrize("change", BETWEEN)
@pytest.mark.parametrize("family", ["m2m100", pytest.param("t5", marks=pytest.mark.slow)])
def test_what_changes_before_backward_does_not_count(family, change):
    """Backward reads the tensors of its own forward pass."""
    for tier in (1, 2, 3, 4, 5):
        expected = _gradients(_with_dropout(family, tier), ragged(_with_dropout(family, tier)))
        model = _with_dropout(family, tier)
        found = _gradients(model, ragged(model), BETWEEN[change])
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14, msg=f"{tier} {name}")


def _frozen(model):
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith(("q_proj.weight", "q.weight"))).mul_(2)


@pytest.mark.parametrize("change", [_step, _other_memory, _frozen])
def test_values_that_change_before_backward_are_refused(change):
    for family in ("m2m100", "t5"):
        for tier in (1, 2, 3, 4, 5):
            model = _with_dropout(family, tier)
            with pytest.raises(RuntimeError, match=r"changed since the forward pass|modified by an inplace operation"):
                _gradients(model, ragged(model), change)


def test_other_weights_for_one_call():
    for family in ("m2m100", "t5"):
        model = adapted(family, "lora")
        weights = {name: (1.1 * p).detach().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
        wanted = [weight for weight in weights.values() if weight.requires_grad]
        losses = []
        for tier in (0, 1, 2, 4):
            loss = torch.func.functional_call(pk.lean(model, tier), weights, (), ragged(model)).loss
            losses.append((loss, *torch.autograd.grad(loss, wanted)))
        for found in losses[1:]:
            torch.testing.assert_close(found, losses[0], rtol=1e-9, atol=1e-12)


def test_what_does_not_count_may_change():
    """The mode of a model without dropout, another adapter's values, and an optimiser's step after backward."""
    model = adapted("m2m100", "lora")
    pk.adapt(model, pk.LoRA(rank=2), name="other")
    pk.use_adapter(model, "default")
    inputs = ragged(model)
    expected = step(model, inputs)
    for tier in (2, 4):
        pk.lean(model, tier).train()
        model.zero_grad()
        loss = model(**inputs).loss
        model.eval()
        with torch.no_grad():
            model.model.encoder.layers[0].self_attn.q_proj.lora["other"].A.zero_()
        loss.backward()
        for name, parameter in model.named_parameters():
            if name in expected:
                torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)


# ---- second derivatives --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "adapter", "parallel", "full", "ln"])
def test_second_derivatives_are_refused(method):
    for tier in (0, 1, 2, 4) if method in ("lora", "adapter") else (1, 2):
        model = pk.lean(adapted("m2m100", method), tier)
        trained = pk.trainable_parameters(model)[0]
        inputs = ragged(model)
        inputs["decoder_input_ids"] = inputs.pop("labels").clamp(min=3)
        output = model(**inputs).logits.square().mean()
        with pytest.raises(InputError, match=r"cannot be differentiated again \(create_graph=True\)"):
            torch.autograd.grad(output, trained, create_graph=True)


# ---- T5 in 16 bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_t5_with_a_wide_projection(method, dtype):
    """transformers loads it in fp16 so: the last projection of its networks stays in fp32, and so does the stream."""
    exact = adapted("t5", method)
    inputs = ragged(exact)
    expected = step(exact, inputs)
    model = adapted("t5", method).to(dtype)
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.float()

    def error(found):
        names = [name for name in expected if name != "loss"]
        difference = sum((found[name].double() - expected[name]).square().sum() for name in names)
        return (difference / sum(expected[name].square().sum() for name in names)).sqrt().item()

    plain = error(step(model, inputs))
    for tier in (1, 2, 4):
        assert error(step(pk.lean(model, tier), inputs)) <= 2 * plain
        assert {state.tier for state in pk.report(model).layers} == {tier}
