"""The loss of a lean model: the plain model's, in its output, or left to the model where it has its own."""

from __future__ import annotations

import copy
import threading
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import petl_kernels as pk
from petl_kernels import InputError
from petl_kernels.layers.loss.late_cache import _State
from petl_kernels.layers.loss.lean_loss import LeanLoss, lean_loss, loss_states
from petl_kernels.models.transformers_names import LOSSES

from .loss_models import WORDS, assert_same_gradients, gradients, labelled, tiny

M2M, MBART = "M2M100ForConditionalGeneration", "MBartForConditionalGeneration"
T5GEMMA = "T5GemmaForConditionalGeneration"


def lean_and_plain(name: str, cls: type | None = None) -> tuple[nn.Module, nn.Module]:
    return pk.lean(tiny(name, cls), 1), tiny(name, cls)


def assert_equal_outputs(found, expected) -> None:
    assert list(found) == list(expected) and len(found.to_tuple()) == len(expected.to_tuple())
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found[1], expected[1])


def loss_line(model: nn.Module) -> str:
    return pk.report(model).loss


@pytest.mark.parametrize("name", LOSSES)
def test_known_classes_give_what_they_gave(name):
    lean, plain = lean_loss(tiny(name)), tiny(name)
    assert loss_states(lean) == [(lean, True, "")]
    inputs = labelled()
    if name.startswith("LED"):  # whose gradients are nan beside padding
        del inputs["attention_mask"]
    found, expected = lean(**inputs), plain(**inputs)
    assert_equal_outputs(found, expected)
    as_tuple = lean(**inputs, return_dict=False)
    torch.testing.assert_close(as_tuple[:2], plain(**inputs, return_dict=False)[:2])
    assert len(as_tuple) == len(expected)
    # gradients of the loss alone: layers/test_every_model.py
    both = [(output.loss + output.logits.square().mean()) for output in (found, expected)]
    assert_same_gradients(gradients(lean, both[0]), gradients(plain, both[1]))


def test_no_list_is_needed_for_names_that_are_not_there():
    assert all(hasattr(transformers, name) for name in LOSSES)


# ---- a model's own loss ----------------------------------------------------------------------------------------------


class WithATerm(transformers.M2M100ForConditionalGeneration):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if output.loss is not None:
            output.loss = output.loss + 0.1 * output.encoder_last_hidden_state.square().mean()
        return output


class BelowIt(WithATerm):
    pass


class WithoutAForward(transformers.M2M100ForConditionalGeneration):
    pass


@pytest.mark.parametrize("cls", [WithATerm, BelowIt])
def test_a_subclass_with_a_forward_keeps_its_loss(cls):
    lean, plain = lean_and_plain(M2M, cls)
    assert loss_line(lean) == "loss: the model's own, from logits (WithATerm has a forward of its own)"
    found, expected = lean(**labelled()), plain(**labelled())
    assert_equal_outputs(found, expected)
    assert_same_gradients(gradients(lean, found.loss), gradients(plain, expected.loss))


def test_a_subclass_without_a_forward_is_known():
    lean, plain = lean_and_plain(M2M, WithoutAForward)
    assert loss_line(lean) == "loss: without logits"
    assert_equal_outputs(lean(**labelled()), plain(**labelled()))


def test_router_losses_stay():
    lean, plain = lean_and_plain("NllbMoeForConditionalGeneration")
    assert "without logits" in loss_line(lean)  # the router losses are added to it
    torch.testing.assert_close(lean(**labelled()).loss, plain(**labelled()).loss)
    assert plain(**labelled()).loss != plain(**labelled(), output_router_logits=False).loss


def test_a_forward_that_somebody_has_put_into_the_class(monkeypatch):
    cls = transformers.M2M100ForConditionalGeneration
    own = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, **inputs: (2 * own(self, **inputs).loss,))
    lean, plain = lean_and_plain(M2M)
    assert "(M2M100ForConditionalGeneration has a forward of its own)" in loss_line(lean)
    torch.testing.assert_close(lean(**labelled())[0], plain(**labelled())[0])


@pytest.mark.parametrize("first", ["lean", "forward"])
def test_a_forward_of_the_instance(first):
    plain, model = tiny(M2M), tiny(M2M)
    if first == "lean":
        pk.lean(model, 1)
    own = model.forward

    def doubled(**inputs):
        output = own(**inputs)
        output.loss = 2 * output.loss
        return output

    model.forward = doubled
    pk.lean(model, 1)
    torch.testing.assert_close(model(**labelled()).loss, 2 * plain(**labelled()).loss)
    line = "without logits" if first == "lean" else "the model's own, from logits (forward of the M2M100ForConditionalG"
    assert line in loss_line(model)


# ---- wrappers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MBART, "PLBartForConditionalGeneration"])
def test_peft_models_take_their_own_decoder_inputs(name):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
    plain = peft.get_peft_model(tiny(name), config)
    lean = pk.lean(copy.deepcopy(plain), 1)
    assert loss_line(lean) == f"loss: without logits in {name}"
    found, expected = lean(**labelled()), plain(**labelled())
    assert_equal_outputs(found, expected)
    assert_same_gradients(gradients(lean, found.loss), gradients(plain, expected.loss))
    smooth = F.cross_entropy(expected.logits.flatten(0, 1), labelled()["labels"].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(lean(**labelled(), label_smoothing=0.1).loss, smooth)
    pk.lean(lean, 0)
    assert not any(isinstance(module, LeanLoss) for module in lean.modules())


def test_adaloras_term_stays():
    peft = pytest.importorskip("peft")
    settings = {"target_modules": ["q_proj"], "init_r": 4, "target_r": 2, "total_step": 10}
    config = peft.AdaLoraConfig(**settings, task_type="SEQ_2_SEQ_LM")
    plain = peft.get_peft_model(tiny(M2M), config)
    lean = pk.lean(copy.deepcopy(plain), 1)
    found, expected = lean(**labelled()).loss, plain(**labelled()).loss
    torch.testing.assert_close(found, expected)
    assert_same_gradients(gradients(lean, found), gradients(plain, expected))
    assert expected > plain.base_model.model(**labelled()).loss + 0.1


def test_a_wrapper_of_ones_own():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, **inputs):
            return self.inner(**inputs).loss * 3

    wrapper = pk.lean(Wrapper(tiny(M2M)), 1)
    assert loss_line(wrapper) == f"loss: without logits in {M2M}"
    torch.testing.assert_close(wrapper(**labelled()), 3 * tiny(M2M)(**labelled()).loss)


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["plain", "hooked"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
def test_options_are_those_of_cross_entropy(smoothing, reduction, head):
    lean, plain = lean_and_plain(MBART)
    if head == "hooked":
        lean.lm_head.register_forward_hook(lambda *_: None)
    options = {"label_smoothing": smoothing, "reduction": reduction}
    labels = labelled()["labels"]
    found, output = lean(**labelled(), **options), plain(**labelled())
    expected = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), **options)
    torch.testing.assert_close(found.loss, expected.view(labels.shape) if reduction == "none" else expected)
    assert_same_gradients(gradients(lean, found.loss.sum()), gradients(plain, expected.sum()))
    assert list(found) == list(output)
    torch.testing.assert_close(lean(**labelled(), **options, return_dict=False)[:2], (found.loss, output.logits))


@pytest.mark.parametrize("head", ["plain", "hooked", "hooked inside", "own loss function"])
@pytest.mark.parametrize(("smoothing", "reduction"), [(0.3, "sum"), (0.3, "mean"), (0.0, "none")])
def test_options_with_capped_logits(smoothing, reduction, head):
    lean, plain = lean_and_plain(T5GEMMA)
    lean.config.decoder.final_logit_softcapping = plain.config.decoder.final_logit_softcapping = 0.8
    if head != "own loss function":
        del lean._loss_function
    if head.startswith("hooked"):
        hooked = lean.lm_head if head == "hooked" else lean.lm_head.out_proj
        hooked.register_forward_hook(lambda *_: None)
        assert loss_states(lean) == [(lean, False, "a hook on lm_head")]
    options = {"label_smoothing": smoothing, "reduction": reduction}
    labels = labelled()["labels"]
    found, output = lean(**labelled(), **options), plain(**labelled())
    assert output.logits.abs().max() < 0.8
    expected = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), **options)
    expected = expected.view(labels.shape) if reduction == "none" else expected
    torch.testing.assert_close(found.loss, expected.to(found.loss.dtype))
    assert_same_gradients(gradients(lean, found.loss.sum()), gradients(plain, expected.sum()))
    torch.testing.assert_close(found.logits, output.logits)


def test_a_mean_over_the_items_of_several_batches():
    """transformers' Trainer gives their number to models that take it."""
    lean, plain = lean_and_plain(T5GEMMA)
    del lean._loss_function
    expected = plain(**labelled()).loss * 6 / 10
    found = lean(**labelled(), num_items_in_batch=10).loss
    torch.testing.assert_close(found, expected.float())
    assert_same_gradients(gradients(lean, found), gradients(plain, expected))
    with pytest.raises(InputError, match="^reduction: beside num_items_in_batch, which divides a sum; expected one"):
        lean(**labelled(), num_items_in_batch=10, reduction="sum")


@pytest.mark.parametrize("change", ["+ 1", "* 2", "/ 2", "tanh"])
def test_other_steps_than_a_cap_read_the_logits(change, monkeypatch):
    """The loss of logits that something else was done to is that of the values."""

    def other(logits, labels, vocab_size, **kwargs):
        changed = {"+ 1": logits + 1, "* 2": logits * 2, "/ 2": logits / 2, "tanh": torch.tanh(logits)}[change]
        return F.cross_entropy(changed.view(-1, vocab_size), labels.view(-1))

    lean, plain = lean_and_plain(T5GEMMA)
    lean.loss_function = plain.loss_function = other
    found, expected = lean(**labelled()).loss, plain(**labelled()).loss
    torch.testing.assert_close(found, expected)
    assert_same_gradients(gradients(lean, found), gradients(plain, expected))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_labels_that_are_all_ignored(smoothing, reduction):
    lean, plain = lean_and_plain(M2M)
    inputs = labelled()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    options = {"label_smoothing": smoothing, "reduction": reduction}
    expected = F.cross_entropy(plain(**inputs).logits.flatten(0, 1), inputs["labels"].flatten(), **options)
    found = lean(**inputs, **options).loss
    torch.testing.assert_close(found.flatten(), expected.flatten(), equal_nan=True)
    for gradient in gradients(lean, found.sum()).values():
        assert not gradient.any()
    assert not any(gradient.any() for gradient in gradients(plain, expected.sum()).values())


def test_wrong_options():
    model = pk.lean(tiny(M2M), 1)
    inputs = labelled()
    with pytest.raises(InputError, match=r"label_smoothing is 1\.1: expected 0 <= label_smoothing <= 1"):
        model(**inputs, label_smoothing=1.1)
    with pytest.raises(InputError, match="reduction is 'max': expected one of mean, sum, none"):
        model(**inputs, reduction="max")
    labels = inputs.pop("labels")
    with pytest.raises(InputError, match="label_smoothing, reduction: expected labels beside it"):
        model(**inputs, decoder_input_ids=labels.clamp(min=0), label_smoothing=0.1, reduction="sum")


def test_arguments_by_position_and_other_inputs():
    lean, plain = lean_and_plain(M2M)
    inputs = labelled()
    ids = inputs["input_ids"]
    found, expected = (model(ids, inputs["attention_mask"], labels=inputs["labels"]) for model in (lean, plain))
    assert_equal_outputs(found, expected)
    words = torch.randint(3, WORDS, (2, 4))
    for given in ({"decoder_input_ids": words}, {"num_items_in_batch": torch.tensor(17)}):
        assert_equal_outputs(lean(**inputs, **given), plain(**inputs, **given))
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        lean(ids, **inputs)
    with pytest.raises(TypeError, match="too many positional arguments"):
        lean(*[None] * 40, labels=inputs["labels"])


# ---- what the loss steps aside for -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("register", "reason"),
    [
        (lambda head, hook: head.register_forward_hook(hook), "a hook on lm_head"),
        (lambda head, hook: head.register_forward_pre_hook(hook), "a hook on lm_head"),
        (lambda head, hook: head.register_full_backward_hook(hook), "a hook on lm_head"),
        (lambda head, hook: head.register_full_backward_pre_hook(hook), "a hook on lm_head"),
        (lambda head, hook: nn.modules.module.register_module_forward_hook(hook), "a hook on lm_head"),
    ],
)
def test_hooks_on_the_output_projection(register, reason):
    lean, plain = lean_and_plain(M2M)
    calls = []
    handle = register(lean.lm_head, lambda module, *_: calls.append(module) and None)
    try:
        assert loss_line(lean) == f"loss: the model's own, from logits ({reason})"
        found = lean(**labelled())
        found.loss.backward()
        assert lean.lm_head in calls
    finally:
        handle.remove()
    assert_equal_outputs(found, plain(**labelled()))
    assert loss_line(lean) == "loss: without logits"


def test_a_replaced_forward_of_the_output_projection():
    lean, plain = lean_and_plain(M2M)
    for model in (lean, plain):
        own = model.lm_head.forward
        model.lm_head.forward = lambda x, own=own: 2 * own(x)
    assert loss_line(lean) == "loss: the model's own, from logits (the forward of lm_head is replaced)"
    assert_equal_outputs(lean(**labelled()), plain(**labelled()))


def test_hooks_of_accelerate_on_the_output_projection():
    hooks = pytest.importorskip("accelerate.hooks")
    lean, plain = lean_and_plain(M2M)
    hooks.add_hook_to_module(lean.lm_head, hooks.ModelHook())
    assert "the forward of lm_head is replaced" in loss_line(lean)
    assert_equal_outputs(lean(**labelled()), plain(**labelled()))


def test_hooks_on_the_model_see_what_they_saw():
    lean, plain = lean_and_plain(MBART)
    seen = []

    def without_mask(module, args, kwargs):
        return args, {**kwargs, "attention_mask": None}

    for model in (lean, plain):
        model.register_forward_pre_hook(without_mask, with_kwargs=True)
        model.register_forward_hook(lambda module, args, output: seen.append(output["logits"].sum().item()))
    assert_equal_outputs(lean(**labelled()), plain(**labelled()))
    assert seen[0] == pytest.approx(seen[1], rel=1e-12)
    calls = []
    lean.final_logits_bias.requires_grad_().register_hook(lambda gradient: calls.append(gradient.shape))
    lean(**labelled()).loss.backward()
    assert calls == [(1, WORDS)]


def test_one_model_in_several_threads():
    """In each thread the output projection stands for that thread's loss, and for itself without labels."""
    model = pk.lean(tiny(M2M), 1).eval()
    inputs = [labelled() for _ in range(2)]
    inputs[1]["labels"] = inputs[1]["labels"].clamp(min=0).flip(0)
    with torch.no_grad():
        expected = [model(**each).loss for each in inputs]
        logits = model(input_ids=inputs[0]["input_ids"], decoder_input_ids=inputs[0]["input_ids"]).logits
    found = Counter()

    def work(number: int) -> None:
        for _ in range(15):
            with torch.no_grad():
                if number == 2:
                    ids = inputs[0]["input_ids"]
                    right = torch.equal(model(input_ids=ids, decoder_input_ids=ids).logits, logits)
                else:
                    right = torch.equal(model(**inputs[number]).loss, expected[number])
            found[right] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {True: 45}


def look(model: nn.Module, seen: list) -> None:
    """What a hook on the decoder finds of the output projection."""
    head = model.lm_head
    seen.append((isinstance(head, nn.Linear), head.__class__, repr(head), head.out_features, head.bias))
    seen.append(head.weight is model._modules["lm_head"].weight is model.get_output_embeddings().weight)
    seen.append((head == model._modules["lm_head"], {head: 1}[model._modules["lm_head"]], head in [*model.modules()]))
    seen.append((copy.deepcopy(head).weight.shape, dict(head.named_parameters()).keys(), head.training))


@pytest.mark.parametrize("name", [M2M, MBART])
def test_the_output_projection_inside_of_a_pass_is_the_module(name):
    seen = []
    for model in lean_and_plain(name):
        decoder = model.get_decoder()
        decoder.register_forward_hook(lambda *_, model=model: look(model, seen))
        made = []

        def lens(module, args, output, model=model, made=made):
            made.append((model.lm_head(output[0]) + 0, model.lm_head.forward(output[0])))

        decoder.register_forward_hook(lens)
        model(**labelled()).loss.backward()
        assert torch.equal(*made[0])
    assert seen[:4] == seen[4:]


@pytest.mark.parametrize("change", ["hook", "forward", "weight", "module"])
def test_an_output_projection_that_is_changed_inside_of_a_pass(change):
    outputs = []
    for model in lean_and_plain(MBART):

        def changed(module, args, output, model=model):
            head = model.lm_head
            if change == "hook":
                head.register_forward_hook(lambda head, args, output: 2 * output)
            elif change == "forward":
                head.forward = lambda x, own=head.forward: 2 * own(x)
            elif change == "weight":
                head.weight = nn.Parameter(2 * head.weight.detach())
            else:
                model.lm_head = copy.deepcopy(head)
                model.lm_head.weight.data *= 2

        handle = model.get_decoder().register_forward_hook(changed)
        outputs.append(model(**labelled()))
        handle.remove()
    assert_equal_outputs(*outputs)


def test_options_are_not_lost_where_the_output_projection_changes_inside_of_a_pass():
    model = pk.lean(tiny(MBART), 1)
    model.get_decoder().register_forward_hook(lambda *_: model.lm_head.register_forward_hook(lambda *_: None) and None)
    with pytest.raises(RuntimeError, match=r"a hook on lm_head, since the forward pass has begun"):
        model(**labelled(), label_smoothing=0.1)


# ---- the cache -------------------------------------------------------------------------------------------------------


def keys_of(cache) -> torch.Tensor:
    return cache.self_attention_cache.layers[0].keys


@pytest.mark.parametrize("name", [M2M, MBART, "T5ForConditionalGeneration"])
@pytest.mark.parametrize("use_cache", [None, True, False])
def test_a_cache_is_where_the_model_puts_it(name, use_cache):
    lean, plain = lean_and_plain(name)
    lean.eval(), plain.eval()
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            found, expected = (model(**labelled(), use_cache=use_cache) for model in (lean, plain))
        assert_equal_outputs(found, expected)
        if len(expected) == 4:
            assert isinstance(found[2], type(expected[2])) and len(found[2]) == len(expected[2])
            torch.testing.assert_close(keys_of(found[2]), keys_of(expected[2]))


def test_a_cache_that_is_given_is_read():
    """As PEFT's prefix-tuning gives one."""
    outputs = []
    for model in lean_and_plain(M2M):
        with torch.no_grad():
            cache = model(**labelled()).to_tuple()[2]
        outputs.append(model(**labelled(), past_key_values=cache))
    assert_equal_outputs(*outputs)
    assert len(outputs[0].logits) == 2 and outputs[0].loss != tiny(M2M)(**labelled()).loss


def test_a_cache_that_would_be_another_is_refused():
    model = pk.lean(tiny(M2M), 1)
    output = model(**labelled())
    with pytest.raises(RuntimeError, match=r"cache \(past_key_values\) after pk.lean, in training mode: expected"):
        keys_of(output[2])
    assert "made when it is read" in str(output) and output[2]  # to print an output, or to see if it has a cache
    model.eval()
    output = model(**labelled())
    with torch.no_grad():
        model.model.shared.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="the model's mode or parameters changed since the forward pass"):
        keys_of(output[2])
    assert len(model.train()(**labelled(), use_cache=True)[2]) == 1


def test_another_parameter_at_the_place_of_one_that_has_gone_is_another():
    module = nn.Linear(2, 2, bias=False)
    state = _State(module)
    assert state.is_of(module)
    for _ in range(50):  # some get the memory, and so the id, of the one before
        del module.weight
        module.weight = nn.Parameter(torch.zeros(2, 2))
        assert not state.is_of(module)


# ---- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_model():
    """Without lean layers: what of the model itself is compiled, and that no batch compiles it again."""
    model, plain = lean_loss(tiny(MBART)), tiny(MBART)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", dynamic=True)
    graphs = []
    for rows in (2, 3, 4):
        found, expected = compiled(**labelled(rows)), plain(**labelled(rows))
        assert_equal_outputs(found, expected)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert_same_gradients(gradients(model, found.loss), gradients(plain, expected.loss))
    assert graphs[2] == graphs[1] > 0
    with pytest.raises(torch._dynamo.exc.Unsupported, match="fullgraph=True is not supported"):
        torch.compile(model, backend="eager", fullgraph=True)(**labelled())
    with pytest.raises(InputError, match=r"torch.export of a lean model is not supported"):
        torch.export.export(model, (), labelled(), strict=False)
