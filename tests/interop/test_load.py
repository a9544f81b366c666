"""Weights that are read one tensor after the other, each into the dtype, storage and place that a plan gives it."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch

import petl_kernels as pk
from petl_kernels.errors import InputError
from petl_kernels.interop.hf import load_config, load_outline, load_skeleton, load_weights
from petl_kernels.ops.quantized import QuantizedTensor, quantize
from petl_kernels.planning.load import load_planned
from petl_kernels.planning.plan import Plan

from .conftest import FAMILIES, logits

_C = pytest.importorskip("petl_kernels._C")


@pytest.fixture(params=[*FAMILIES, "t5-tied", "madlad", "umt5", "t5gemma"])
def saved(request, make, tmp_path):
    model, tokenizer = make(request.param)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return model, tmp_path


def as_it_is(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone()


def test_a_skeleton_filled_is_the_model(saved):
    model, path = saved
    skeleton, tokenizer = load_skeleton(path)
    assert all(parameter.is_meta for parameter in skeleton.parameters()) and len(tokenizer)
    filled = load_weights(path, skeleton, as_it_is)
    assert torch.equal(logits(filled), logits(model))
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (filled.get_input_embeddings().weight is filled.get_output_embeddings().weight) == tied
    assert sum(p.numel() for p in filled.parameters()) == sum(p.numel() for p in model.parameters())


def test_a_pickled_checkpoint_is_read_too(make, tmp_path):
    model, tokenizer = make("m2m100")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    filled = load_weights(tmp_path, load_skeleton(tmp_path)[0], as_it_is)
    assert torch.equal(logits(filled), logits(model))


PLANS: list[Plan] = []  # one, since making one takes seconds; what it is bound to is that of each model


def planned(path, **levers):
    skeleton, _ = load_skeleton(path)
    like = pk.adapt(copy.deepcopy(skeleton), pk.LoRA(rank=2, targets="all-linear"))
    if not PLANS:
        PLANS.append(pk.plan(like, "1GiB", 64, max_length=16, device="cpu", beam=1, tier=1))
    bound = {"model": type(like).__name__, "parameters": sum(p.numel() for p in like.parameters())}
    return skeleton, like, dataclasses.replace(PLANS[0], **bound, **levers)


@pytest.mark.parametrize("storage", ["int8", pytest.param("nf4", marks=pytest.mark.repeat)])
def test_weights_are_rounded_as_they_are_read(saved, tmp_path, storage):
    model, path = saved
    skeleton, like, plan = planned(path, storage=storage)
    loaded = load_planned(path, skeleton, like, plan, tmp_path)
    found = {name: p for name, p in loaded.named_parameters() if isinstance(p, QuantizedTensor)}
    assert len(found) > 5
    for name, parameter in found.items():
        rounded = quantize(model.get_parameter(name).detach(), storage)
        assert all(torch.equal(a, b) for a, b in zip(parameter.parts(), rounded.parts(), strict=True)), name
    plan.apply(pk.adapt(loaded, pk.LoRA(rank=2, targets="all-linear")))
    assert torch.isfinite(logits(loaded)).all()


@pytest.mark.parametrize("storage", ["dense", "int8"])
def test_tables_are_read_into_a_storage_of_their_own(saved, tmp_path, storage):
    """Dense layers may be streamed from their file beside them, on a CPU too."""
    model, path = saved
    skeleton, like, plan = planned(path, storage=storage, tables="nf4", streamed=2 if storage == "dense" else 0)
    loaded = load_planned(path, skeleton, like, plan, tmp_path)
    kinds = {name: p.storage if isinstance(p, QuantizedTensor) else "dense" for name, p in loaded.named_parameters()}
    table = loaded.get_input_embeddings().weight
    assert table.storage == loaded.get_output_embeddings().weight.storage == "nf4"
    rounded = quantize(model.get_input_embeddings().weight.detach(), "nf4")
    assert all(torch.equal(a, b) for a, b in zip(table.parts(), rounded.parts(), strict=True))
    assert {kind for name, kind in kinds.items() if ".layers." in name or ".block." in name} == {storage, "dense"}
    files = list(tmp_path.glob("streamed.safetensors"))
    plan.apply(pk.adapt(loaded, pk.LoRA(rank=2, targets="all-linear")), tmp_path, files)
    assert torch.isfinite(logits(loaded)).all() and len(files) == (storage == "dense")


def test_streamed_layers_need_a_folder_for_their_file(saved):
    _, path = saved
    skeleton, like, plan = planned(path, streamed=2)
    with pytest.raises(InputError, match=r"^load_planned: .* expected a folder"):
        load_planned(path, skeleton, like, plan, None)


def test_streamed_layers_come_from_a_file(saved, tmp_path):
    model, path = saved
    skeleton, like, plan = planned(path, streamed=2)
    loaded = load_planned(path, skeleton, like, plan, tmp_path)
    (file,) = tmp_path.glob("streamed.safetensors")
    pk.adapt(loaded, pk.LoRA(rank=2, targets="all-linear"))
    plan.apply(loaded, tmp_path, [file])
    file.unlink()  # it is mapped
    assert len(loaded.petl.streamed.paths) == 2
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_no_more_than_a_tensor_beside_the_model_is_in_memory(make, tmp_path):
    from petl_kernels.step import cap

    model, tokenizer = make("m2m100")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    skeleton, _ = load_skeleton(tmp_path)
    cpu, largest = torch.device("cpu"), max(p.nbytes for p in model.parameters())
    with cap.capped(2**30, cpu):
        cap.reset_peak(cpu)
        before = cap.peak(cpu)
        filled = load_weights(tmp_path, skeleton, as_it_is)
        taken = cap.peak(cpu) - before
    # an allocation is rounded up to 64 bytes and a header
    own = sum(p.nbytes + 96 for p in filled.parameters())
    assert taken <= own + largest + 96 * len(list(filled.parameters()))


def test_what_is_damaged_is_refused(make, tmp_path):
    model, tokenizer = make("m2m100")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    skeleton, _ = load_skeleton(tmp_path)
    state = dict(model.state_dict())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_weights(tmp_path, skeleton, as_it_is)
    weights.unlink()
    state["model.encoder.layers.0.fc1.weight"] = torch.zeros(3, 3)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"fc1.weight has shape \(3, 3\), expected"):
        load_weights(tmp_path, load_skeleton(tmp_path)[0], as_it_is)


def test_a_config_file_alone(make, tmp_path):
    make("m2m100")[0].config.to_json_file(tmp_path / "small.json")
    assert load_config(tmp_path / "small.json").model_type == "m2m_100"
    with pytest.raises(InputError, match="no such file"):
        load_config(tmp_path / "none.json")
    quantized = {"model_type": "t5", "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    (tmp_path / "small.json").write_text(json.dumps(quantized))
    with pytest.raises(InputError, match=r"quantization_config \(bitsandbytes\); expected .* plain weights"):
        load_config(tmp_path / "small.json")
    (tmp_path / "small.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match="type 'bert' is not supported"):
        load_config(tmp_path / "small.json")
    (tmp_path / "small.json").write_text("{")
    with pytest.raises(InputError, match="small.json"):
        load_config(tmp_path / "small.json")


def test_a_plan_has_the_ties_of_the_weights(make, tmp_path):
    model, _ = make("t5-tied")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() + 1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    of_config = load_outline(tmp_path)
    assert of_config.lm_head.weight is of_config.shared.weight
    torch.save(state, tmp_path / "pytorch_model.bin")
    of_weights = load_outline(tmp_path)
    assert of_weights.lm_head.weight is not of_weights.shared.weight and of_weights.lm_head.weight.is_meta
