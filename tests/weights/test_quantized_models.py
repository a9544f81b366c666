"""A model whose frozen weights are quantized is the model of the dequantized weights, in every tier and method."""

from __future__ import annotations

import copy

import pytest
import torch
from layers.lean_cases import adapted, exact_rms_norms, ragged, step, worst
from methods.models import batch, build, logits, train_a_little
from planning.peaks import peak_bytes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import petl_kernels as pk
from petl_kernels.errors import InputError
from petl_kernels.methods import METHODS
from petl_kernels.methods.merge import _move
from petl_kernels.ops.quantized import STORAGES, TILE_BYTES, QuantizedTensor, quantize, storage_bytes
from petl_kernels.weights.quantized import quantize_model

FP32, FP64 = torch.float32, torch.float64
FAMILIES = ("m2m100", "t5")
storages = pytest.mark.parametrize("storage", STORAGES)
families = pytest.mark.parametrize("family", FAMILIES)


def dense_twin(model: nn.Module, dtype: torch.dtype = FP64) -> nn.Module:
    """Returns a copy with the dequantized weights, in ``dtype``."""
    twin, made = copy.deepcopy(model), {}
    for module in twin.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, QuantizedTensor):
                if parameter not in made:
                    made[parameter] = nn.Parameter(parameter.dequantize(dtype), requires_grad=False)
                setattr(module, name, made[parameter])
    twin = twin.to(dtype)
    exact_rms_norms(twin)
    return twin


def quantized_names(model: nn.Module) -> set[str]:
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if isinstance(parameter, QuantizedTensor)}


@storages
@families
@pytest.mark.parametrize("method", ["lora", "dora", "adapter"])
def test_training_is_that_of_the_dequantized_weights(family, method, storage):
    model = quantize_model(adapted(family, method, dtype=FP32), storage)
    exact_rms_norms(model)
    inputs = ragged(model)
    plain = step(dense_twin(model), inputs)
    assert len(plain) > 4
    rounding, _ = worst(step(dense_twin(model, FP32), inputs), plain)  # what fp32 itself does to the dense model
    for tier in (0, 1, 2, 3):
        difference, name = worst(step(pk.lean(model, tier), inputs), plain)
        assert difference < 1e-6 + 2 * rounding < 1e-4, (tier, name, difference)
    in_fp64 = model.to(FP64)  # the products are those of x's dtype: the same weights, without rounding between them
    for tier in (0, 1, 2, 3, 4, 5):
        difference, name = worst(step(pk.lean(in_fp64, tier), inputs), plain)
        assert difference < 1e-9, (tier, name, difference)


@storages
@pytest.mark.parametrize("family", ["mbart", "marian"])
@pytest.mark.parametrize("method", ["parallel", "prefix", "ia3", "bitfit"])
def test_other_families_and_methods(family, method, storage):
    model = quantize_model(adapted(family, method, dtype=FP64), storage)
    inputs = ragged(model)
    plain = step(dense_twin(model), inputs)
    for tier in (0, 2, 3):
        difference, name = worst(step(pk.lean(model, tier), inputs), plain)
        assert difference < 1e-9, (tier, name, difference)


@storages
@families
def test_what_is_quantized(family, storage):
    plain = build(family)
    model = adapted(family, "adapter", dtype=FP32)
    before, reported = sum(p.numel() for p in plain.parameters()), pk.report(model)
    assert quantize_model(model, storage) is model
    names = quantized_names(model)
    expected = {
        f"{path}.weight"
        for path, module in plain.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding)) and "relative" not in path and "position" not in path
    }
    assert names == expected and any("lm_head" in name for name in names)

    # what was tied stays tied
    def ties(of):
        groups = {}
        for name, parameter in of.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), set()).add(name)
        return sorted(map(sorted, (group for group in groups.values() if len(group) > 1)))

    assert ties(model) == ties(plain) and ties(plain)
    after = pk.report(model)
    assert (after.total, after.trained, after.frozen) == (before, reported.trained, reported.frozen)
    *lines, storage_line = str(after).splitlines()
    assert (
        lines == str(reported).splitlines() and storage_line.startswith("frozen weights: ") and storage in storage_line
    )
    held = sum(part.nbytes for p in set(model.parameters()) if isinstance(p, QuantizedTensor) for part in p.parts())
    dense = sum(4 * p.numel() for p in set(model.parameters()) if isinstance(p, QuantizedTensor))
    assert held < dense * {"int8": 0.29, "nf4": 0.14}[storage]


@storages
@families
@pytest.mark.parametrize("order", ["before", "after"])
def test_before_or_after_adapting(family, storage, order):
    model = build(family)
    if order == "before":
        quantize_model(model.requires_grad_(False), storage)
    torch.manual_seed(3)
    pk.adapt(model, pk.LoRA(rank=2))
    if order == "after":
        quantize_model(model, storage)
    assert all(not isinstance(p, QuantizedTensor) for p in pk.trainable_parameters(model))
    inputs = ragged(model)
    first = step(pk.lean(model, 2), inputs)["loss"]
    optimizer = torch.optim.AdamW(pk.trainable_parameters(model), lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    assert step(model, inputs)["loss"] < first


@storages
@families
def test_generation_with_a_cache(family, storage):
    model = quantize_model(adapted(family, "lora", dtype=FP64).eval(), storage)
    pk.lean(model, 2)
    inputs = {name: value for name, value in batch(model).items() if name != "decoder_input_ids"}
    options = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options), dense_twin(model).generate(**inputs, **options))


@storages
@families
def test_the_loss_without_logits_and_the_logits(family, storage):
    model = pk.lean(quantize_model(adapted(family, "lora", dtype=FP64), storage), 1)
    inputs = ragged(model)
    output = model(**inputs)
    other = pk.lean(dense_twin(model), 0)(**inputs)
    torch.testing.assert_close(output.loss, other.loss)
    torch.testing.assert_close(output.logits, other.logits)


@storages
def test_autocast_and_16_bits(storage):
    model = pk.lean(quantize_model(adapted("m2m100", "lora", dtype=FP32), storage), 2)
    inputs = ragged(model)
    exact = step(dense_twin(model), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = step(model, inputs)
    assert worst({"loss": found["loss"]}, {"loss": exact["loss"]})[0] < 0.02
    model.to(torch.bfloat16)
    assert worst({"loss": step(model, inputs)["loss"]}, {"loss": exact["loss"]})[0] < 0.05


@storages
def test_copies_and_adapter_files(storage, tmp_path):
    model = quantize_model(adapted("m2m100", "lora", dtype=FP32), storage)
    inputs = ragged(model)
    before = step(model, inputs)
    assert worst(step(copy.deepcopy(model), inputs), before)[0] == 0
    pk.save_adapter(model, tmp_path / "a")
    other = quantize_model(build("m2m100").requires_grad_(False), storage).train()
    pk.load_adapter(other, tmp_path / "a")
    torch.testing.assert_close(other(**inputs).loss.detach(), before["loss"])


@storages
def test_several_adapters(storage):
    model = adapted("m2m100", "lora", dtype=FP32)
    pk.adapt(model, pk.CrossAttention(), name="cross")
    quantize_model(model, storage)
    names = quantized_names(model)
    assert names and not any("encoder_attn" in name for name in names)
    pk.use_adapter(model, "default")
    quantize_model(model, storage)  # what an inactive adapter trains stays dense
    assert quantized_names(model) == names
    pk.use_adapter(model, "cross")
    model(**ragged(model)).loss.backward()


@pytest.mark.parametrize("method", ["full", "cross-attention"])
def test_methods_that_train_the_weights_refuse(method):
    model = quantize_model(build("m2m100").requires_grad_(False), "nf4")
    with pytest.raises(InputError, match=r"it trains '.*weight', which is quantized \(nf4\)") as error:
        pk.adapt(model, METHODS[method]())
    assert "\n" not in str(error.value) and str(error.value).startswith(method)
    pk.adapt(model, pk.LoRA(rank=2))  # the model is as it was


def parts_by_name(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    named = model.named_parameters(remove_duplicate=False)
    return {name: [part.clone() for part in p.parts()] for name, p in named if isinstance(p, QuantizedTensor)}


def same_parts(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(
        all(map(torch.equal, parts, expected[name])) for name, parts in found.items()
    )


METHODS_TO_MERGE = {
    "lora": pk.LoRA(rank=2),
    "lora-tied": pk.LoRA(rank=2, targets=("embed_tokens", "lm_head")),
    "ia3": pk.IA3(),
}


@storages
@families
@pytest.mark.parametrize("method", METHODS_TO_MERGE)
def test_merging_rounds_once_more_and_says_how_much(family, method, storage):
    model = quantize_model(build(family).requires_grad_(False), storage)
    pk.adapt(model, METHODS_TO_MERGE[method])
    train_a_little(model)
    before, adapted_logits, tied = parts_by_name(model), logits(model), model.config.tie_word_embeddings
    owners = {name: model.get_parameter(name) for name in before}
    exact = dense_twin(model, FP32)
    pk.merge(exact)
    assert pk.report(exact).merge_error is None and pk.report(exact).merged
    assert pk.merge(model) is model
    assert quantized_names(model) == before.keys()
    merged = parts_by_name(model)
    changed = {name for name in before if not same_parts({name: merged[name]}, {name: before[name]})}
    errors = []
    for name in changed:
        wanted = exact.get_parameter(name).double()
        errors.append(float((model.get_parameter(name).dequantize(FP64) - wanted).norm() / wanted.norm()))
    report = pk.report(model)
    assert report.merge_error == pytest.approx(max(errors), rel=1e-3)
    assert max(errors) < {"int8": 0.01, "nf4": 0.12}[storage]
    assert f"merged into quantized weights with a relative error of at most {report.merge_error:.2%}" in str(report)
    pk.unmerge(model)
    assert same_parts(parts_by_name(model), before) and torch.equal(logits(model), adapted_logits)
    assert all(model.get_parameter(name) is owner for name, owner in owners.items())
    assert model.config.tie_word_embeddings == tied and pk.report(model).merge_error is None


@storages
def test_an_adapter_that_changes_nothing_merges_with_the_error_of_the_storage(storage):
    """B = 0: int8 rows come out as they were; NF4 rounds its own values, whose absmaxes moved."""
    model = pk.adapt(quantize_model(build("m2m100").requires_grad_(False), storage), pk.LoRA(rank=2))
    before = logits(model)
    pk.merge(model)
    assert pk.report(model).merge_error < {"int8": 1e-6, "nf4": 0.02}[storage]
    torch.testing.assert_close(logits(model), before, rtol=0.05, atol={"int8": 1e-4, "nf4": 0.2}[storage])


@storages
def test_one_lora_linear_merges(storage):
    linear = nn.Linear(64, 48).requires_grad_(False)
    linear.weight = nn.Parameter(quantize(linear.weight, storage), requires_grad=False)
    layer = pk.nn.LoRALinear.from_linear(linear, rank=4)
    nn.init.normal_(layer.lora["default"].B, std=0.1)
    original = layer.weight
    wanted = original.dequantize() + layer.lora["default"].delta().detach()
    error = layer.merge()
    assert error == pytest.approx(float((layer.weight.dequantize() - wanted).norm() / wanted.norm()), rel=1e-3)
    layer.unmerge()
    assert layer.weight is original


@storages
def test_merging_makes_one_weight_dense_after_the_other(storage):
    size, layers = 1024, 4
    model = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(layers))).requires_grad_(False)
    pk.adapt(quantize_model(model, storage), pk.LoRA(rank=2, targets=r"\d"))
    dense, one = 4 * size * size, storage_bytes((size, size), storage, FP32)
    peak = peak_bytes(lambda: pk.merge(model), model.parameters())
    small = sum(4 * 2 * 2 * size for _ in range(layers))
    assert layers * one < peak - dense < small + 2 * layers * one + 2.5 * TILE_BYTES  # a tile, twice


on_devices = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
        ),
    ],
)


@on_devices
@storages
def test_merging_stays_on_the_device_and_says_how_much_it_has_rounded(device, storage):
    model = quantize_model(pk.adapt(build("m2m100").to(device), METHODS_TO_MERGE["lora-tied"]), storage)
    pk.merge(model)
    # B = 0: the values of int8 are on their grid, most often to the bit; those of NF4 are not on the new one
    assert pk.report(model).merge_error < 1e-6 if storage == "int8" else pk.report(model).merge_error > 1e-4
    pk.unmerge(model)
    torch.manual_seed(0)
    for parameter in pk.trainable_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    before = parts_by_name(model)
    pk.merge(model)
    assert all(p.device.type == device for p in model.parameters()) and pk.report(model).merge_error > 1e-3
    pk.unmerge(model)
    assert all(p.device.type == device for p in model.parameters()) and same_parts(parts_by_name(model), before)


def test_what_is_set_aside_changes_device_in_place():
    weight = nn.Parameter(quantize(torch.randn(8, 16), "nf4"), requires_grad=False)
    held = [weight]
    _move(weight, torch.device("meta"))
    assert held[0] is weight and weight.is_meta and all(part.is_meta for part in weight.parts())
    assert isinstance(weight, nn.Parameter) and weight.shape == (8, 16)


@storages
def test_one_weight_after_the_other(storage):
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(6))).requires_grad_(False)
    dense, one = 6 * 4 * 256 * 256, storage_bytes((256, 256), storage, FP32)
    peak = peak_bytes(lambda: quantize_model(model, storage), model.parameters())
    assert dense < peak < dense + 3 * one  # the check for inf and nan takes some more for a moment


@storages
@families
def test_a_step_without_memory(family, storage):
    """A plan counts with such tensors, which have shapes and bytes and no values."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = quantize_model(pk.adapt(build(family), pk.LoRA(rank=2)), storage)
        pk.lean(model.train(), 2)(**ragged(model)).loss.backward()
    assert all(parameter.grad is not None for parameter in pk.trainable_parameters(model))


@families
def test_tables_in_a_storage_of_their_own(family):
    """Token embeddings and the output projection, tied or not, have one storage, and layers another or none."""
    for storage, tables in (("int8", "nf4"), ("dense", "nf4"), ("int8", "dense")):
        model = adapted(family, "lora", dtype=FP32)
        head = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        of_tables = [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in head]
        quantize_model(model, storage, tables)
        found = {
            name: p.storage if isinstance(p, QuantizedTensor) else "dense"
            for name, p in model.named_parameters(remove_duplicate=False)
        }
        assert {found[name] for name in of_tables} == {tables}
        others = {kind for name, kind in found.items() if name not in of_tables}
        assert others == {storage, "dense"}
        assert torch.isfinite(model(**ragged(model)).logits).all()


def test_wrong_input():
    with pytest.raises(InputError, match="storage is 'int4': expected int8 or nf4"):
        quantize_model(build("t5"), "int4")
    with pytest.raises(InputError, match="tables is 'int4': expected dense or int8 or nf4"):
        quantize_model(build("t5"), "int8", "int4")
    with pytest.raises(InputError, match="T5ForConditionalGeneration has no frozen linear layer"):
        quantize_model(build("t5"), "int8")


def test_on_the_meta_device():
    model = quantize_model(build("m2m100").to("meta").requires_grad_(False), "nf4")
    assert quantized_names(model) and all(parameter.is_meta for parameter in model.parameters())
