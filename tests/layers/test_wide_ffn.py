"""A parallel adapter inside the buffers of a frozen feed-forward network."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from methods.models import batch, build, logits
from torch.utils._python_dispatch import TorchDispatchMode

import petl_kernels as pk
from petl_kernels.layers.lean import LeanLayer
from petl_kernels.layers.wide_ffn import room_bytes
from petl_kernels.memory.quantise_model import quantise_model
from petl_kernels.memory.stream import stream_layers, unstream
from petl_kernels.methods.structure import describe

from .lean_cases import adapted, ragged, step, worst

LAYERS, M, ROOM = 4, 5, 8


class Calls(TorchDispatchMode):
    """How often each op of this package runs."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.of[str(function).removeprefix("petl.").removesuffix(".default")] += 1
        return function(*args, **(kwargs or {}))


def calls(model) -> tuple[int, int, int]:
    """How many feed-forward networks run with an adapter inside, with one beside them, and adapters beside anything."""
    with Calls() as counted:
        model(**ragged(model))
    return counted.of["parallel_ffn"], counted.of["frozen_ffn"], counted.of["bottleneck_adapter"]


def ffns(model):
    """The first and the last linear of every layer's."""
    paths = (layer.ffn.linears for layer in describe(model).layers)
    return [(model.get_submodule(linears[0]), model.get_submodule(linears[-1])) for linears in paths]


def rooms(model) -> list[tuple[int, int]]:
    """Elements that the memory of each layer's two weights has beside them."""
    return [
        tuple(w.untyped_storage().nbytes() // w.element_size() - w.numel() for w in (first.weight, out.weight))
        for first, out in ffns(model)
    ]


WIDE, NARROW = [(ROOM * 32, ROOM * 32)] * LAYERS, [(0, 0)] * LAYERS


@pytest.mark.parametrize(
    ("family", "activation"), [("m2m100", "relu"), ("t5", "relu"), ("mbart", "gelu"), ("marian", "silu")]
)
@pytest.mark.parametrize("tier", [1, 2, 3, 4, 5])
def test_exact(family, activation, tier):
    model = adapted(family, "parallel", **({"feed_forward_proj": "relu"} if family == "t5" else {}))
    if activation != "relu":
        pk.use_adapter(model, None)
        pk.adapt(model, pk.Adapter(bottleneck=M, parallel=True, activation=activation), "own")
        for parameter in pk.trainable_parameters(model):
            torch.nn.init.normal_(parameter, std=0.3)
    inputs = ragged(model)
    expected = step(model, inputs)
    pk.lean(model, tier)
    assert rooms(model) == WIDE and calls(model) == (LAYERS, 0, 0)
    difference, name = worst(step(model, inputs), expected)
    assert difference < 1e-9, (name, difference)


@pytest.mark.parametrize("family", ["mbart", "mt5"])
def test_another_activation_or_a_gate_leaves_it_beside_the_network(family):
    model = adapted(family, "parallel")
    inputs = ragged(model)
    expected = step(model, inputs)
    pk.lean(model, 2)
    assert rooms(model) == NARROW and calls(model) == (0, LAYERS, LAYERS)
    assert worst(step(model, inputs), expected)[0] < 1e-9


def test_training_moves_the_adapter_inside():
    plain = adapted("m2m100", "parallel")
    lean = pk.lean(copy.deepcopy(plain), 1)
    inputs = ragged(plain)
    for model in (plain, lean):
        optimizer = torch.optim.AdamW(pk.trainable_parameters(model), lr=0.05)
        for _ in range(3):
            step(model, inputs)
            optimizer.step()
    difference, name = worst(step(lean, inputs), step(plain, inputs))
    assert difference < 1e-8, (name, difference)


def test_the_room_goes_with_the_adapter():
    model = pk.lean(adapted("m2m100", "parallel"), 1)
    before = {name: p.clone() for name, p in model.named_parameters() if "petl" not in name}
    pk.use_adapter(model, None)
    assert rooms(model) == NARROW and all(out.weight.is_contiguous() for _, out in ffns(model))
    pk.use_adapter(model, "default")
    assert rooms(model) == WIDE
    pk.adapt(model, pk.Adapter(bottleneck=20, parallel=True), "larger")
    assert rooms(model) == [(24 * 32, 24 * 32)] * LAYERS and calls(model) == (LAYERS, 0, 0)
    pk.adapt(model, pk.LoRA(rank=2), "lora")
    assert rooms(model) == NARROW and calls(model) == (0, LAYERS, 0)
    pk.use_adapter(model, "default")
    pk.lean(model, 0)
    assert rooms(model) == NARROW
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())


def test_copies_and_other_dtypes():
    model = pk.lean(adapted("m2m100", "parallel"), 1)
    inputs = ragged(model)
    expected = step(model, inputs)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert calls(copied) == (0, LAYERS, LAYERS)  # until it is made lean, or an adapter is chosen
        assert worst(step(copied, inputs), expected)[0] < 1e-9
        assert calls(pk.lean(copied, 1)) == (LAYERS, 0, 0)
    model.to(torch.float32)
    assert rooms(model) == WIDE and calls(model) == (LAYERS, 0, 0)
    assert worst(step(model, inputs), expected)[0] < 1e-3


def test_streamed_and_quantised_layers_have_none(tmp_path):
    model = pk.lean(adapted("m2m100", "parallel", dtype=torch.float32), 1)
    inputs = ragged(model)
    expected = step(model, inputs)
    first = describe(model).layers[0].path
    stream_layers(model, [first], folder=tmp_path)
    pk.lean(model, 1)
    assert rooms(model)[1:] == WIDE[1:] and calls(model) == (LAYERS - 1, 1, 1)
    assert worst(step(model, inputs), expected)[0] < 1e-4
    unstream(model)
    quantise_model(model, "int8", "dense")
    assert calls(model) == (0, LAYERS, LAYERS)
    layers = [module for module in model.modules() if isinstance(module, LeanLayer)]
    assert all(layer.petl_wide is None or layer.petl_wide.w1 is None for layer in layers)
    assert worst(step(model, inputs), expected)[0] < 0.1


def test_files_are_the_plain_models(tmp_path):
    model = adapted("m2m100", "parallel", dtype=torch.float32)
    plain = {name: p.clone() for name, p in build("m2m100").state_dict().items()}
    pk.lean(model, 1).save_pretrained(tmp_path)
    found = type(build("m2m100")).from_pretrained(tmp_path)
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in plain.items())


def test_generation_and_evaluation():
    model = adapted("m2m100", "parallel", dtype=torch.float32).eval()
    inputs = {key: value for key, value in batch(model).items() if key != "decoder_input_ids"}
    expected, outputs = model.generate(**inputs, num_beams=3, max_new_tokens=8), logits(model)
    pk.lean(model, 2)
    assert torch.equal(model.generate(**inputs, num_beams=3, max_new_tokens=8), expected)
    torch.testing.assert_close(logits(model), outputs)


def test_the_plans_bytes_are_those_of_the_room():
    model = adapted("m2m100", "parallel", dtype=torch.bfloat16)
    expected = [room_bytes(model, layer) for layer in describe(model).layers]
    meta = copy.deepcopy(model).to("meta")
    assert [room_bytes(meta, layer) for layer in describe(meta).layers] == expected
    pk.lean(model, 1)
    assert [2 * (sum(pair) + ROOM) for pair in rooms(model)] == expected == [2 * ROOM * (2 * 32 + 1)] * LAYERS
