"""Round trips of every method, merged checkpoints, damaged files of our own format, full disks."""

from __future__ import annotations

import copy
import errno
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

import petl_kernels as pk
from petl_kernels.errors import InputError
from petl_kernels.interop.hf import checkpoint_dtype, load_pretrained
from petl_kernels.weights.quantized import quantize_model

from .conftest import FAMILIES, T5, batch, logits
from .test_peft_format import close, fill_ours, refused

METHODS = {
    "lora": lambda: pk.LoRA(rank=2),
    "adapter": lambda: pk.Adapter(bottleneck=3),
    "adapter-sublayer": lambda: pk.Adapter(bottleneck=3, placement="sublayer", activation="gelu"),
    "pfeiffer": lambda: pk.Adapter(bottleneck=5, pfeiffer=True),
    "parallel": lambda: pk.Adapter(bottleneck=5, parallel=True, scale=2.0),
    "bitfit": lambda: pk.BitFit(),
    "bitfit-biases": lambda: pk.BitFit(layer_norm=False),
    "cross-attention": lambda: pk.CrossAttention(),
    "prefix": lambda: pk.PrefixTuning(length=3),
    "full": lambda: pk.FullFineTuning(),
    "ia3": lambda: pk.IA3(),
    "ln": lambda: pk.LayerNormTuning(),
}
IN_PEFT_FORMAT = {"lora", "ia3", "ln"}


def adapted(model, method):
    """`model` with the method at work, and values that are not the start's."""
    pk.adapt(model, METHODS[method]())
    for seed, parameter in enumerate(pk.trainable_parameters(model)):
        draw = torch.Generator().manual_seed(seed)
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model


def in_turn(methods) -> list:
    """Returns all pairs of a family and a method, of which each method has two families that are no repeats."""
    return [
        pytest.param(family, method, marks=() if (i + j) % 5 in (0, 2) else pytest.mark.repeat)
        for i, family in enumerate(FAMILIES)
        for j, method in enumerate(methods)
    ]


@pytest.mark.parametrize(("family", "method"), in_turn(METHODS))
def test_round_trip_of_every_method(make, tmp_path, family, method):
    model, _ = make(family)
    base = copy.deepcopy(model)
    plain = logits(model)
    expected = logits(adapted(model, method))
    assert (expected - plain).abs().max() > 1e-3
    home = pk.save_adapter(model, tmp_path)
    pair = ["adapter_config.json", "adapter_model.safetensors"]
    ours = ["petl_adapter.json", "petl_adapter.safetensors"]
    assert sorted(os.listdir(home)) == (pair if method in IN_PEFT_FORMAT else ours)
    assert pk.load_adapter(base, tmp_path) is base
    close(logits(base), expected)
    if method not in IN_PEFT_FORMAT:  # PEFT's has no word for "the usual targets": there they come back by name
        assert base.petl.adapters["default"].config == model.petl.adapters["default"].config
    before = {name: (home / name).read_bytes() for name in os.listdir(home)}
    pk.save_adapter(base, tmp_path)
    assert before == {name: (home / name).read_bytes() for name in os.listdir(home)}
    pk.use_adapter(base, None)
    assert torch.equal(logits(base), plain)


@pytest.mark.parametrize("method", ["lora", "adapter", "prefix", "bitfit"])
def test_loaded_adapters_train_on(make, tmp_path, method):
    """The gradients after loading are those of the model that was saved."""
    model, _ = make("m2m100")
    base = copy.deepcopy(model)
    pk.save_adapter(adapted(model, method), tmp_path)
    again = pk.load_adapter(copy.deepcopy(base), tmp_path)
    if method == "prefix":  # it comes back folded: compare two loaded ones
        model = pk.load_adapter(base, tmp_path)
    for one in (model, again):
        one(**batch(one)).loss.backward()
    gradients = [[p.grad for p in pk.trainable_parameters(one)] for one in (model, again)]
    assert len(gradients[0]) == len(gradients[1]) > 0
    for one, other in zip(*gradients, strict=True):
        close(one, other)


def test_several_kinds_on_one_model(make, tmp_path):
    model, _ = make("mbart50")
    base = copy.deepcopy(model)
    wanted = {}
    for method in ("lora", "adapter", "prefix", "full", "ln"):
        pk.adapt(model, METHODS[method](), name=method)
        wanted[method] = logits(fill_ours(model))
    for method in wanted:
        pk.save_adapter(model, tmp_path, method)
        pk.load_adapter(base, tmp_path, method)
    for method, expected in wanted.items():
        close(logits(pk.use_adapter(base, method)), expected)


# -- merged checkpoints ---------------------------------------------------------------------------------------------


def heads(family):
    q = "q" if family in T5 else "q_proj"
    return {
        "lora": pk.LoRA(rank=2),
        "head": pk.LoRA(rank=2, targets=(q, "lm_head")),
        "embeddings": pk.LoRA(rank=2, targets=("embed_tokens", q)),
        "ia3": pk.IA3(),
        "ln": pk.LayerNormTuning(),
        "full": pk.FullFineTuning(),
        "cross": pk.CrossAttention(),
        "biases": pk.LoRA(rank=2, bias="lora_only"),
    }


@pytest.mark.parametrize("case", heads("t5"))
@pytest.mark.parametrize(
    "family",
    [
        *(
            name if name not in ("mbart50", "nllb", "mt5") else pytest.param(name, marks=pytest.mark.slow)
            for name in (*FAMILIES, "t5-tied", "mt5")
        )
    ],
)
def test_merged_folder_is_a_plain_checkpoint(make, tmp_path, family, case):
    model, tokenizer = make(family)
    plain = logits(model)
    fill_ours(pk.adapt(model, heads(family)[case], name="x"))
    adapted_logits = logits(model)
    assert (adapted_logits - plain).abs().max() > 1e-2
    out = tmp_path / "deep" / "merged"
    pk.save_merged(model, tokenizer, out)
    assert torch.equal(logits(model), adapted_logits) and model.petl.active == "x"
    loaded, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(model)
    scale = adapted_logits.abs().max()
    close(logits(loaded.eval()) / scale, adapted_logits / scale)
    if heads(family)[case].method != "full":  # those train the base itself
        pk.merge(model)
    assert torch.equal(logits(loaded), logits(model))
    text = "the big dog"
    assert transformers.AutoTokenizer.from_pretrained(out)(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert not any("petl" in path.read_text(errors="ignore") for path in out.glob("*.json"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["m2m100", "t5-tied", "marian"])
def test_a_merged_folder_in_another_dtype(make, tmp_path, family, dtype):
    model, tokenizer = make(family)
    fill_ours(pk.adapt(model, pk.LoRA(rank=2), name="x"))
    said = []
    pk.save_merged(model, tokenizer, tmp_path / "out", dtype, said.append)
    stored = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype} and checkpoint_dtype(tmp_path / "out") == dtype
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == dtype and loaded.config.dtype == dtype
    merged = dict(pk.merge(model).named_parameters())
    written = {name: merged[name] for name, _ in loaded.named_parameters()}
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, written[name].to(dtype).to(parameter.dtype)), name
    worst = max(((p.to(dtype).float() - p).norm() / p.norm()).item() for p in written.values() if p.norm())
    (line,) = said
    assert f"a relative error of at most {worst:.2g} in a weight" in line and "of what the adapter changes" in line
    assert not said.clear() and pk.save_merged(model, tokenizer, tmp_path / "same", torch.float32, said.append)
    assert said == []  # nothing is rounded


def test_a_weight_beyond_the_range_of_a_dtype_is_refused(make, tmp_path):
    model, tokenizer = make("m2m100")
    with torch.no_grad():
        model.model.encoder.layers[0].fc1.weight[0, 0] = 1e5
    with pytest.raises(InputError, match=r"layers.0.fc1.weight has a value of 1e\+05, expected at most 6.55e\+04"):
        pk.save_merged(model, tokenizer, tmp_path / "out", torch.float16)
    assert not (tmp_path / "out").exists()
    pk.save_merged(model, tokenizer, tmp_path / "out", torch.bfloat16)
    with pytest.raises(InputError, match="dtype torch.int8: expected a floating-point type"):
        pk.save_merged(model, tokenizer, tmp_path / "other", torch.int8)


def test_other_adapters_leave_no_trace_in_a_merged_folder(make, tmp_path):
    model, tokenizer = make("m2m100")
    for method in ("adapter", "prefix", "bitfit", "lora"):
        pk.adapt(model, METHODS[method](), name=method)
        fill_ours(model)
    expected = logits(model)
    pk.save_merged(model, tokenizer, tmp_path / "out")
    loaded, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    scale = expected.abs().max()
    close(logits(loaded.eval()) / scale, expected / scale)
    assert not any("petl" in path.read_text(errors="ignore") for path in (tmp_path / "out").glob("*.json"))


@pytest.mark.parametrize(("active", "passes_state"), [(True, True), (False, True), (False, False)])
def test_a_save_pretrained_of_a_subclass_writes_the_merged_model_alone(make, tmp_path, active, passes_state):
    model, tokenizer = make("m2m100")

    class Noted(type(model)):
        def save_pretrained(self, folder, **kwargs):
            super().save_pretrained(folder, **(kwargs if passes_state else {}))
            (Path(folder) / "note.txt").write_text("mine")

    fill_ours(pk.adapt(model, pk.LoRA(rank=2)))
    if not active:
        pk.use_adapter(model, None)
    model.__class__ = Noted
    expected = logits(model)
    pk.save_merged(model, tokenizer, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert (tmp_path / "out" / "note.txt").read_text() == "mine"
    loaded, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    close(logits(loaded.eval()), expected)
    model.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / "default").is_dir()


def test_plain_and_merged_models_are_saved_as_they_are(make, tmp_path):
    model, tokenizer = make("m2m100")
    plain = logits(model)
    pk.save_merged(model, tokenizer, tmp_path / "plain")
    fill_ours(pk.adapt(model, pk.LoRA(rank=2, targets=("lm_head",))))
    pk.merge(model)
    merged = logits(model)
    pk.save_merged(model, tokenizer, tmp_path / "merged")
    assert torch.equal(logits(model), merged)
    for name, expected in (("plain", plain), ("merged", merged)):
        loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name).eval()
        assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("method", ["adapter", "prefix"])
def test_what_cannot_be_merged_writes_nothing(make, tmp_path, method):
    model, tokenizer = make("m2m100")
    expected = logits(adapted(model, method))
    with pytest.raises(InputError, match="'default'"):
        pk.save_merged(model, tokenizer, tmp_path / "out")
    assert os.listdir(tmp_path) == [] and torch.equal(logits(model), expected)


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_quantized_weights_are_written_as_what_they_stand_for(make, tmp_path, storage):
    model, tokenizer = make("m2m100")
    quantize_model(pk.adapt(model, pk.LoRA(rank=2)), storage)
    torch.nn.init.normal_(model.model.encoder.layers[0].self_attn.q_proj.lora["default"].B, std=0.1)
    before = logits(model)
    pk.save_merged(model, tokenizer, tmp_path / "out")
    assert torch.equal(logits(model), before)
    pk.merge(model)
    plain, _ = load_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)
    assert plain.lm_head.weight is plain.model.shared.weight


def test_merged_output_must_be_new(make, tmp_path):
    model, tokenizer = make("m2m100")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").write_text("mine")
    for path in (tmp_path / "run", tmp_path / "run" / "notes"):
        with pytest.raises(InputError, match="not empty"):
            pk.save_merged(model, tokenizer, path)
    assert (tmp_path / "run" / "notes").read_text() == "mine"


# -- our format: what is refused ------------------------------------------------------------------------------------


def test_validation_copies_no_values(make):
    """Not even those that an inactive adapter has set aside."""
    from petl_kernels.interop import adapters

    model, _ = make("mbart50")
    for method in ("full", "bitfit", "prefix"):
        pk.adapt(model, METHODS[method](), name=method)
    shapes = adapters._without_values(model)
    records = [tensor for record in shapes.petl.adapters.values() for tensor in record.base.values()]
    assert len(records) > 50 and all(tensor.is_meta for tensor in [*shapes.parameters(), *shapes.buffers(), *records])
    assert shapes.lm_head.weight is shapes.model.shared.weight


@pytest.fixture
def saved(make, tmp_path):
    model, _ = make("m2m100")
    base = copy.deepcopy(model)
    pk.save_adapter(adapted(model, "adapter"), tmp_path)
    return base, tmp_path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 2}, ["format_version 2", "expected 1"]),
        ({"format_version": None}, ["format_version"]),
        ({"method": None}, ["method"]),
        ({"method": {"method": "adaptor"}}, ["'adaptor'", "adapter"]),
        ({"method": {"method": "adapter", "bottelneck": 3}}, ["'bottelneck'", "bottleneck"]),
        ({"method": {"method": "adapter", "bottleneck": "wide"}}, ["'wide'"]),
        ({"method": {"method": "adapter", "bottleneck": 4}}, ["adapter.", "shape"]),
        ({"method": {"method": "prefix"}}, ["prefix"]),
        ({"base_model": None}, ["base_model"]),
        ({"base_model": {"class": "MarianMTModel", "parameters": 1}}, ["MarianMTModel", "M2M100"]),
        ({"base_model": {"class": "M2M100ForConditionalGeneration", "parameters": 1}}, ["parameters", "1 "]),
    ],
)
def test_unfit_config(saved, changes, words):
    model, folder = saved
    path = folder / "petl_adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(model, folder, folder, *words)


def test_unfit_tensors(saved):
    model, folder = saved
    path = folder / "petl_adapter.safetensors"
    whole = path.read_bytes()
    tensors = safetensors.torch.load(whole)
    key = "model.decoder.layers.0.adapter.up.weight"
    assert key in tensors

    def write(content):
        safetensors.torch.save_file(content, path)

    write({k: v for k, v in tensors.items() if k != key})
    refused(model, folder, key, "missing")
    write(tensors | {"model.encoder.layers.7.adapter.up.weight": torch.zeros(1)})
    refused(model, folder, "layers.7")
    write(tensors | {key: torch.zeros(16, 4)})
    refused(model, folder, key, "(16, 4)", "(16, 3)")
    path.write_bytes(whole[:-1])
    refused(model, folder, path)
    path.unlink()
    refused(model, folder, path, "missing")


def test_two_formats_in_one_folder(saved):
    model, folder = saved
    lora = pk.adapt(copy.deepcopy(model), pk.LoRA(rank=2))
    with pytest.raises(InputError, match="petl_adapter.json"):
        pk.save_adapter(lora, folder)
    (folder / "adapter_config.json").write_text("{}")
    refused(model, folder, "two adapters")


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_full_disk(make, tmp_path, monkeypatch, method):
    """The old adapter stays; a new folder does not appear half-written."""
    model, tokenizer = make("m2m100")
    home = pk.save_adapter(adapted(model, method), tmp_path / "old")
    before = {path.name: path.read_bytes() for path in home.iterdir()}
    for parameter in pk.trainable_parameters(model):
        parameter.data.zero_()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    for folder in ("old", "new"):
        with pytest.raises(OSError, match="safetensors") as error:
            pk.save_adapter(model, tmp_path / folder)
        assert error.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["old"]
    assert {path.name: path.read_bytes() for path in home.iterdir()} == before
    if method == "lora":
        monkeypatch.setattr(type(model), "save_pretrained", full)
        expected = logits(model)
        with pytest.raises(OSError, match="merged"):
            pk.save_merged(model, tokenizer, tmp_path / "merged")
        assert os.listdir(tmp_path) == ["old"] and torch.equal(logits(model), expected)
