"""A parallel adapter inside the buffers of a frozen feed-forward network."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from methods.models import logits
from torch.utils._python_dispatch import TorchDispatchMode

import petl_kernels as pk
from petl_kernels.layers.lean import LeanLayer
from petl_kernels.layers.wide_ffn import room_bytes
from petl_kernels.models.structure import describe
from petl_kernels.weights.quantized import quantize_model
from petl_kernels.weights.streamed import stream_layers, unstream

from .lean_cases import adapted, ragged, step, worst

LAYERS, M, ROOM = 4, 5, 8


class Calls(TorchDispatchMode):
    """Counts the runs of each op of this package."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.of[str(function).removeprefix("petl.").removesuffix(".default")] += 1
        return function(*args, **(kwargs or {}))


def calls(model) -> tuple[int, int, int]:
    """Returns the numbers of networks with an adapter inside, of frozen ones, and of adapters that run alone."""
    with Calls() as counted:
        model(**ragged(model))
    return counted.of["parallel_ffn"], counted.of["frozen_ffn"], counted.of["bottleneck_adapter"]


def ffns(model):
    """Returns the first and the last linear of every layer's feed-forward network."""
    paths = (layer.ffn.linears for layer in describe(model).layers)
    return [(model.get_submodule(linears[0]), model.get_submodule(linears[-1])) for linears in paths]


def rooms(model) -> list[tuple[int, int]]:
    """Returns the elements beside each layer's two weights in their memory."""
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


def test_streamed_and_quantized_layers_have_none(tmp_path):
    model = pk.lean(adapted("m2m100", "parallel", dtype=torch.float32), 1)
    inputs = ragged(model)
    expected = step(model, inputs)
    first = describe(model).layers[0].path
    stream_layers(model, [first], folder=tmp_path)
    pk.lean(model, 1)
    assert rooms(model)[1:] == WIDE[1:] and calls(model) == (LAYERS - 1, 1, 1)
    assert worst(step(model, inputs), expected)[0] < 1e-4
    unstream(model)
    quantize_model(model, "int8", "dense")
    assert calls(model) == (0, LAYERS, LAYERS)
    layers = [module for module in model.modules() if isinstance(module, LeanLayer)]
    assert all(layer.petl_lean.wide is None for layer in layers)
    assert worst(step(model, inputs), expected)[0] < 0.1


def test_the_plans_bytes_are_those_of_the_room():
    model = adapted("m2m100", "parallel", dtype=torch.bfloat16)
    expected = [room_bytes(model, layer) for layer in describe(model).layers]
    meta = copy.deepcopy(model).to("meta")
    assert [room_bytes(meta, layer) for layer in describe(meta).layers] == expected
    pk.lean(model, 1)
    assert [2 * (sum(pair) + ROOM) for pair in rooms(model)] == expected == [2 * ROOM * (2 * 32 + 1)] * LAYERS


def test_another_module_or_no_bias_in_its_place():
    plain = adapted("m2m100", "parallel").eval()
    lean = pk.lean(copy.deepcopy(plain), 1)
    for model in (plain, lean):
        (first, _), (other, _) = ffns(model)[:2]
        first.bias = None
        owner = model.get_submodule(describe(model).layers[1].path)
        hooked = copy.deepcopy(other)
        hooked.petl = other.petl  # with the piece that passes the input to the adapter
        hooked.weight.mul_(2)
        owner.fc1 = hooked
    torch.testing.assert_close(logits(lean), logits(plain))


def test_a_hook_on_the_adapter_is_called():
    model = pk.lean(adapted("m2m100", "parallel"), 1)
    expected, seen = step(model, ragged(model)), []
    ffns(model)[0][1].petl.current().register_forward_hook(lambda *_: seen.append(1))
    assert worst(step(model, ragged(model)), expected)[0] < 1e-9
    assert seen == [1] and calls(model) == (LAYERS - 1, 0, 1)  # the layer is as it was


def test_quantized_weights_leave_nothing_of_the_dense_ones():
    model = pk.lean(adapted("m2m100", "parallel", dtype=torch.float32), 1)
    quantize_model(model, "int8", "dense")
    assert not any(module.petl_lean.wide for module in model.modules() if isinstance(module, LeanLayer))
    expected = logits(model.eval())
    assert torch.equal(logits(model.to(torch.float32)), expected)


def test_weights_of_another_kind_are_left_alone():
    class Own(torch.nn.Linear):
        """Stands for another library's quantized linear, whose weight has a shape of its own."""

    model = adapted("t5", "parallel", feed_forward_proj="relu")
    for linear in ffns(model)[0]:
        linear.__class__ = Own
    assert rooms(pk.lean(model, 1)) == [NARROW[0], *WIDE[1:]]


@pytest.mark.slow
def test_compiled_graphs_do_not_break():
    model = pk.lean(adapted("m2m100", "parallel", dtype=torch.float32), 1)
    ids = ragged(model)["input_ids"]
    with torch.no_grad():
        expected = model.model.encoder(ids).last_hidden_state
        found = torch.compile(model.model.encoder, backend="eager", fullgraph=True)(ids).last_hidden_state
    torch.testing.assert_close(found, expected)
