from __future__ import annotations

import json

import pytest
import torch

from petl_kernels.errors import InputError
from petl_kernels.interop.hf import load_pretrained

from .conftest import FAMILIES, logits


@pytest.fixture
def checkpoint(make, tmp_path):
    def build(family):
        model, tokenizer = make(family)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return model, tokenizer, tmp_path

    return build


def refused(path, *words):
    with pytest.raises(InputError) as error:
        load_pretrained(path)
    assert "\n" not in str(error.value)
    assert all(str(word) in str(error.value) for word in (path, *words)), str(error.value)


@pytest.mark.parametrize("family", [*FAMILIES, "t5-tied", "mt5", "umt5", "byt5", "nllb-moe", "seamless", "t5gemma"])
def test_loads_what_transformers_saved(checkpoint, family):
    model, tokenizer, path = checkpoint(family)
    loaded, loaded_tokenizer = load_pretrained(path)
    assert type(loaded) is type(model)
    assert type(loaded_tokenizer) is type(tokenizer) or family == "umt5"  # transformers takes a general class for it
    assert torch.equal(logits(loaded), logits(model)) and not loaded.training
    text = "the big dog"
    assert loaded_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert load_pretrained(path, torch.bfloat16)[0].dtype == torch.bfloat16


def test_layerdrop_is_off(make, tmp_path):
    model, tokenizer = make("m2m100")
    model.config.encoder_layerdrop = model.config.decoder_layerdrop = 0.5
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_pretrained(tmp_path)
    assert loaded.model.encoder.layerdrop == loaded.model.decoder.layerdrop == loaded.config.encoder_layerdrop == 0


def test_refuses_what_is_no_checkpoint(tmp_path, monkeypatch):
    refused(tmp_path / "none", "no such folder")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    refused("runs/none", "no such folder")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("nobody/nothing", "no folder here", "hub id")
    refused(tmp_path, "config.json")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path)
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    refused(tmp_path, "bert", "m2m_100", "marian", "mbart", "mt5", "t5")


@pytest.mark.parametrize("family", ["m2m100", "t5"])
def test_refuses_damaged_checkpoints(checkpoint, family):
    _, _, path = checkpoint(family)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"d_model": 32}))
    refused(path)
    more = {"encoder_layers": 2, "num_layers": 2}
    (path / "config.json").write_text(json.dumps(config | more))
    refused(path, "missing", "layers.1" if family == "m2m100" else "block.1")
    (path / "config.json").write_text(json.dumps(config))
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(path)
    weights.unlink()
    refused(path, "no weights")


@pytest.mark.parametrize("family", FAMILIES)
def test_refuses_a_folder_without_tokenizer(make, tmp_path, family):
    make(family)[0].save_pretrained(tmp_path)
    refused(tmp_path, "tokenizer")


def test_refuses_a_tokenizer_that_is_larger_than_the_model(make, tokenizers, tmp_path):
    model, _ = make("m2m100")
    model.save_pretrained(tmp_path)
    tokenizers("mbart50").save_pretrained(tmp_path)
    model.resize_token_embeddings(50)
    model.save_pretrained(tmp_path)
    refused(tmp_path, "50", "tokens")
