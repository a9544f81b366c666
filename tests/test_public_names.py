"""Names that users have imported: they stay, wherever what they name stands."""

import importlib

import pytest

NAMES = {
    "petl_kernels": (
        "Adapter BitFit CrossAttention FullFineTuning IA3 InputError LayerNormTuning LoRA Plan PrefixTuning SSF adapt "
        "lean linear_cross_entropy load_adapter merge nn ops pack parity plan report save_adapter save_merged "
        "trainable_parameters unmerge use_adapter"
    ),
    "petl_kernels.ops": (
        "OPS QuantisedTensor activation attention available_backends backend_of bottleneck_adapter dropout_add "
        "dropout_add_norm frozen_ffn frozen_linear gated_activation layer_norm layer_norm_from_statistics "
        "layer_norm_with_statistics linear_cross_entropy lora_linear lora_linear_grouped parallel_ffn quantise "
        "quantised_embedding lora_norm rms_norm rms_norm_from_statistics rms_norm_with_statistics use"
    ),
    "petl_kernels.nn": "BottleneckAdapter FrozenLinear GroupedLoRALinear LinearCrossEntropy LoRALinear",
    "petl_kernels.methods": (
        "IA3 METHODS Adapter BitFit CrossAttention FullFineTuning LayerNormTuning LoRA Method PrefixTuning Variant "
        "adapter_state budget_parameters describe from_dict load_adapter_state parse_budget total_parameters"
    ),
    "petl_kernels.interop": "load_adapter save_adapter save_merged",
    "petl_kernels.interop.hf": "load_pretrained load_skeleton load_weights",
    "petl_kernels.interop.languages": "LanguagePair",
    "petl_kernels.interop.quantize_checkpoint": "quantize_checkpoint",
    "petl_kernels.api": "adapt lean merge report trainable_parameters unmerge use_adapter Report",
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in NAMES for name in NAMES[module].split()])
def test_is_importable(module, name):
    assert getattr(importlib.import_module(module), name) is not None


def test_a_name_that_is_not_there_is_refused():
    for name in ("Lora", "memory"):
        with pytest.raises(AttributeError, match=f"no attribute {name!r}"):
            getattr(importlib.import_module("petl_kernels"), name)
