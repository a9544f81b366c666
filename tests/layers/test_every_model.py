"""Every sequence-to-sequence class of transformers after ``pk.lean``: its own loss and gradients, lean or not.

A class that transformers adds fails ``test_every_class_has_a_model``, until it has its line in ``every_model.py``.
"""

from __future__ import annotations

import pytest
import torch
import transformers

import petl_kernels as pk
from petl_kernels.errors import InputError

from .every_model import SETTINGS, UNTRIED, WORDS, build, classes, inputs_of, shake
from .lean_cases import step, worst

LEAN = {
    "bart", "blenderbot", "blenderbot-small", "m2m_100", "marian", "mbart", "mt5", "nllb-moe", "pegasus", "plbart",
    "seamless_m4t", "seamless_m4t_v2", "speech_to_text", "t5", "t5gemma", "umt5", "whisper",
}  # fmt: skip
PARTLY = {"pegasus_x"}  # the decoder


def test_every_class_has_a_model():
    assert classes().keys() - SETTINGS.keys() - UNTRIED.keys() == set()


@pytest.mark.parametrize("model_type", sorted(SETTINGS.keys() & classes().keys()))
def test_loss_and_gradients(model_type):
    model = build(model_type)
    inputs = inputs_of(model)
    plain = step(model, inputs)
    difference, name = worst(step(pk.lean(model, 2), inputs), plain)
    assert difference < 1e-9, (name, difference)
    _assert_reported(model, model_type in LEAN, model_type in PARTLY)


def _assert_reported(model, lean: bool, partly: bool = False) -> None:
    """Each layer is lean, or there is a reason why not."""
    states = pk.report(model).layers
    assert all((state.tier == 2) != bool(state.reason) for state in states)
    tiers = {state.tier for state in states}
    assert tiers == ({0, 2} if partly else {2} if lean else {0})


@pytest.mark.parametrize("model_type", sorted(SETTINGS.keys() & classes().keys() - {"seamless_m4t_v2"}))
def test_adapt_is_exact_or_refused(model_type):
    """An adapter at its initial values leaves the loss as it was, and a lean model has the gradients of a plain one."""
    model = build(model_type)
    inputs = inputs_of(model)
    loss = step(model, inputs)["loss"]
    try:
        pk.adapt(model, pk.LoRA(rank=2))
    except InputError as error:
        assert "\n" not in str(error) and model_type not in LEAN | PARTLY
        return
    plain = step(model, inputs)
    torch.testing.assert_close(plain["loss"], loss, rtol=1e-12, atol=0)
    assert worst(step(pk.lean(model, 2), inputs), plain)[0] < 1e-9


def _small(name: str, **settings):
    config = getattr(transformers, f"{name}Config")(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, **settings
    )
    return config


def _two_berts():
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        _small("Bert"), _small("Bert", is_decoder=True, add_cross_attention=True)
    )
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.EncoderDecoderModel(config)


def _t5_config(**settings):
    return transformers.T5Config(
        vocab_size=WORDS, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0, **settings
    )


OTHERS = {
    "a decoder alone": lambda: transformers.LlamaForCausalLM(_small("Llama")),
    "a decoder with Conv1D": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0)
    ),
    "an encoder alone": lambda: transformers.BertForMaskedLM(_small("Bert")),
    "T5's encoder alone": lambda: transformers.T5EncoderModel(_t5_config()),
    "two models": _two_berts,
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models(kind):
    """They stay as they are, and the report has the reason."""
    torch.manual_seed(3)
    model = OTHERS[kind]().double()
    shake(model)
    model.eval()
    ids = torch.randint(3, WORDS, (2, 6))
    inputs = {"input_ids": ids} | ({} if kind == "T5's encoder alone" else {"labels": ids})

    def values():
        output = model(**inputs)
        loss = output.loss if "labels" in inputs else output.last_hidden_state.square().sum()
        model.zero_grad()
        loss.backward()
        return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}

    plain = values()
    classes = [type(module) for module in model.modules()]
    pk.lean(model, 2)
    assert worst(values(), plain)[0] == 0
    assert [type(module) for module in model.modules()][1:] == classes[1:]
    assert f"not lean: {type(model).__name__}: " in str(pk.report(model))
    with pytest.raises(InputError, match=f"^model {type(model).__name__}: expected an encoder-decoder"):
        pk.adapt(model, pk.LoRA(rank=2))
