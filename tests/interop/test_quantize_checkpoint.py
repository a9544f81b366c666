"""A checkpoint that is quantized once is read as the model that quantizing at load time gives, and as no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from petl_kernels.errors import InputError
from petl_kernels.interop.hf import load_config, load_outline, load_pretrained, load_skeleton
from petl_kernels.interop.plain import save_merged
from petl_kernels.interop.quantize_checkpoint import quantize_checkpoint
from petl_kernels.ops.quantized import QuantizedTensor, parts_of
from petl_kernels.weights.quantized import quantize_model
from petl_kernels.weights.quantized_file import FILE

from .conftest import FAMILIES, logits

pytest.importorskip("petl_kernels._C")


@pytest.fixture
def saved(make, tmp_path):
    """saved(family) -> the folder of a checkpoint that says something of generation, too."""

    def save(family: str, dtype: torch.dtype = torch.float32) -> Path:
        model, tokenizer = make(family)
        model.generation_config.max_length = 33
        model.to(dtype).save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
        return tmp_path / family

    return save


def assert_same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Compares names, ties, storages, dtypes and bytes."""
    ours, theirs = (dict(model.named_parameters(remove_duplicate=False)) for model in (found, expected))
    assert ours.keys() == theirs.keys()
    assert [len({id(p) for p in each.values()}) for each in (ours, theirs)] == 2 * [len(set(map(id, ours.values())))]
    for name, parameter in [*ours.items(), *found.named_buffers()]:
        other = theirs.get(name)
        other = expected.get_buffer(name) if other is None else other
        assert (type(parameter), parameter.dtype) == (type(other), other.dtype), name
        assert all(torch.equal(a, b) for a, b in zip(parts_of(parameter), parts_of(other), strict=True)), name


@pytest.mark.parametrize("family", [*FAMILIES, "t5-tied", "madlad"])
def test_it_is_the_model_that_is_quantized_when_loaded(saved, tmp_path, family):
    path = saved(family)
    written: list[int] = []
    quantize_checkpoint(path, tmp_path / "out", "int8", "nf4", written.append)
    size = (tmp_path / "out" / FILE).stat().st_size
    assert 0 < size - written[0] < 64 * 1024 and size < (path / "model.safetensors").stat().st_size
    expected, its_tokenizer = load_pretrained(path)
    quantize_model(expected.requires_grad_(False), "int8", "nf4")
    found, tokenizer = load_pretrained(tmp_path / "out")
    assert_same(found, expected)
    assert torch.equal(logits(found), logits(expected))
    assert tokenizer.get_vocab() == its_tokenizer.get_vocab()
    assert found.generation_config.max_length == 33
    ours, theirs = ({**model.config.to_dict(), "_name_or_path": ""} for model in (found, expected))
    assert ours == theirs
    for storage, model in (("int8", load_skeleton(tmp_path / "out")[0]), ("int8", load_outline(tmp_path / "out"))):
        kinds = {p.storage for p in model.parameters() if isinstance(p, QuantizedTensor) and p.is_meta}
        assert kinds == {storage, "nf4"} and all(p.is_meta for p in model.parameters())


def test_a_half_precision_checkpoint_keeps_its_dtype(saved, tmp_path):
    path = saved("mbart50", torch.bfloat16)
    quantize_checkpoint(path, tmp_path / "out", "nf4", "dense")
    expected, _ = load_pretrained(path, torch.bfloat16)
    quantize_model(expected.requires_grad_(False), "nf4", "dense")
    assert_same(load_pretrained(tmp_path / "out", torch.bfloat16)[0], expected)


@pytest.mark.parametrize("family", ["t5", "mt5"])
def test_in_fp16_it_keeps_in_fp32_what_transformers_keeps(saved, tmp_path, family):
    """Where the last projection of T5 were in fp16, its outputs beyond 65,504 would be infinite."""
    path = saved(family, torch.float16)
    quantize_checkpoint(path, tmp_path / "out", "int8", "dense")
    expected, _ = load_pretrained(path, torch.float16)
    wide = [name for name, p in expected.named_parameters() if p.dtype == torch.float32]
    assert wide and all(name.endswith("wo.weight") for name in wide)
    quantize_model(expected.requires_grad_(False), "int8", "dense")
    found, _ = load_pretrained(tmp_path / "out", torch.float16)
    assert_same(found, expected)
    plain, _ = load_pretrained(path, torch.float16)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            quantized = found.get_parameter(name)
            if isinstance(quantized, QuantizedTensor):
                parameter.copy_(quantized.dequantize())
        for model in (found, plain):
            for name in wide:
                weight = model.get_parameter(name)
                scale = weight.scale if isinstance(weight, QuantizedTensor) else weight
                scale.mul_(3e5)
    outputs = []
    plain.encoder.block[0].layer[-1].DenseReluDense.wo.register_forward_hook(lambda *args: outputs.append(args[-1]))
    torch.testing.assert_close(logits(found), logits(plain), rtol=0.01, atol=0.01)
    assert outputs[0].abs().max() > 70_000


def test_transformers_never_takes_it_for_another_model(saved, tmp_path):
    quantize_checkpoint(saved("m2m100"), tmp_path / "out", "int8")
    for loader in (transformers.AutoModelForSeq2SeqLM, transformers.M2M100ForConditionalGeneration):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            loader.from_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["petl_quantized"]["storage"] == "int8"


def test_a_dense_model_of_it_is_saved_without_the_marker(saved, tmp_path):
    quantize_checkpoint(saved("m2m100"), tmp_path / "out", "int8")
    model, tokenizer = load_pretrained(tmp_path / "out")
    save_merged(model, tokenizer, tmp_path / "dense")
    plain = transformers.M2M100ForConditionalGeneration.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(load_pretrained(tmp_path / "dense")[0]), logits(plain.eval()))
    assert "petl_quantized" not in (tmp_path / "dense" / "config.json").read_text()


def test_what_cannot_be_written_is_refused_and_leaves_nothing(saved, tmp_path):
    path = saved("m2m100")
    quantize_checkpoint(path, tmp_path / "out", "int8")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="is quantized already; expected a checkpoint that is not"):
        quantize_checkpoint(tmp_path / "out", tmp_path / "again", "nf4")
    with pytest.raises(InputError, match="exists and is not empty"):
        quantize_checkpoint(path, tmp_path / "out", "nf4")
    with pytest.raises(InputError, match="storage is 'fp4': expected int8 or nf4"):
        quantize_checkpoint(path, tmp_path / "again", "fp4")
    with pytest.raises(InputError, match="tables is 'fp4': expected dense or int8 or nf4"):
        quantize_checkpoint(path, tmp_path / "again", "int8", "fp4")

    def no_room(size: int) -> None:
        raise InputError("no room")

    with pytest.raises(InputError, match="no room"):
        quantize_checkpoint(path, tmp_path / "again", "int8", check=no_room)
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_damaged_is_refused(saved, tmp_path):
    out = quantize_checkpoint(saved("m2m100"), tmp_path / "out", "int8")
    with pytest.raises(InputError, match="of a quantized checkpoint; expected its folder"):
        load_config(out / "config.json")
    config = json.loads((out / "config.json").read_text())

    def write(text: dict) -> None:
        (out / "config.json").write_text(json.dumps(text))

    write(config | {"petl_quantized": {"version": 2}})
    with pytest.raises(InputError, match="quantized in version 2; expected version 1"):
        load_pretrained(out)
    write({key: value for key, value in config.items() if key != "petl_quantized"})
    with pytest.raises(InputError, match="a config that does not name it"):
        load_pretrained(out)
    write(config)
    shutil.move(out / FILE, tmp_path / FILE)
    with pytest.raises(InputError, match=f"expected a folder with {FILE}"):
        load_pretrained(out)
    (out / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-40])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_pretrained(out)
