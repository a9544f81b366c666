"""Packed rows: the loss and the gradients of the padded sentences, and what is refused."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch
from layers.lean_cases import SETTINGS, adapted, worst
from methods.models import build
from torch import Tensor, nn
from transformers import (
    BlenderbotSmallConfig,
    BlenderbotSmallForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
)
from transformers.models.mbart.modeling_mbart import MBartLearnedPositionalEmbedding

import petl_kernels as pk
from petl_kernels.errors import InputError
from petl_kernels.layers.loss.lean_loss import packing_obstacle
from petl_kernels.methods import METHODS

FAMILIES = ("m2m100", "mbart", "bart", "marian", "pegasus", "blenderbot", "t5", "mt5", "umt5", "seamless")
LIKE_OTHERS = ("bart", "mbart", "pegasus", "blenderbot", "mt5", "umt5")  # m2m100, marian and t5
LENGTHS = [(5, 4), (1, 7), (9, 2), (3, 3), (9, 1)]
_MORE = {
    "pegasus": (PegasusConfig, PegasusForConditionalGeneration, {"decoder_start_token_id": 0, "pad_token_id": 0}),
    "blenderbot": (BlenderbotSmallConfig, BlenderbotSmallForConditionalGeneration, {"pad_token_id": 1}),
}


def model_of(family: str, method: str = "lora", **settings) -> nn.Module:
    """In training mode and float64, without dropout."""
    if family not in _MORE:
        return adapted(family, method, **settings)
    config, cls, own = _MORE[family]
    like = build("bart").config.to_dict()
    names = ("vocab_size", "d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads", "dropout",
             "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim", "max_position_embeddings",
             "attention_dropout", "activation_dropout", "init_std", "scale_embedding")  # fmt: skip
    torch.manual_seed(7)
    model = cls(config(**{name: like[name] for name in names}, **own)).double()
    pk.adapt(model, METHODS[method](**SETTINGS.get(method, {})))
    with torch.no_grad():
        for parameter in pk.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def examples(lengths=LENGTHS, seed: int = 3) -> list[tuple[np.ndarray, np.ndarray]]:
    draw = np.random.default_rng(seed)
    made = [tuple(draw.integers(3, 97, n) for n in sizes) for sizes in lengths]
    made[0][1][2] = -100  # inside a sentence
    return made


def padded(model: nn.Module, given: list) -> dict[str, Tensor]:
    def side(index: int, pad: int) -> Tensor:
        width = max(len(example[index]) for example in given)
        rows = [[*example[index], *[pad] * (width - len(example[index]))] for example in given]
        return torch.tensor(np.array(rows, dtype=np.int64))

    source = side(0, model.config.pad_token_id)
    mask = torch.tensor([[int(i < len(s)) for i in range(source.shape[1])] for s, _ in given])
    return {"input_ids": source, "attention_mask": mask, "labels": side(1, -100)}


def step(model: nn.Module, *batches: dict, **options) -> dict[str, Tensor]:
    """The losses added up, and the sum of the gradients by name."""
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        loss = model(**batch, **options).loss
        loss.backward()
        total += loss.detach()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": total, **gradients}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in expected.keys() - found.keys():
        assert not expected[name].any(), name
    difference, name = worst(found, {name: expected[name] for name in expected if name in found})
    assert difference < 1e-9, (name, difference)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow) if name in LIKE_OTHERS else name for name in FAMILIES]
)
def test_loss_and_gradients_are_those_of_padded_rows(family, method):
    """Each tier comes with each family and with each method."""
    model = model_of(family, method)
    given = examples()
    expected = step(pk.lean(model, 0), padded(model, given))
    tier = 1 + (FAMILIES.index(family) + list(METHODS).index(method)) % 5
    assert_same(step(pk.lean(model, tier), pk.pack(given)), expected)


@pytest.mark.parametrize("family", ["m2m100", "mbart", "t5"])
@pytest.mark.parametrize("tiers", [[1, 2, 3, 4], [5, 4, 2, 1]])
def test_own_loops(family, tiers):
    """Gradients of several rows add up, with label smoothing, under other tiers in each layer."""
    model = model_of(family, "adapter")
    given, options = examples(), {"reduction": "sum", "label_smoothing": 0.1}
    expected = step(pk.lean(model, 1), padded(model, given), **options)
    parts = [pk.pack(given[:2]), pk.pack(given[2:])]
    assert_same(step(pk.lean(model, tiers), *parts, **options), expected)


@pytest.mark.parametrize("family", ["mbart", "t5"])
def test_rows_of_one_size(family):
    """Sentences without labels fill a row up, and empty ones stand behind them: nothing changes."""
    model = model_of(family, "bitfit")
    given = examples()
    row = pk.pack(given, tokens=(60, 41), sentences=12)
    assert row["input_ids"].shape == (1, 60) and row["labels"].shape == (1, 41)
    assert row["cu_seqlens"].shape == row["decoder_cu_seqlens"].shape == (13,) and row["longest"] == 9
    assert row["cu_seqlens"].diff().max() <= 9 and row["decoder_cu_seqlens"].diff().max() <= 9
    expected = step(pk.lean(model, 2), pk.pack(given))
    assert_same(step(model, row), expected)
    source_alone = pk.pack(given, tokens=(sum(len(s) for s, _ in given) + 3, sum(len(t) for _, t in given)))
    assert_same(step(model, source_alone), expected)


@pytest.mark.parametrize("family", ["m2m100", "t5"])
def test_quantized_weights(family):
    from petl_kernels.weights.quantized import quantize_model

    model = pk.lean(quantize_model(model_of(family).float(), "nf4"), 2)
    given = examples()
    expected = step(model, padded(model, given))
    difference, name = worst(step(model, pk.pack(given)), expected)
    assert difference < 1e-4, (name, difference)  # in fp32


def test_streamed_layers(tmp_path):
    from petl_kernels.weights.streamed import stream_layers

    model, given = model_of("m2m100"), examples()
    expected = step(pk.lean(model, 1), padded(model, given))
    stream_layers(model, ["model.encoder.layers.0", "model.decoder.layers.1"], 2, tmp_path, (), device="cpu")
    assert_same(step(pk.lean(model, 3), pk.pack(given)), expected)


def test_dropout_is_that_of_backward_too():
    """Masks are made again for the packed positions: every tier has one loss and the same gradients."""
    model = model_of("m2m100", dropout=0.2, attention_dropout=0.1)
    found = []
    for tier in (1, 2, 4):
        torch.manual_seed(5)
        found.append(step(pk.lean(model, tier), pk.pack(examples())))
    assert worst(found[1], found[0])[0] < 1e-12 and worst(found[2], found[0])[0] < 1e-12


def test_logits_without_labels():
    model = pk.lean(model_of("marian"), 1).eval()
    given = [(source, np.maximum(target, 3)) for source, target in examples()]
    row = pk.pack([(source, target, target) for source, target in given])
    del row["labels"]
    rows = padded(model, given)
    decoder = rows.pop("labels").clamp(min=0)
    with torch.no_grad():
        found, expected = model(**row).logits[0], model(**rows, decoder_input_ids=decoder).logits
    expected = torch.cat([line[: len(target)] for line, (_, target) in zip(expected, given, strict=True)])
    torch.testing.assert_close(found, expected)


def test_threads_have_their_own_rows():
    model = pk.lean(model_of("m2m100"), 2)
    batches = [pk.pack(examples(seed=seed)) if seed % 2 else padded(model, examples(seed=seed)) for seed in range(4)]
    expected = [model(**batch).loss.item() for batch in batches]
    found = [[] for _ in batches]

    def run(k: int) -> None:
        for _ in range(3):
            found[k].append(model(**batches[k]).loss.item())

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(losses == [loss] * 3 for losses, loss in zip(found, expected, strict=True))


def test_examples_may_be_mappings_and_tensors():
    given = examples()
    row = pk.pack([{"input_ids": torch.tensor(source), "labels": target.tolist()} for source, target in given])
    assert all(
        torch.equal(torch.as_tensor(row[name]), torch.as_tensor(value)) for name, value in pk.pack(given).items()
    )


def test_copies_read_packed_rows():
    model = pk.lean(model_of("mbart"), 1)
    row = pk.pack(examples())
    assert copy.deepcopy(model)(**row).loss.item() == model(**row).loss.item()
    assert type(pk.lean(model, 0).get_encoder().embed_positions) is MBartLearnedPositionalEmbedding


# ---- refused --------------------------------------------------------------------------------------------------------


def test_layers_that_are_not_lean_are_named():
    model = pk.lean(model_of("m2m100"), [1, 0, 1, 1])
    why = "cu_seqlens: M2M100ForConditionalGeneration reads no packed rows .model.encoder.layers.1: not lean.; expected"
    with pytest.raises(InputError, match=why):
        model(**pk.pack(examples()))
    assert packing_obstacle(model) == "model.encoder.layers.1: not lean"
    pk.lean(model, 1)
    assert packing_obstacle(model) == ""
    hook = model.model.decoder.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="model.decoder.layers.0 reads no packed rows .a hook on self_attn.k_proj."):
        model(**pk.pack(examples()))
    assert packing_obstacle(model) == "model.decoder.layers.0: a hook on self_attn.k_proj"
    hook.remove()
    model(**pk.pack(examples())).loss.backward()


def test_plain_models_refuse_what_pack_has_made():
    model = build("m2m100")
    assert packing_obstacle(model) == "model.encoder.layers.0: not lean"
    with pytest.raises(InputError, match="a model that is not lean reads no packed rows; expected pk.lean"):
        model(**pk.pack(examples()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": None}, "cu_seqlens: None; expected int32"),
        ({"decoder_cu_seqlens": torch.tensor([0, 3, 17])}, "decoder_cu_seqlens: torch.int64 of shape .3,.; expected"),
        ({"cu_seqlens": torch.tensor([0, 27], dtype=torch.int32)}, "of 5 sentences; expected 1, as cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 9, 5, 20, 21, 27], dtype=torch.int32)}, "expected to rise from 0 to 27"),
        ({"cu_seqlens": torch.tensor([0, 9, 15, 20, 21, 26], dtype=torch.int32)}, "expected to rise from 0 to 27"),
        ({"attention_mask": torch.ones(1, 27)}, "attention_mask: given beside cu_seqlens"),
        ({"use_cache": True}, "use_cache: True beside cu_seqlens"),
        ({"input_ids": torch.ones(2, 27, dtype=torch.long)}, "input_ids: of shape .2, 27. with cu_seqlens; expected"),
        ({"longest": 5}, "longest: 5; expected 9"),
    ],
)
def test_what_is_no_packed_row_is_refused(change, message):
    model = pk.lean(model_of("mbart"), 1)
    with pytest.raises(InputError, match=message):
        model(**{**pk.pack(examples()), **change})


def test_sentences_without_positions_are_refused():
    model = pk.lean(model_of("mbart"), 1)
    with pytest.raises(InputError, match="a sentence of 65 tokens; expected at most 64, as many positions"):
        model(**pk.pack(examples([(65, 4)])))
    model = pk.lean(model_of("m2m100"), 1)  # whose table grows
    given = examples([(80, 4), (2, 3)])
    found = model(**pk.pack(given)).loss
    torch.testing.assert_close(found, pk.lean(model, 0)(**padded(model, given)).loss)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([], {}, "there are no examples"),
        ([([1], [])], {}, "example 0: its target is .*; expected one token id or more"),
        ([([1], [2.5])], {}, "example 0: its target is .2.5.; expected one token id"),
        ([([[1], [2, 3]], [2])], {}, "example 0: its source is .*; expected one token id"),
        ([([1], [2], [3, 4])], {}, "example 0 has 2 decoder inputs; expected as many as labels, 1"),
        ([([1], [2]), ([1], [2], [3])], {}, "some examples have decoder inputs"),
        ([([1, 2], [2])], {"tokens": (1, 5)}, "there are 2 source tokens; expected at most the 1"),
        ([([1, 2], [2])], {"tokens": (6, 5), "sentences": 2}, "there are 3 sentences, 2 of them to fill the row"),
        ([{"input_ids": [1]}], {}, "example 0 has no labels"),
    ],
)
def test_what_cannot_be_packed_is_refused(given, options, message):
    with pytest.raises(InputError, match=message):
        pk.pack(given, **options)
