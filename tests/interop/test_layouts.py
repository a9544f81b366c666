"""Each layout of a checkpoint's files gives one model, read whole or tensor by tensor: transformers' loader decides."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from petl_kernels.errors import InputError
from petl_kernels.interop import hf
from petl_kernels.interop.hf import load_pretrained, load_skeleton, load_weights

from .conftest import logits

TABLES = {  # names of the tables of words, the family's own first
    "t5": ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
    "bart": (
        "model.shared.weight",
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
        "lm_head.weight",
    ),
}


def by_tensor(path):
    return load_weights(path, load_skeleton(path)[0], lambda name, tensor: tensor.float().clone())


def ties(model) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


def outcome(load, path):
    """The model's ties, parameters and logits; or that it was refused."""
    try:
        model = load(path)
    except InputError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return None
    return ties(model), dict(model.named_parameters()), logits(model)


def assert_same(path, case):
    whole, piecewise = outcome(lambda p: load_pretrained(p)[0], path), outcome(by_tensor, path)
    assert (whole is None) == (piecewise is None), case
    if whole is not None:
        assert piecewise[0] == whole[0], case
        assert piecewise[1].keys() == whole[1].keys(), case
        assert all(torch.equal(tensor, whole[1][name]) for name, tensor in piecewise[1].items()), case
        assert torch.equal(piecewise[2], whole[2]), case
    return whole


@pytest.fixture
def folder(make, tmp_path, monkeypatch):
    """folder(family) -> (path, the tensors of its file, the model). Its tokenizer is not read, to save time."""

    def build(family: str):
        model, tokenizer = make(family)
        model.save_pretrained(tmp_path)
        monkeypatch.setattr(hf, "_load_tokenizer", lambda name, folder: tokenizer)
        return tmp_path, load_file(tmp_path / "model.safetensors"), model

    return build


def write(path, tensors):
    save_file({k: t.contiguous().clone() for k, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})


FEW = ((0,), (1,), (2,), (3,), (0, 3), (2, 3), (1, 2, 3), (0, 1, 2, 3))  # of the tables, by number
ALL = tuple(chosen for count in range(1, 5) for chosen in itertools.combinations(range(4), count))


@pytest.mark.parametrize(
    ("family", "subsets"),
    [("t5-tied", ALL), *(pytest.param(name, FEW, marks=pytest.mark.slow) for name in ("madlad", "m2m100", "marian"))],
)
def test_any_tables_may_be_in_the_file(folder, family, subsets):
    """All with the same values, or the output projection with others."""
    path, tensors, _ = folder(family)
    names = TABLES["bart" if family in ("m2m100", "marian") else "t5"]
    one = next(tensors[name] for name in names if name in tensors)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in names}
    other = one.flip(0) * 0.5
    loaded = 0
    for chosen in subsets:
        for head in (one, other) if 3 in chosen and len(chosen) > 1 else (one,):
            write(path, tensors | {names[i]: head if i == 3 else one for i in chosen})
            whole = assert_same(path, (family, chosen, head is other))
            loaded += whole is not None
            if whole is not None and head is other and 0 in chosen:
                assert not any({"lm_head.weight", names[0]} <= group for group in whole[0])
    assert loaded >= len(subsets) - 2  # most are whole checkpoints


@pytest.mark.parametrize("family", ["t5-tied", "madlad", "m2m100"])
@pytest.mark.parametrize("tied", [True, False])
def test_whatever_the_config_says_of_ties(folder, family, tied):
    path, tensors, _ = folder(family)
    config = json.loads((path / "config.json").read_text())
    config.pop("scale_decoder_outputs", None)
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
    assert_same(path, (family, tied))
    names = TABLES["bart" if family == "m2m100" else "t5"]
    one = next(tensors[name] for name in names if name in tensors)
    write(path, {name: one for name in names} | tensors)
    assert assert_same(path, (family, tied, "all four")) is not None


@pytest.mark.parametrize(
    "family", ["marian", *(pytest.param(name, marks=pytest.mark.slow) for name in ("t5-tied", "madlad", "nllb"))]
)
def test_shards_pickles_dtypes_and_old_names(folder, family):
    path, tensors, model = folder(family)
    assert assert_same(path, "as saved") is not None
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        write(path, {name: tensor.to(dtype) for name, tensor in tensors.items()})
        assert assert_same(path, dtype) is not None
    mixed = {name: tensor.half() if i % 2 else tensor for i, (name, tensor) in enumerate(tensors.items())}
    write(path, mixed)
    assert assert_same(path, "mixed dtypes") is not None

    old = {name.replace("layer_norm.weight", "layer_norm.gamma"): t for name, t in tensors.items()}
    write(path, {name.replace("layer_norm.bias", "layer_norm.beta"): t for name, t in old.items()})
    assert_same(path, "gamma and beta")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    write(path, bare)
    assert_same(path, "without the base model's prefix")
    write(path, {f"model.{name}" if not name.startswith("model.") else name: t for name, t in tensors.items()})
    assert_same(path, "with a prefix more")
    write(path, tensors | {"somebody.else": torch.ones(3), "shared.other": torch.ones(2, 2)})
    assert assert_same(path, "tensors too many") is not None

    (path / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="4KB")
    assert len(list(path.glob("model-*.safetensors"))) > 1
    save_file({"a": torch.ones(2)}, path / "adapter_model.safetensors")  # which transformers does not read
    assert assert_same(path, "shards") is not None
    state = model.state_dict()
    halves = [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
    for old_file in path.glob("model*"):
        old_file.unlink()
    files = [f"pytorch_model-{i}.bin" for i in range(2)]
    for file, half in zip(files, halves, strict=True):
        torch.save(half, path / file, _use_new_zipfile_serialization=file.endswith("0.bin"))
    index = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert assert_same(path, "pickled shards") is not None
    torch.save(state, path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert assert_same(path, "an old pickle") is not None
    torch.save(state | {"epoch": 3}, path / "pytorch_model.bin")
    assert assert_same(path, "a number beside the tensors") is not None
