"""A lean model in use: generation, copies, files, reports, other hooks, compilation, several processes."""

from __future__ import annotations

import copy
import inspect
import pickle
from datetime import timedelta

import pytest
import torch
import torch.multiprocessing as mp
from methods.models import FAMILIES, batch, build, logits
from torch.nn.parallel import DistributedDataParallel

import petl_kernels as pk
from petl_kernels.errors import InputError
from petl_kernels.layers import recompute
from petl_kernels.layers.lean import LeanLayer

from .lean_cases import adapted, ragged, step, worst


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def test_generation_is_the_plain_models(family):
    model = adapted(family, "lora", dtype=torch.float32).eval()
    inputs = {key: value for key, value in batch(model).items() if key != "decoder_input_ids"}
    expected = model.generate(**inputs, num_beams=3, max_new_tokens=8)
    outputs = logits(model)
    pk.lean(model, 2)
    assert torch.equal(model.generate(**inputs, num_beams=3, max_new_tokens=8), expected)
    torch.testing.assert_close(logits(model), outputs)


def test_logits_are_there_when_asked_for(family):
    model = adapted(family, "bitfit", dtype=torch.float32)
    inputs = ragged(model)
    expected = model(**inputs)
    found = pk.lean(model, 1)(**inputs)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found["logits"], expected.logits)
    assert type(found).__name__ == type(expected).__name__
    loss, *_ = model(**inputs, return_dict=False)
    torch.testing.assert_close(loss, expected.loss)


def test_evaluation_makes_no_logits(family):
    model = pk.lean(adapted(family, "lora", dtype=torch.float32), 1).eval()
    with torch.no_grad():
        output = model(**ragged(model))
    assert output.loss.isfinite() and list(output)[1] == "logits"
    assert output.logits.shape[-1] == 99 and output.logits.petl_made is None  # a shape needs no values
    assert output.logits.isfinite().all() and output.logits.petl_made is not None


def test_label_smoothing_and_reduction(family):
    model = adapted(family, "bitfit", dtype=torch.float32)
    inputs = ragged(model)
    expected = torch.nn.functional.cross_entropy(
        model(**inputs).logits.flatten(0, 1), inputs["labels"].flatten(), label_smoothing=0.1, reduction="sum"
    )
    pk.lean(model, 1)
    torch.testing.assert_close(model(**inputs, label_smoothing=0.1, reduction="sum").loss, expected)
    assert model(**inputs, reduction="none").loss.shape == inputs["labels"].shape


def test_lora_on_the_output_projection_takes_logits():
    model = build("mbart").double()
    pk.adapt(model, pk.LoRA(rank=2, targets=("lm_head", "q_proj")))
    inputs = ragged(model.train())
    plain = step(model, inputs)
    difference, name = worst(step(pk.lean(model, 2), inputs), plain)
    assert difference < 1e-9, name
    assert "loss: the model's own, from logits (lm_head is a LoRALinear)" in str(pk.report(model))


def test_adapting_after_lean():
    plain, lean = (build("m2m100").double() for _ in range(2))
    pk.lean(lean, 2)
    inputs = ragged(plain)
    for model in (plain, lean):
        pk.adapt(model, pk.Adapter(bottleneck=4)).train()
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in pk.trainable_parameters(model):
                parameter.copy_(torch.randn_like(parameter) / 5)
    assert worst(step(lean, inputs), step(plain, inputs))[0] < 1e-9


def test_keys_names_and_signature_stay(family, tmp_path):
    model = adapted(family, "lora", dtype=torch.float32)
    keys, signature = list(model.state_dict()), inspect.signature(model.forward)
    pk.lean(model, 2)
    assert list(model.state_dict()) == keys
    assert inspect.signature(model.forward) == signature
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).config.architectures == [type(build(family)).__name__]


def test_copies_and_pickles_stay_lean(family):
    model = pk.lean(adapted(family, "lora"), [1, 2, 3, 4])
    inputs = ragged(model)
    expected = step(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [layer.tier for layer in pk.report(other).layers] == [1, 2, 3, 4]
        assert worst(step(other, inputs), expected)[0] == 0


def test_a_layer_gets_one_attribute_which_goes_with_lean(family):
    model = adapted(family, "lora")
    inputs = ragged(model)
    step(model, inputs)

    def attributes() -> dict[str, set[str]]:
        return {path: set(vars(module)) for path, module in model.named_modules()}

    before, keys = attributes(), list(model.state_dict())
    pk.lean(model, [1, 2, 3, 4])
    step(model, inputs)
    added = {path: own - before[path] for path, own in attributes().items() if own != before[path]}
    assert list(added.values()) == [{"petl_lean"}] * 4 and list(model.state_dict()) == keys
    assert {module.petl_lean.path: module.petl_lean.tier for module in map(model.get_submodule, added)} == dict(
        zip(added, [1, 2, 3, 4], strict=True)
    )
    pk.lean(model, 0)
    assert attributes() == before


def test_backward_twice():
    model = pk.lean(adapted("marian", "lora"), 3)
    loss = model(**ragged(model)).loss
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in pk.trainable_parameters(model)]
    loss.backward()
    for parameter, grad in zip(pk.trainable_parameters(model), first, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * grad, rtol=1e-12, atol=0)


def test_recipes_are_forgotten():
    model = pk.lean(adapted("marian", "lora"), 3)
    step(model, ragged(model))
    recompute.forget()
    assert not recompute._of_thread.recipes


def test_a_layer_that_fails_leaves_no_recipes(monkeypatch):
    """Recipes would hold the layer's tensors while a trainer tries the step again with less memory."""

    def fail(*_):
        raise torch.OutOfMemoryError("none is left")

    model = pk.lean(adapted("marian", "lora"), 3)
    monkeypatch.setattr(LeanLayer, "_rule", lambda self, *_, **__: None)  # op by op
    monkeypatch.setattr("petl_kernels.layers.lean_layer.feed_forward_block", fail)
    with pytest.raises(torch.OutOfMemoryError):
        step(model, ragged(model))
    assert not recompute._of_thread.recipes and recompute._of_thread.layer is None


def test_a_changed_input_is_noticed():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    with recompute.saving():
        held = x * 1.0
        y = recompute.recomputed(torch.sin, held)
        z = (y * y).sum()
    with torch.no_grad():
        held.add_(1)
    with pytest.raises(RuntimeError, match="changed in place: it is at version 1, expected 0"):
        z.backward()


def test_layer_drop(family):
    if family == "t5":
        pytest.skip("the family has no layer drop")
    model = adapted(family, "lora", encoder_layerdrop=0.5, decoder_layerdrop=0.5)
    inputs = ragged(model)
    plain = step(model, inputs, seed=2)
    assert worst(step(pk.lean(model, 2), inputs, seed=2), plain)[0] < 1e-9


# ---- models and layers that stay plain -----------------------------------------------------------------------------


def test_report():
    model = pk.adapt(build("m2m100"), pk.LoRA(rank=2))
    assert "lean: no layer" in str(pk.report(model)) and "loss: the model's own, from logits" in str(pk.report(model))
    pk.lean(model, [1, 2, 2, 2])
    text = str(pk.report(model))
    assert "lean: 1 of 4 layers at tier 1\nlean: 3 of 4 layers at tier 2\nloss: without logits" in text


def test_a_hook_on_a_skipped_module_is_respected():
    model = pk.lean(adapted("m2m100", "lora"), 2)
    calls = []
    layer = model.model.encoder.layers[0]
    handle = layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    inputs = ragged(model)
    expected = step(model, inputs)
    assert calls == [1]
    assert "not lean: model.encoder.layers.0: a hook on self_attn" in str(pk.report(model))
    handle.remove()
    assert worst(step(model, inputs), expected)[0] < 1e-9
    assert "not lean" not in str(pk.report(model))


def test_a_hook_on_a_projection_is_respected():
    model = pk.lean(adapted("t5", "lora"), 2)
    model.encoder.block[0].layer[0].SelfAttention.k.register_forward_hook(lambda module, args, output: 2 * output)
    lean = step(model, ragged(model))
    assert worst(lean, step(pk.lean(model, 0), ragged(model)))[0] < 1e-9


def test_an_unknown_activation_and_attention():
    model = build("m2m100")
    model.model.encoder.layers[1].activation_fn = torch.nn.Tanh()
    pk.lean(model, 1)
    assert "not lean: model.encoder.layers.1: activation Tanh" in str(pk.report(model))
    assert [layer.tier for layer in pk.report(model).layers] == [1, 0, 1, 1]
    model.config._attn_implementation = "flex_attention"
    assert "attention implementation 'flex_attention', expected eager or sdpa" in str(pk.report(model))


def test_output_attentions_runs_the_layers_own_forward(family):
    model = pk.lean(adapted(family, "lora", attention="eager", dtype=torch.float32), 2)
    output = model(**ragged(model), output_attentions=True, output_hidden_states=True)
    assert len(output.encoder_attentions) == 2 and output.encoder_attentions[0] is not None
    assert len(output.decoder_hidden_states) == 3


def test_a_model_of_another_kind_keeps_working():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    pk.lean(model, 2)
    assert model(torch.ones(1, 4)).shape == (1, 4)
    assert "lean: no layer" in str(pk.report(model))


@pytest.mark.parametrize(
    ("tier", "message"),
    [
        (6, "tier 6: expected 1 to 5, 0 for the plain layer, or .auto."),
        (-1, "tier -1: expected 1 to 5"),
        (True, "tier True: expected 1 to 5"),
        ("2", "tier '2': expected 1 to 5"),
        ([1, 2], "tier: 2 of them, expected one for each of the 4 layers, encoder first"),
        ([1, 2, 3, 9], "tier 9: expected 1 to 5"),
    ],
)
def test_wrong_tiers(tier, message):
    model = build("m2m100")
    with pytest.raises(InputError, match=message):
        pk.lean(model, tier)
    assert all(layer.tier == 0 for layer in pk.report(model).layers)


# ---- PyTorch around it ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "tiers", [(1, 3), *(pytest.param(tiers, marks=pytest.mark.repeat) for tiers in ((3, 1), (4, 4)))]
)
def test_compiled(tiers):
    """It has one layer a side, since compiling takes the time."""
    model = adapted("m2m100", "lora", dtype=torch.float32, encoder_layers=1, decoder_layers=1)
    pk.lean(model, tiers)
    inputs = ragged(model)
    expected = step(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    found = {name.removeprefix("_orig_mod."): value for name, value in step(compiled, inputs).items()}
    difference, name = worst(found, expected)
    assert difference < 1e-5, (name, difference)


def _worker(rank: int, path: str, cases: list[tuple[str, int]]) -> None:
    given = {"init_method": f"file://{path}/meet", "rank": rank, "world_size": 2, "timeout": timedelta(minutes=2)}
    torch.distributed.init_process_group("gloo", **given)
    for method, tier in cases:
        model = pk.lean(adapted("m2m100", method), tier)
        inputs = {name: value[2 * rank : 2 * rank + 2] for name, value in ragged(model, rows=4).items()}
        values = step(DistributedDataParallel(model), inputs, reduction="sum")
        if rank == 0:
            values = {name.removeprefix("module."): value for name, value in values.items()}
            torch.save(values, f"{path}/{method}{tier}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    cases = [("lora", 2), ("lora", 4), ("prefix", 1)]
    other = mp.get_context("spawn").Process(target=_worker, args=(1, str(tmp_path), cases))
    other.start()
    _worker(0, str(tmp_path), cases)  # this process is the first: each further one imports everything
    other.join()
    assert other.exitcode == 0
    for method, tier in cases:
        model = pk.lean(adapted("m2m100", method), tier)
        whole = step(model, ragged(model, rows=4), reduction="sum")
        found = torch.load(tmp_path / f"{method}{tier}")
        for name in whole:
            if name != "loss":  # the processes' gradients are averaged
                torch.testing.assert_close(2 * found[name], whole[name], rtol=1e-9, atol=1e-12)
