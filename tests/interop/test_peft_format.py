"""PEFT reads what we write and the other way round, with the same logits; what we cannot compute is refused."""

from __future__ import annotations

import copy
import json
import re
import warnings

import peft
import pytest
import torch

import petl_kernels as pk
from petl_kernels.errors import InputError

from .conftest import FAMILIES, T5, logits

pytestmark = [  # transformers' and PEFT's own
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

BART_NAMES, T5_NAMES = ("q_proj", "v_proj", "fc1"), ("q", "v", "wi_0")


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def fill(parameters, seed=1):
    """Random values in place of the start values, which would make most adapters do nothing."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw) + (parameter == 1))


def fill_ours(model):
    fill(pk.trainable_parameters(model))
    return model


def fill_theirs(model):
    fill([parameter for _, parameter in sorted(model.named_parameters()) if parameter.requires_grad])
    return model


def peft_from(model, folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def saved_by_peft(model, config, folder):
    model = fill_theirs(peft.get_peft_model(copy.deepcopy(model), config)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return model


def names(family):
    return T5_NAMES if family in T5 else BART_NAMES


def lora_cases(family):
    q, v, ffn = names(family)
    head = "lm_head"
    layers = r".*decoder\.(layers|block)\.\d+\..*"
    return {
        "default": {},
        "three": {"targets": (ffn, q, v), "rank": 3, "alpha": 5.0},
        "regex": {"targets": rf"{layers}\.({q}|{ffn})", "rank": 2},
        "all-linear": {"targets": "all-linear", "rank": 2},
        "patterns": {"targets": (q, v), "rank_pattern": {q: 5}, "alpha_pattern": {rf"{layers}{v}": 3.0}},
        "rslora": {"rank": 4, "alpha": 6.0, "rslora": True, "rank_pattern": {v: 2}},
        "head": {"targets": (q, head), "rank": 2},
        "embeddings": {"targets": ("embed_tokens",), "rank": 2},
        "biases": {"targets": (q, ffn), "bias": "lora_only"},
        "dora": {"targets": (q, v, ffn), "rank": 3, "alpha": 5.0, "dora": True},
    }


CASES = sorted(lora_cases("t5"))


QUICK_FAMILIES = [name if name in ("m2m100", "t5") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", QUICK_FAMILIES)
def test_peft_reads_our_lora(make, tmp_path, family, case):
    model, _ = make(family)
    plain = logits(model)
    base = copy.deepcopy(model)
    pk.adapt(model, pk.LoRA(**{"rank": 2} | lora_cases(family)[case]))
    ours = logits(fill_ours(model))
    assert (ours - plain).abs().max() > 1e-2
    pk.save_adapter(model, tmp_path)
    close(logits(peft_from(base, tmp_path)), ours)
    again = pk.load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(again), ours)


def peft_cases(family):
    q, v, ffn = names(family)
    stack = "block" if family in T5 else "layers"
    return {
        "list": {"target_modules": [q, v, ffn], "r": 3},
        "one of the names": {"target_modules": [v, "nothing"], "lora_dropout": 0.1},
        "regex": {"target_modules": rf".*\.{stack}\.0\..*\.({q}|{ffn})"},
        "all-linear": {"target_modules": "all-linear", "r": 2},
        "patterns": {"target_modules": [q, v], "rank_pattern": {q: 5}, "alpha_pattern": {rf".*\.0\..*{v}": 3}},
        "rslora": {"target_modules": [q, v], "use_rslora": True, "rank_pattern": {rf"encoder.*{v}": 2}},
        "excluded": {"target_modules": [q, v], "exclude_modules": rf".*encoder\.{stack}.*"},
        "layers": {"target_modules": [q, v], "layers_to_transform": [1], "layers_pattern": stack},
        "layer": {"target_modules": [q], "layers_to_transform": 1},
        "head": {"target_modules": [q, "lm_head"]},
        "embeddings": {"target_modules": ["embed_tokens"]},
        "biases": {"target_modules": [q, ffn], "bias": "lora_only"},
        "gaussian": {"target_modules": [q], "init_lora_weights": "gaussian"},
        "dora": {"target_modules": [q, v, ffn], "use_dora": True, "bias": "lora_only"},
    }


@pytest.mark.parametrize("case", sorted(peft_cases("t5")))
@pytest.mark.parametrize("family", QUICK_FAMILIES)
def test_we_read_lora_of_peft(make, tmp_path, family, case):
    model, _ = make(family, layers=2)
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", **{"r": 2, "lora_alpha": 3} | peft_cases(family)[case])
    theirs = logits(saved_by_peft(model, config, tmp_path))
    plain = logits(model)
    assert (theirs - plain).abs().max() > 1e-2
    pk.load_adapter(model, tmp_path)
    close(logits(model), theirs)
    pk.use_adapter(model, None)
    assert torch.equal(logits(model), plain)


def test_named_adapters_of_peft(make, tmp_path):
    model, _ = make("marian")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    theirs = fill_theirs(peft.get_peft_model(copy.deepcopy(model), config, adapter_name="en-de")).eval()
    theirs.save_pretrained(tmp_path)
    close(logits(pk.load_adapter(model, tmp_path)), logits(theirs))
    assert model.petl.active == "en-de"


@pytest.mark.parametrize("family", FAMILIES)
def test_ia3_both_ways(make, tmp_path, family):
    model, _ = make(family)
    base = copy.deepcopy(model)
    k, ffn = ("k", "wo") if family in T5 else ("k_proj", "fc2")
    config = peft.IA3Config(task_type="SEQ_2_SEQ_LM", target_modules=[k, ffn], feedforward_modules=[ffn])
    theirs = logits(saved_by_peft(base, config, tmp_path / "theirs"))
    close(logits(pk.load_adapter(copy.deepcopy(base), tmp_path / "theirs")), theirs)
    for i, ours in enumerate([pk.IA3(), pk.IA3(targets=(k,), feedforward=()), pk.IA3((k, ffn), (f"0.{ffn}",))]):
        if ours.feedforward == (f"0.{ffn}",) and family in T5:
            continue
        adapted = fill_ours(pk.adapt(copy.deepcopy(base), ours))
        pk.save_adapter(adapted, tmp_path / f"ours{i}")
        close(logits(peft_from(base, tmp_path / f"ours{i}")), logits(adapted))


def test_ia3_of_a_regular_expression(make, tmp_path):
    model, _ = make("m2m100")
    config = peft.IA3Config(target_modules=r".*\.(fc2|v_proj)", feedforward_modules=r".*decoder.*fc2")
    theirs = logits(saved_by_peft(model, config, tmp_path))
    close(logits(pk.load_adapter(model, tmp_path)), theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_norm_tuning_both_ways(make, tmp_path, family):
    model, _ = make(family)
    base = copy.deepcopy(model)
    norms = ["layer_norm"] if family in T5 else ["self_attn_layer_norm", "final_layer_norm"]
    config = peft.LNTuningConfig(task_type="SEQ_2_SEQ_LM", target_modules=norms)
    theirs = logits(saved_by_peft(base, config, tmp_path / "theirs"))
    close(logits(pk.load_adapter(model, tmp_path / "theirs")), theirs)
    adapted = fill_ours(pk.adapt(copy.deepcopy(base), pk.LayerNormTuning()))
    pk.save_adapter(adapted, tmp_path / "ours")
    close(logits(peft_from(base, tmp_path / "ours")), logits(adapted))


def test_files_are_what_peft_expects(make, tmp_path):
    model, _ = make("m2m100")
    pk.adapt(model, pk.LoRA(rank=2, alpha=8), name="en-sw")
    assert pk.save_adapter(model, tmp_path) == tmp_path / "en-sw"
    config = json.loads((tmp_path / "en-sw" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["task_type"] == "SEQ_2_SEQ_LM"
    assert config["target_modules"] == ["q_proj", "v_proj"] and config["r"] == 2
    assert config["lora_alpha"] == 8 and isinstance(config["lora_alpha"], int)
    known = {field for field in peft.LoraConfig.__dataclass_fields__}
    assert set(config) <= known
    from safetensors import safe_open

    with safe_open(tmp_path / "en-sw" / "adapter_model.safetensors", "pt") as file:
        keys = set(file.keys())
        key = "base_model.model.model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
        assert file.get_slice(key).get_shape() == [2, 16]
    assert len(keys) == 2 * 2 * 3 and not any("en-sw" in key for key in keys)


def test_same_adapter_same_bytes(make, tmp_path):
    files = []
    for i in range(2):
        model, _ = make("t5")
        pk.adapt(model, pk.LoRA(rank=2, targets=("v", "q", "wo") if i else ("wo", "v", "q")))
        home = pk.save_adapter(fill_ours(model), tmp_path / str(i))
        pk.save_adapter(model, tmp_path / str(i))  # over the old one
        files.append({path.name: path.read_bytes() for path in home.iterdir()})
    assert files[0] == files[1] and len(files[0]) == 2


def test_bf16_model_keeps_fp32_adapters(make, tmp_path):
    model, _ = make("m2m100")
    model.to(torch.bfloat16)
    base = copy.deepcopy(model)
    pk.save_adapter(fill_ours(pk.adapt(model, pk.LoRA(rank=2))), tmp_path)
    assert torch.equal(logits(pk.load_adapter(base, tmp_path)), logits(model))


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(make, tmp_path):
    model, _ = make("m2m100")
    base = copy.deepcopy(model)
    pk.save_adapter(fill_ours(pk.adapt(model, pk.LoRA(rank=2))), tmp_path)
    return base, tmp_path


def refused(model, folder, *words, name=None):
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modules = [(path, type(module)) for path, module in model.named_modules()]
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(InputError) as error:
        pk.load_adapter(model, folder, name)
    message = str(error.value)
    assert "\n" not in message and all(str(word) in message for word in words), message
    assert modules == [(path, type(module)) for path, module in model.named_modules()]
    assert gradients == [parameter.requires_grad for parameter in model.parameters()]
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_bdlora", {"nblocks": 2}),
        ("modules_to_save", ["lm_head"]),
        ("lora_bias", True),
        ("layer_replication", [[0, 1]]),
        ("trainable_token_indices", [1]),
        ("alora_invocation_tokens", [1]),
        ("init_lora_weights", "pissa_niter_4"),
        ("bias", "all"),
        ("target_modules", None),
        ("target_modules", ["qproj"]),
        ("target_modules", "("),
        ("target_modules", ["fc1"]),
        ("r", 3),
        ("r", "two"),
        ("r", 99),
        ("lora_alpha", "much"),
        ("rank_pattern", {"(": 2}),
        ("rank_pattern", {"q_proj": "two"}),
        ("alpha_pattern", [1]),
        ("exclude_modules", "("),
        ("peft_type", "VERA"),
        ("peft_type", None),
        ("exclude_modules", ["q_proj", "v_proj"]),
    ],
)
def test_unsupported_settings(saved, key, value):
    model, folder = saved
    change_config(folder, **{key: value})
    nameless = ("r", "target_modules", "rank_pattern", "exclude_modules")  # the value or the tensor is named
    words = [] if key in nameless else ["much"] if key == "lora_alpha" else [key]
    refused(model, folder, folder, *words)


@pytest.fixture
def tensors(saved):
    from safetensors.torch import load_file, save_file

    model, folder = saved
    path = folder / "adapter_model.safetensors"

    def write(edit):
        content = load_file(path)
        edit(content)
        save_file(content, path)
        return model, folder

    return write


KEY = "base_model.model.model.decoder.layers.0.encoder_attn.v_proj.lora_B.weight"


def test_missing_tensor(tensors):
    refused(*tensors(lambda content: content.pop(KEY)), "encoder_attn.v_proj.lora_B", "missing")


def test_surplus_tensor(tensors):
    surplus = KEY.replace("v_proj", "k_proj")
    refused(*tensors(lambda content: content.update({surplus: torch.zeros(1)})), "k_proj.lora_B")


def test_tensor_of_integers(tensors):
    integers = torch.zeros(16, 2, dtype=torch.int8)
    refused(*tensors(lambda content: content.update({KEY: integers})), "v_proj.lora_B", "int8")


def test_misshapen_tensor(tensors):
    model, folder = tensors(lambda content: content.update({KEY: torch.zeros(16, 3)}))
    refused(model, folder, "v_proj.lora_B", "(16, 3)", "(16, 2)")


@pytest.mark.parametrize(
    "key", [KEY.removeprefix("base_model."), KEY.replace("lora_B.weight", "lora_magnitude_vector"), "x"]
)
def test_foreign_keys(tensors, key):
    model, folder = tensors(lambda content: content.update({key: torch.zeros(16)}))
    refused(model, folder, key)


def test_base_weight_of_another_model(make, tmp_path):
    model, _ = make("t5")
    config = peft.LoraConfig(target_modules=["lm_head"], r=2)
    saved_by_peft(make("t5", seed=1)[0], config, tmp_path)
    refused(model, tmp_path, "lm_head.weight", "another base model")


def test_damaged_files(saved):
    model, folder = saved
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole = weights.read_bytes()
    for damaged in (whole[:-10], whole[:20], b"", b"not tensors at all"):
        weights.write_bytes(damaged)
        refused(model, folder, weights)
    weights.unlink()
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    refused(model, folder, weights, "missing", "pickle")
    for damaged in ("{", "[]", "\udcff"):
        config.write_bytes(damaged.encode("utf-8", "surrogateescape"))
        refused(model, folder, config)
    config.unlink()
    refused(model, folder, folder, "no adapter")
    refused(model, folder / "none", "none", "does not exist")


def test_another_model_of_the_same_family(make, saved):
    _, folder = saved
    refused(make("t5")[0], folder, "q_proj")
    deeper, _ = make("m2m100", layers=2)
    refused(deeper, folder, "layers.1", "missing")


def test_several_adapters_in_one_folder(make, tmp_path):
    model, _ = make("m2m100")
    base = copy.deepcopy(model)
    wanted = {}
    for name, rank in (("en-sw", 2), ("en-de", 3), ("default", 1)):
        pk.adapt(model, pk.LoRA(rank=rank, targets=("q_proj", "fc2")), name=name)
        wanted[name] = logits(fill_ours(model))
        if name != "default":
            pk.save_adapter(model, tmp_path, name)
    refused(base, tmp_path, "en-de", "en-sw", "say which")
    refused(base, tmp_path, "en-de", "en-sw", "en-fr", name="en-fr")
    pk.save_adapter(model, tmp_path)
    for name in wanted:
        pk.load_adapter(base, tmp_path, name)
    for name, expected in wanted.items():
        assert torch.equal(logits(pk.use_adapter(base, name)), expected)
    refused(base, tmp_path, "en-sw", "already", name="en-sw")
    one = pk.load_adapter(make("m2m100")[0], tmp_path / "en-de", "mine")
    assert torch.equal(logits(one), wanted["en-de"]) and set(one.petl.adapters) == {"mine"}
    with pytest.raises(InputError, match="nobody"):
        pk.save_adapter(model, tmp_path, "nobody")
    with pytest.raises(InputError, match=re.escape("no adapter is active: the model has no adapter")):
        pk.save_adapter(make("m2m100")[0], tmp_path)
