"""Every setting of PEFT's configs, with a value that is not its default: PEFT's outputs in float64, or a refusal that
names it."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil

import peft
import pytest
import torch

import petl_kernels as pk
from petl_kernels import InputError

from .conftest import batch, make_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
REFUSED = object()
Q = "model.encoder.layers.0.self_attn.q_proj"
WITHOUT_EFFECT = {
    "task_type": "SEQ_2_SEQ_LM",
    "auto_mapping": {"base_model_class": "M2M100ForConditionalGeneration", "parent_library": "x"},
    "peft_version": "0.20.0",
    "base_model_name_or_path": "somewhere",
    "revision": "main",
    "inference_mode": True,
}
TARGETS = {"target_modules": ["q_proj", "fc2", "lm_head"], "exclude_modules": ["encoder_attn.q_proj"]}
REGEX = {"target_modules": r".*\.(q_proj|fc2)", "exclude_modules": r".*decoder.*"}
LORA = {
    "r": [{"r": 3}, {"r": 16}, (REFUSED, {"r": 99})],
    "target_modules": [TARGETS, REGEX, {"target_modules": "all-linear"}, {"target_modules": [Q, "nothing"]}],
    "exclude_modules": [{"target_modules": "all-linear", "exclude_modules": ["fc1", Q]}],
    "lora_alpha": [{"lora_alpha": 3}, {"lora_alpha": 0.5}, (REFUSED, {"lora_alpha": 0}), (REFUSED, {"lora_alpha": -2})],
    "lora_dropout": [{"lora_dropout": 0.1}, {"lora_dropout": 1.0}],
    "bias": [{"bias": "lora_only"}, (REFUSED, {"bias": "all"})],
    "use_rslora": [{"use_rslora": True, "rank_pattern": {"v_proj": 4}}],
    "init_lora_weights": [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"init_lora_weights": "orthogonal"},
        *((REFUSED, {"init_lora_weights": start}) for start in ("pissa", "OLoRA", "corda", "loftq", "lora_ga", "mica")),
    ],
    "layers_to_transform": [
        {"layers_to_transform": [0]},
        {"layers_to_transform": 1},
        {"target_modules": [Q, "v_proj", "lm_head"], "layers_to_transform": [1]},
    ],
    "layers_pattern": [
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"layers_to_transform": [1], "layers_pattern": ["blocks", "encoder.layers"]},
        (REFUSED, {"layers_pattern": "layers"}),
    ],
    "rank_pattern": [
        {"rank_pattern": {"^" + Q: 5, r"decoder.*v_proj": 1}},
        (REFUSED, {"rank_pattern": {"v_proj": 99}}),
    ],
    "alpha_pattern": [
        {"alpha_pattern": {"q_proj": 5, Q: 9, r"layers\.1\..*": 0.5}},
        (REFUSED, {"alpha_pattern": {"q_proj": 0}}),
    ],
    "loftq_config": [{"loftq_config": {"loftq_bits": 4}}],
    "eva_config": [{"eva_config": {"rho": 1.5}}],
    "corda_config": [{"corda_config": {"corda_method": "kpm"}}],
    "lora_ga_config": [{"lora_ga_config": {"direction": "ArBr"}}],
    "megatron_core": [{"megatron_core": "somewhere"}],
    "qalora_group_size": [{"qalora_group_size": 4}],
    "runtime_config": [(REFUSED, {"runtime_config": {"ephemeral_gpu_offload": True}})],  # PEFT writes none
    "fan_in_fan_out": [{"fan_in_fan_out": True, "target_modules": ["q_proj", "encoder.embed_tokens"]}],
    "modules_to_save": [(REFUSED, {"modules_to_save": ["lm_head"]})],
    "megatron_config": [(REFUSED, {"megatron_config": {"x": 1}})],
    "trainable_token_indices": [(REFUSED, {"trainable_token_indices": [1]})],
    "use_dora": [
        {"use_dora": True, "target_modules": ["q_proj", "fc2"], "bias": "lora_only"},
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 4}},
        (REFUSED, {"lora_dropout": 0.1, "use_dora": True}),
    ],
    "velora_config": [(REFUSED, {"velora_config": {"num_groups": 2}})],
    "alora_invocation_tokens": [(REFUSED, {"alora_invocation_tokens": [5]})],
    "use_qalora": [(REFUSED, {"use_qalora": True})],
    "monteclora_config": [(REFUSED, {"monteclora_config": {"num_samples": 2}})],
    "layer_replication": [(REFUSED, {"layer_replication": [[0, 1]]})],
    "lora_bias": [(REFUSED, {"lora_bias": True})],
    "target_parameters": [(REFUSED, {"target_parameters": ["fc1.weight"]})],
    "use_bdlora": [(REFUSED, {"use_bdlora": {"nblocks": 2}})],
    "arrow_config": [(REFUSED, {"arrow_config": {"top_k": 2}})],
    "kasa_config": [(REFUSED, {"kasa_config": {"beta": 0.1}})],
    "ensure_weight_tying": [(REFUSED, {"ensure_weight_tying": True})],
}
IA3 = {
    "target_modules": [{**TARGETS, "feedforward_modules": ["fc2"]}, {**REGEX, "feedforward_modules": r".*\.fc2"}],
    "exclude_modules": [{"exclude_modules": [Q]}],
    "feedforward_modules": [{"target_modules": ["k_proj", "fc2"], "feedforward_modules": ["fc2"]}],
    "init_ia3_weights": [{"init_ia3_weights": False}],
    "fan_in_fan_out": [{"fan_in_fan_out": True}],
    "modules_to_save": [(REFUSED, {"modules_to_save": ["lm_head"]})],
}
NORMS = {"target_modules": ["final_layer_norm", "self_attn_layer_norm"]}
LN = {
    "target_modules": [NORMS, {"target_modules": r".*encoder.*_norm"}],
    "exclude_modules": [{**NORMS, "exclude_modules": r".*encoder.*"}],
    "modules_to_save": [(REFUSED, {**NORMS, "modules_to_save": ["lm_head"]})],
}
KINDS = {
    "LORA": (peft.LoraConfig, {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]}, LORA),
    "IA3": (peft.IA3Config, {"target_modules": ["q_proj", "v_proj"], "feedforward_modules": []}, IA3),
    "LN_TUNING": (peft.LNTuningConfig, NORMS, LN),
}
# PEFT makes the adapter without these, and they are written into its file: they need a library, data or a card to start
STARTS = (
    "fan_in_fan_out",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
)


def exact(model, theirs):
    torch.testing.assert_close(outputs(model), theirs, rtol=1e-10, atol=1e-10)


def outputs(model):
    with torch.no_grad():
        return model(**batch(model)).logits


def saved_by_peft(model, kind, settings, folder):
    """PEFT's outputs, with random values for the adapter, and its file. Settings that PEFT makes nothing of are written
    into the file alone."""
    config_class, defaults, _ = KINDS[kind]
    made = {key: value for key, value in settings.items() if key not in (*STARTS, *WITHOUT_EFFECT)}
    adapted = peft.get_peft_model(copy.deepcopy(model), config_class(**{**defaults, **made})).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(adapted.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw) + (parameter == 1))
    adapted.save_pretrained(folder)
    edit(folder, {key: value for key, value in settings.items() if key not in made})
    return outputs(adapted)


def edit(folder, settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.fixture(scope="module")
def model():
    return make_model("m2m100", 40, layers=2).double()


@pytest.fixture(scope="module")
def usual(model, tmp_path_factory):
    """kind -> (a folder, PEFT's outputs) of its adapter with the usual settings."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    return {kind: (folder, saved_by_peft(model, kind, {}, folder)) for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_has_every_setting(kind):
    config_class, _, table = KINDS[kind]
    fields = {field.name for field in dataclasses.fields(config_class)} - {"peft_type"}
    assert fields == {*table, *WITHOUT_EFFECT}


CASES = [(kind, case) for kind, (*_, table) in KINDS.items() for cases in table.values() for case in cases]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "case"), CASES)
def test_a_setting_is_exact_or_refused(model, usual, kind, case, tmp_path):
    if isinstance(case, tuple):
        settings = case[1]
        shutil.copytree(usual[kind][0], tmp_path, dirs_exist_ok=True)
        edit(tmp_path, settings)
        key = [key for key in settings if key != "target_modules"][0]
        before = outputs(model)
        with pytest.raises(InputError) as error:
            pk.load_adapter(model, tmp_path)
        message = str(error.value)
        assert "\n" not in message and key in message and str(settings[key]) in message
        assert torch.equal(outputs(model), before)
        return
    saved_by_peft(model, kind, case, tmp_path)
    # as PEFT reads it: it sorts the patterns of a file, the first of which counts
    theirs = outputs(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval())
    assert (theirs - outputs(model)).abs().max() > 1e-3
    exact(pk.load_adapter(copy.deepcopy(model), tmp_path), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_without_effect_and_unknown_ones(model, usual, kind, tmp_path):
    folder, theirs = usual[kind]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    edit(tmp_path, {**WITHOUT_EFFECT, "a_newer_one": None, "another": False})  # what is off does nothing
    exact(pk.load_adapter(copy.deepcopy(model), tmp_path), theirs)
    edit(tmp_path, {"a_newer_one": 3.0, "peft_version": "9.9"})
    with pytest.raises(InputError, match=r"a_newer_one = 3.0 is a setting that .* not known to have, .* PEFT 9.9"):
        pk.load_adapter(model, tmp_path)


def test_other_spellings_and_kinds(model, tmp_path):
    theirs = saved_by_peft(model, "LORA", {"target_modules": "all-linear"}, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for spelling in ("all-linear", "ALL-LINEAR"):
        edit(tmp_path, {"target_modules": spelling})
        exact(pk.load_adapter(copy.deepcopy(model), tmp_path), theirs)
    refused = {
        "layers_to_transform": [1],  # PEFT itself refuses it beside a string
        "lora_alpha": "16",
        "lora_dropout": [0.1],
        "peft_type": "PREFIX_TUNING",
    }
    for key, value in refused.items():
        edit(tmp_path, {**config, "target_modules": "all-linear", key: value})
        with pytest.raises(InputError, match=key):
            pk.load_adapter(model, tmp_path)


def test_the_order_of_our_patterns_is_kept(model, tmp_path):
    patterns = {"v_proj": 5.0, r"encoder.*": 9.0, Q: 0.5}
    ours = pk.adapt(copy.deepcopy(model), pk.LoRA(rank=2, alpha=3.0, alpha_pattern=patterns))
    with torch.no_grad():
        [torch.nn.init.normal_(parameter) for parameter in pk.trainable_parameters(ours)]
    pk.save_adapter(ours, tmp_path)
    exact(pk.load_adapter(copy.deepcopy(model), tmp_path), outputs(ours))
    exact(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval(), outputs(ours))


def test_tables_that_peft_saves_too(model, usual, tmp_path):
    """It does where their rows are no longer the checkpoint's: the same values are nothing new, others are refused."""
    folder, want = usual["LORA"]
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    exact(pk.load_adapter(copy.deepcopy(model), tmp_path), want)
    with pytest.raises(InputError, match="base weight .* another base model"):
        pk.load_adapter(make_model("m2m100", 40, layers=2, seed=1).double(), tmp_path)
