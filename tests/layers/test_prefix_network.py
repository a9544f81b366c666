"""The network of prefixes in lean layers: it runs once a kind of attention, with the gradients of plain layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import petl_kernels as pk
from petl_kernels.layers.rule import prefix as network
from petl_kernels.methods.prefix import HIDDEN, Prefix, fold

from .lean_cases import adapted, ragged, step, worst

LENGTH = 3  # of ``adapted``


@pytest.fixture
def runs(monkeypatch):
    """Records the number of prefixes of each run of the network for a rule."""
    found, run = [], network._run

    def counted(dtype, shape, read):
        found.append((len(read) - 4) // 2)
        return run(dtype, shape, read)

    monkeypatch.setattr(network, "_run", counted)
    return found


def networks(model: nn.Module) -> nn.ModuleDict:
    return model.petl_prefix_mlps["default"].by_kind


def same_as_plain(model: nn.Module, tiers=(1, 4), **options) -> None:
    inputs = ragged(model)
    plain = step(pk.lean(model, 0), inputs, **options)
    for tier in tiers:
        difference, name = worst(step(pk.lean(model, tier), inputs, **options), plain)
        assert difference < 1e-9, (tier, name, difference)


def test_once_a_kind(runs):
    """It runs once, too, where backward runs the layers again."""
    model = adapted("m2m100", "prefix")
    for tier in (1, 3, 5):
        runs.clear()
        step(pk.lean(model, tier), ragged(model))
        assert runs == [2, 2, 2]
    runs.clear()
    with torch.no_grad():
        model(**ragged(model), use_cache=False)
    assert runs == [2, 2, 2]
    fold(model, "default")
    runs.clear()
    step(model, ragged(model))
    assert runs == []


@pytest.mark.parametrize("tier", [0, 1, 2, 4])
def test_a_layer_alone_and_one_that_is_dropped(tier):
    """A prefix that no layer has read gets no gradient, whether it was computed with the others or not."""
    model = adapted("m2m100", "prefix")
    layer, dropped = pk.lean(model, tier).model.encoder.layers
    x = torch.randn(2, 5, model.config.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for together in (False, True):
        model.zero_grad()
        if together:
            with network.one_pass():
                y = layer(x, None)
        else:
            y = layer(x, None)
        y.sin().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert dropped.self_attn.petl.default.key.grad is None
    expected = layer_gradients(x)
    for own in found:
        difference, name = worst(own, expected)
        assert difference < 1e-9, (name, difference)


def layer_gradients(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the gradients of a plain first layer."""
    model = adapted("m2m100", "prefix")
    model.model.encoder.layers[0](x, None).sin().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_layers_may_run_backward_one_after_the_other():
    """Greedy training of layers has a loss a layer: one node computed the prefixes, and each loss has its own part."""
    model = adapted("m2m100", "prefix")
    x = torch.randn(2, 5, model.config.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        with network.one_pass():
            first, second = model.model.encoder.layers
            y = first(x, None)
            z = second(y.detach(), None)
        y.sin().sum().backward()
        z.cos().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    for tier in (1, 4):
        pk.lean(model, tier)
        difference, name = worst(gradients(), expected)
        assert difference < 1e-9, (tier, name, difference)


def test_a_layer_with_a_hook_has_its_own_made(runs):
    """A hook may load a layer's parameters or free them: they are read while the layer runs, and not before."""
    model = adapted("m2m100", "prefix")
    encoder = model.model.encoder
    held = encoder.layers[1].self_attn.petl.default.key
    value = held.data.clone()

    def away(*_):
        with torch.no_grad():
            held.zero_()

    def back(*_):
        with torch.no_grad():
            held.copy_(value)

    inputs = ragged(model)
    plain = step(model, inputs)
    pk.lean(model, 1)
    away()
    encoder.layers[1].register_forward_pre_hook(back)
    runs.clear()
    found = step(model, inputs)
    assert runs == [2, 1, 2, 2]
    difference, name = worst(found, plain)
    assert difference < 1e-9, (name, difference)


def test_a_hook_on_the_network_sees_it_run(runs):
    model = adapted("m2m100", "prefix")
    same_as_plain(model, (1,))
    runs.clear()
    shapes = []
    networks(model)["encoder"][0].register_forward_hook(lambda _, args, y: shapes.append(tuple(y.shape)))
    same_as_plain(model, (1,))
    assert shapes == 2 * 4 * [(LENGTH, HIDDEN)] and runs == [2, 2]  # plain and lean; the rule's of two kinds
    networks(model)["cross"][1] = nn.ReLU()
    same_as_plain(model, (1,))


def test_switching_in_between_changes_nothing():
    model = adapted("m2m100", "prefix")
    pk.adapt(model, pk.PrefixTuning(length=2), name="other")
    pk.use_adapter(model, "default")
    inputs = ragged(model)
    expected = step(pk.lean(model, 0), inputs)
    for tier in (1, 4):
        pk.lean(model, tier).zero_grad()
        loss = model(**inputs).loss
        other = pk.use_adapter(model, "other")(**inputs).loss
        pk.use_adapter(model, "default")
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        difference, name = worst({"loss": loss.detach(), **found}, expected)
        assert difference < 1e-9 and not torch.equal(other, loss), (tier, name, difference)


def test_changes_in_between_are_refused():
    model = pk.lean(adapted("m2m100", "prefix"), 2)
    mlp, piece = networks(model)["cross"], model.model.decoder.layers[1].self_attn.petl.default

    def anew(tensor: torch.Tensor) -> None:
        tensor.data = tensor.data + 1

    for tensor in (mlp[0].weight, mlp[2].bias, piece.value):
        for change in (lambda own: own.mul_(2), anew):
            loss = model(**ragged(model)).loss
            with torch.no_grad():
                change(tensor)
            with pytest.raises(RuntimeError, match="prefix.*: changed since the forward pass"):
                loss.backward()
    loss = model(**ragged(model)).loss
    fold(model, "default")
    with pytest.raises(RuntimeError, match="changed since the forward pass"):
        loss.backward()


def test_other_weights_for_one_call():
    model = adapted("m2m100", "prefix")
    weights = {name: (1.1 * p).detach().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
    wanted = [weight for weight in weights.values() if weight.requires_grad]
    found = []
    for tier in (0, 1, 4):
        loss = torch.func.functional_call(pk.lean(model, tier), weights, (), ragged(model)).loss
        found.append((loss, *torch.autograd.grad(loss, wanted)))
    for own in found[1:]:
        torch.testing.assert_close(own, found[0], rtol=1e-9, atol=1e-12)


def test_some_of_it_frozen():
    model = adapted("m2m100", "prefix")
    networks(model).requires_grad_(False)
    same_as_plain(model)
    networks(model).requires_grad_(True)
    for module in model.modules():
        if isinstance(module, Prefix):
            module.key.requires_grad_(False)
    networks(model)["encoder"][2].weight.requires_grad_(False)
    same_as_plain(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_a_checkpoint(reentrant):
    """transformers' own checkpoints run a layer again outside of the model's forward pass, with its prefix alone."""
    model = adapted("m2m100", "prefix")
    inputs = ragged(model)
    plain = step(pk.lean(model, 0), inputs)
    model.get_input_embeddings().requires_grad_(reentrant)  # a reentrant one wants an input with a gradient
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = step(pk.lean(model, 1), inputs)
    difference, name = worst({name: found[name] for name in plain}, plain)
    assert difference < 1e-9, (name, difference)


def test_copies_train_their_own():
    model = pk.lean(adapted("m2m100", "prefix"), 1)
    other = copy.deepcopy(model)
    inputs = ragged(model)
    expected = step(model, inputs)
    model.zero_grad()
    difference, name = worst(step(other, inputs), expected)
    assert difference == 0, (name, difference)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("tier", [0, 1, 2])
def test_folding_changes_nothing_under_autocast(tier):
    model = pk.lean(adapted("m2m100", "prefix", dtype=torch.float32), tier).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(**ragged(model)).loss
        fold(model, "default")
        torch.testing.assert_close(model(**ragged(model)).loss, before, rtol=1e-6, atol=0)


def test_bytes_are_those_of_no_token():
    """tanh's output, and keys and values, are saved: as much for a long batch as for a short one."""
    model = pk.lean(adapted("m2m100", "prefix", dtype=torch.float32), 2)
    d = model.config.d_model
    for length in (5, 50):
        with network.one_pass():
            y = model.model.encoder.layers[0](torch.randn(2, length, d, requires_grad=True), None)
        node = next(node for node, _ in y.grad_fn.next_functions if hasattr(node, "hidden"))
        assert tuple(node.hidden.shape) == (2 * 2 * LENGTH, HIDDEN) and node.hidden.dtype == torch.float32
        own = [tensor for tensor in y.grad_fn.wanted if tensor.grad_fn is not None]
        assert [tensor.numel() for tensor in own] == 2 * [LENGTH * d]
