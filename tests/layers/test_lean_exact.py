"""Every tier has the loss and the gradients of the plain model."""

from __future__ import annotations

import copy

import pytest
import torch
from methods.models import FAMILIES, RELATIVES, build

import petl_kernels as pk
from petl_kernels.methods import METHODS
from petl_kernels.models.transformers_names import class_that_runs

from .lean_cases import DROPOUT, TIERS, adapted, distance, exact_rms_norms, ragged, step, without_recomputation, worst

SOME = ("lora", "adapter-sublayer", "prefix", "full")


def marks_of(family: str, method: str):
    """Relatives have a family's layers in other classes: some methods show that they are lean, the repeats have all."""
    if method == "lora":
        return pytest.mark.check
    if family in ("m2m100", "t5"):
        return ()
    if family in RELATIVES:
        return pytest.mark.slow if method in SOME else pytest.mark.repeat
    return () if method in SOME else pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "method"),
    [pytest.param(f, m, marks=marks_of(f, m)) for f in (*FAMILIES, *RELATIVES) for m in METHODS],
)
def test_float64(family, method):
    model = adapted(family, method)
    for side, tiers in (("right", TIERS), ("left", (3,))):  # what padding hides is hidden alike in every tier
        inputs = ragged(model, side)
        plain = step(pk.lean(model, 0), inputs)
        for tier in tiers:
            difference, name = worst(step(pk.lean(model, tier), inputs), plain)
            assert difference < 1e-9, (side, tier, name, difference)
            assert [layer.reason for layer in pk.report(model).layers if layer.tier != tier] == [], tier


@pytest.mark.parametrize("method", ["lora", "prefix", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float64_with_additive_masks(family, method):
    model = adapted(family, method, attention="eager")
    inputs = ragged(model)
    plain = step(model, inputs)
    for tier in TIERS:
        difference, name = worst(step(pk.lean(model, tier), inputs), plain)
        assert difference < 1e-9, (tier, name, difference)


@pytest.mark.parametrize("family", ["m2m100", pytest.param("t5", marks=pytest.mark.repeat), "t5gemma"])
def test_norms_and_biases_that_are_trained_beside_ssf(family):
    model = adapted(family, "ssf")
    own = [p for name, p in model.named_parameters() if p.dim() == 1 and ".petl." not in name]
    for parameter in own:
        parameter.requires_grad_(True)
    inputs = ragged(model)
    plain = step(model, inputs)
    assert all(parameter.grad is not None for parameter in own)
    for tier in (1, 3):
        difference, name = worst(step(pk.lean(model, tier), inputs), plain)
        assert difference < 1e-9, (tier, name, difference)


def test_a_tier_for_each_layer():
    model = adapted("mbart", "lora")
    inputs = ragged(model)
    plain = step(model, inputs)
    for tiers in ([0, 1, 2, 3], [4, 5, 1, 0], [2, 0, 5, 3]):
        difference, name = worst(step(pk.lean(model, tiers), inputs), plain)
        assert difference < 1e-9, (tiers, name, difference)
        assert [layer.tier for layer in pk.report(model).layers] == tiers


def test_exact_norms_are_those_of_one_model():
    models = [build("t5") for _ in range(2)]
    exact_rms_norms(models[0])
    exact, own = (model.encoder.final_layer_norm for model in models)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(exact(x), own(x)) and class_that_runs(exact) == class_that_runs(own) == "T5LayerNorm"
    assert exact(x.double()).dtype == torch.float64 and (exact(x.double()) - own(x.double())).abs().max() > 1e-9


@pytest.mark.parametrize("family", [pytest.param("mbart", marks=pytest.mark.repeat), "marian", "t5"])
def test_dora_on_every_linear_with_trained_biases(family):
    """Factors on the output projections and in the feed-forward networks, gated and not."""
    model = pk.adapt(build(family).double(), pk.LoRA(rank=2, targets="all-linear", bias="lora_only", dora=True))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in pk.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    exact_rms_norms(model)
    inputs = ragged(model.train())
    plain = step(pk.lean(model, 0), inputs)
    for tier in TIERS:
        difference, name = worst(step(pk.lean(model, tier), inputs), plain)
        assert difference < 1e-9, (tier, name, difference)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_peft(family, dora):
    peft = pytest.importorskip("peft")
    targets = ["q", "v"] if family == "t5" else ["q_proj", "v_proj"]
    theirs = build(family).double()
    exact_rms_norms(theirs)
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False, use_dora=dora)
    ).train()
    ours = build(family).double()
    exact_rms_norms(ours)
    pk.adapt(ours, pk.LoRA(rank=3, alpha=6.0, dora=dora))
    names = {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            own = name.removeprefix("base_model.model.").replace(".lora_A.default.weight", ".lora.default.A")
            own = own.replace(".lora_B.default.weight", ".lora.default.B")
            names[name] = own = own.replace(".lora_magnitude_vector.default.weight", ".lora.default.magnitude")
            with torch.no_grad():
                ours.get_parameter(own).copy_(parameter)
    inputs = ragged(ours)
    expected = {names.get(name, name): value for name, value in step(theirs, inputs).items()}
    for tier in TIERS:
        difference, name = worst(step(pk.lean(ours.train(), tier), inputs), expected)
        assert difference < 1e-9, (tier, name, difference)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "method",
    [
        "lora",
        "prefix",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("adapter-sublayer", "parallel", "full")),
    ],
)
def test_dropout(family, method):
    """Each layer's rule draws the masks of the ops that it stands for: all tiers agree with autograd over those ops.

    The bound is for biases of keys, whose gradient is rounding alone.
    """
    settings = {"dropout_rate": 0.2} if family == "t5" else DROPOUT
    if family == "t5":
        model = adapted(family, method)
        _set_dropout(model, 0.2)
    else:
        model = adapted(family, method, **settings)
    if method == "lora":
        for module in model.modules():
            if hasattr(module, "lora"):
                module.lora["default"].dropout = 0.25
    inputs = ragged(model)
    plain = step(without_recomputation(pk.lean(model, 1)), inputs)
    assert worst(step(pk.lean(model, 1), inputs, seed=6), plain)[0] > 1e-3  # other masks, another loss
    for tier in TIERS:
        difference, name = worst(step(pk.lean(model, tier), inputs), plain)
        assert difference < 1e-10, (tier, name, difference)


def _set_dropout(model, p: float) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = p
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = p


@pytest.mark.parametrize("tier", TIERS)
def test_gradient_accumulation(tier):
    model = pk.lean(adapted("m2m100", "lora"), tier)
    inputs = ragged(model, rows=4)
    whole = step(model, inputs, reduction="sum")
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, 4)):
        part = {name: value[rows] for name, value in inputs.items()}
        model(**part, reduction="sum").loss.backward()
    parts = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    difference, name = worst(parts, {name: value for name, value in whole.items() if name != "loss"})
    assert difference < 1e-12, (name, difference)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("family", [*FAMILIES, "seamless", "umt5"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "autocast"])
def test_sixteen_bits(family, precision, tier):
    """The error against float64 is at most twice the plain model's own."""
    _assert_sixteen_bits(family, "lora", precision, tier)


@pytest.mark.parametrize(("family", "tier"), [("mbart", 2), ("t5", 3)])
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "autocast"])
def test_sixteen_bits_of_dora(family, precision, tier):
    _assert_sixteen_bits(family, "dora", precision, tier)


def _assert_sixteen_bits(family, method, precision, tier):
    exact = adapted(family, method)
    inputs = ragged(exact, rows=6)
    expected = step(exact, inputs)
    model = copy.deepcopy(exact).float()  # another dtype would start with other adapters
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        if precision != "autocast":
            model.to(getattr(torch, precision))
        plain = distance(step(model, inputs), expected)
        assert plain < 0.2
        lean = distance(step(pk.lean(copy.deepcopy(model), tier), inputs), expected)
    assert lean <= 2 * plain, (lean, plain)
