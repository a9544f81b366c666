"""Adapted models are copied, pickled, cast, saved as a state, resized and wrapped: right, or refused in one line."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import peft
import pytest
import torch
from torch import nn

import petl_kernels as pk
from petl_kernels import InputError
from petl_kernels.methods import METHODS
from petl_kernels.weights.quantized import quantize_model

from .models import batch, build, logits, train_a_little

SETTINGS = {"lora": {"rank": 2}, "adapter": {"bottleneck": 3}, "prefix": {"length": 2}}


def adapted(family, method, name="default", model=None):
    settings = next((given for key, given in SETTINGS.items() if method.startswith(key)), {})
    return pk.adapt(build(family) if model is None else model, METHODS[method](**settings), name)


def refused(action, *words):
    with pytest.raises(InputError) as error:
        action()
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# One of each way to be in a model: pieces on linears and layers, tensors of the base, keys and values, all.
FEW = ("lora", "adapter", "bitfit", "prefix", "full")
QUICK = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]


@pytest.mark.parametrize("method", QUICK)
def test_copies_are_models_of_their_own(method):
    model = adapted("t5", method)
    train_a_little(model)
    want = logits(model)
    names = [name for name, _ in model.named_parameters()]
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), through_a_file(model)):
        assert [name for name, _ in again.named_parameters()] == names
        assert torch.equal(logits(again), want)
        train_a_little(again, rate=0.5)
        assert torch.equal(logits(model), want) and not torch.equal(logits(again), want)
        pk.use_adapter(again, None)
        assert torch.equal(logits(again), logits(pk.use_adapter(copy.deepcopy(model), None)))


@pytest.mark.parametrize("method", QUICK)
def test_a_state_comes_back(method):
    """Strictly, with every adapter, into a model whose adapters have other values."""

    def make(rate):
        model = adapted("t5", method, "one")
        train_a_little(model, rate=rate)
        adapted("t5", "bitfit", "two", model)
        train_a_little(model, rate=rate)
        return adapted("t5", "lora", "three", model)

    model, other = make(0.05), make(0.01)
    for active in ("three", "one", "two", None):
        pk.use_adapter(model, active)
        pk.use_adapter(other, active)
        other.load_state_dict(model.state_dict(), strict=True)
        for name in ("one", "two", None):
            ours, theirs = pk.use_adapter(model, name), pk.use_adapter(other, name)
            torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=0)
        pk.use_adapter(model, active)
        pk.use_adapter(other, active)


def test_a_state_of_another_adapter_is_refused():
    model = adapted("t5", "lora", "b", adapted("t5", "bitfit", "a"))
    state = pk.use_adapter(model, "a").state_dict()
    refused(lambda: pk.use_adapter(model, "b").load_state_dict(state, strict=False), "'a' active, and 'b' is")
    with pytest.warns(UserWarning, match=r"no values for .* more of adapters, which stay"):
        model.load_state_dict(build("t5").state_dict(), strict=False)


@pytest.mark.parametrize("method", ["bitfit", "lora", "ia3", "full"])
def test_casts_reach_adapters_that_are_not_active(method):
    model = adapted("t5", method, "one")
    train_a_little(model)
    pk.use_adapter(model, None).double()
    base = logits(model)
    inputs = batch(model)
    pk.use_adapter(model, "one")(**inputs).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in pk.trainable_parameters(model))
    assert logits(model).dtype == torch.float64 and torch.equal(logits(pk.use_adapter(model, None)), base)


# -- resize_token_embeddings ----------------------------------------------------------------------------------------

WORDS = 99
ON_TABLES = {
    "lora": pk.LoRA(rank=2, targets=("embed_tokens",)),
    "lora on the head": pk.LoRA(rank=2, targets=("q_proj", "lm_head")),
    "ia3": pk.IA3(targets=("k_proj", "lm_head"), feedforward=()),
    "full": pk.FullFineTuning(),
}


@pytest.mark.parametrize("case", ON_TABLES)
@pytest.mark.parametrize("tied", [True, False])
def test_tables_under_an_adapter_are_not_resized(case, tied):
    model = pk.adapt(build("mbart", tie_word_embeddings=tied), ON_TABLES[case], "one")
    pk.adapt(model, pk.LoRA(rank=2), "two")
    train_a_little(pk.use_adapter(model, "one"))
    want = logits(model)
    for active in ("one", "two"):
        pk.use_adapter(model, active)
        for size in (WORDS + 5, WORDS - 5):
            refused(
                lambda size=size: model.resize_token_embeddings(size), f"to {size}: adapter 'one'", "before pk.adapt"
            )
    pk.use_adapter(model, "one")
    for arguments in ((None,), (WORDS,), (None, 9), (WORDS - 4, 9)):  # of that size already
        assert model.resize_token_embeddings(*arguments) is model.get_input_embeddings()
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("family", ["m2m100", "marian", "t5"])
def test_what_a_merge_has_put_into_tables_stays(family):
    model = pk.adapt(build(family), pk.LoRA(rank=2, targets=("embed_tokens",)))
    train_a_little(model)
    want = logits(pk.merge(model))
    refused(lambda: model.resize_token_embeddings(WORDS + 5), "is merged into", "load that folder")
    model.resize_token_embeddings(WORDS)
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("method", ["lora", "bitfit", "prefix"])
def test_adapters_elsewhere_stay_when_tables_are_resized(method):
    model = adapted("m2m100", method)
    train_a_little(model)
    want = logits(model)
    model.resize_token_embeddings(WORDS + 5, mean_resizing=False)
    torch.testing.assert_close(logits(model)[..., :WORDS], want)
    train_a_little(model)


def test_quantized_tables_are_not_resized():
    model = quantize_model(build("m2m100").requires_grad_(False), "int8")
    refused(lambda: model.resize_token_embeddings(WORDS + 5), "is quantized (int8)")


def test_the_decoders_own_table():
    settings = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 105, "tie_word_embeddings": False}
    model = pk.adapt(build("marian", **settings), pk.LoRA(rank=2, targets=("decoder.embed_tokens",)))
    refused(lambda: model.resize_decoder_token_embeddings(110), "to 110: adapter 'default'")


# -- models that something else has changed -------------------------------------------------------------------------


def peft_model():
    return peft.get_peft_model(build("m2m100"), peft.LoraConfig(r=2, target_modules=["q_proj"]))


def parametrized():
    model = build("m2m100")
    nn.utils.parametrizations.weight_norm(model.model.encoder.layers[0].fc1)
    return model


def compiled_part():
    model = build("m2m100")
    model.model.encoder = torch.compile(model.model.encoder, backend="eager")
    return model


FOREIGN = {
    "PEFT's": (peft_model, ("PEFT", "merge_and_unload", "pk.load_adapter")),
    "inside of PEFT's": (lambda: peft_model().base_model.model, ("PEFT", "unload")),
    "DataParallel": (lambda: nn.DataParallel(build("m2m100")), ("DataParallel", "model.module")),
    "compiled": (lambda: torch.compile(build("m2m100"), backend="eager"), ("compiled", "_orig_mod")),
    "a compiled part": (compiled_part, ("encoder", "compiled")),
    "parametrized": (parametrized, ("fc1", "parametrizations")),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_models_that_something_else_has_changed(case, tmp_path):
    pk.save_adapter(adapted("m2m100", "lora"), tmp_path)
    make, words = FOREIGN[case]
    model = make()
    required = [parameter.requires_grad for parameter in model.parameters()]
    refused(lambda: pk.adapt(model, pk.LoRA(rank=2, targets=("v_proj",))), *words)
    refused(lambda: pk.load_adapter(model, tmp_path), *words)
    assert [parameter.requires_grad for parameter in model.parameters()] == required


def test_a_wrapped_model_has_its_adapter_inside(tmp_path):
    wrapped = nn.DataParallel(adapted("m2m100", "lora"))
    for action in (pk.report, pk.merge, pk.unmerge):
        refused(lambda action=action: action(wrapped), "model.module")
    refused(lambda: pk.use_adapter(wrapped, None), "model.module")
    refused(lambda: pk.save_adapter(wrapped, tmp_path), "model.module")


PEFT_ONTO = {
    "LoRA": lambda model: peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])),
    "inside": lambda model: peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["fc1"]), model),
    "prompt": lambda model: peft.get_peft_model(
        model, peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2)
    ),
}


def test_peft_onto_an_adapted_model():
    """PEFT's files and Trainer's checkpoints of such a model would hold PEFT's adapter alone."""
    model = adapted("m2m100", "lora")
    want = logits(model)
    for onto in PEFT_ONTO.values():
        refused(lambda onto=onto: onto(model), "'default'", "pk.merge")
    assert torch.equal(logits(model), want)
    merged = PEFT_ONTO["LoRA"](pk.merge(model)).eval()
    torch.testing.assert_close(logits(merged.base_model.model), want, rtol=1e-4, atol=1e-4)


def test_peft_gives_the_plain_model_back():
    model = peft_model().unload()
    want = logits(model)
    assert torch.equal(logits(pk.adapt(model, pk.LoRA(rank=2))), want)


def test_two_models_that_share_a_module():
    one, other = build("m2m100"), build("m2m100")
    other.model.encoder = one.model.encoder
    train_a_little(pk.adapt(one, pk.LoRA(rank=2)))
    want = logits(one)
    for name in ("default", "mine"):
        refused(lambda name=name: pk.adapt(other, pk.LoRA(rank=2), name), "'default'", "not this model's")
    assert torch.equal(logits(one), want)


def test_ties_stay_after_a_file_is_loaded(tmp_path):
    pk.save_adapter(adapted("m2m100", "full"), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = pk.load_adapter(build("m2m100"), tmp_path)
    tables = {model.lm_head.weight, model.model.shared.weight, model.model.encoder.embed_tokens.weight}
    assert len(tables) == 1
