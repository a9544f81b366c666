"""Small models of every sequence-to-sequence class of transformers, and inputs, or why there is none of a class."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from .lean_cases import exact_rms_norms

WORDS, ROWS, SOURCE, TARGET = 61, 3, 8, 5
MAPPINGS = ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES")

_NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
_BART = {
    **_NO_DROPOUT,
    "vocab_size": WORDS,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_T5 = {
    "vocab_size": WORDS,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
_ROUTED = {"num_experts": 2, "expert_capacity": 64, "router_z_loss_coef": 0.1, "router_aux_loss_coef": 0.1}
_SEAMLESS = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "encoder_layers": 1,
    "encoder_ffn_dim": 24,
    "encoder_attention_heads": 2,
    "decoder_layers": 1,
    "decoder_ffn_dim": 24,
    "decoder_attention_heads": 2,
    "speech_encoder_layers": 1,
    "speech_encoder_attention_heads": 2,
    "speech_encoder_intermediate_size": 16,
    "max_position_embeddings": 32,
    "t2u_encoder_layers": 1,
    "t2u_decoder_layers": 1,
    "num_adapter_layers": 1,
    "pad_token_id": 0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    **_NO_DROPOUT,
}
_SOUND = {**_BART, "num_mel_bins": 8, "input_feat_per_channel": 8, "max_target_positions": 32, "conv_channels": 16}
_STACK = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}

# model type -> settings of a small configuration
SETTINGS = {
    "bart": _BART,
    "bigbird_pegasus": {**_BART, "attention_type": "original_full"},
    "blenderbot": _BART,
    "blenderbot-small": _BART,
    "fsmt": {**_BART, "langs": ["en", "de"], "src_vocab_size": WORDS, "tgt_vocab_size": WORDS},
    "led": {**_BART, "max_encoder_position_embeddings": 32, "max_decoder_position_embeddings": 32}
    | {"attention_window": [4]},
    "longt5": {**_T5, "local_radius": 3},
    "m2m_100": _BART,
    "marian": {**_BART, "decoder_start_token_id": 1},
    "mbart": _BART,
    "mt5": _T5,
    "mvp": _BART,
    "nllb-moe": {**_BART, **_ROUTED, "router_jitter_noise": 0.0, "moe_eval_capacity_token_fraction": -1.0}
    | {"moe_token_dropout": 0.0}
    | {"encoder_sparse_step": 1, "decoder_sparse_step": 1, "output_router_logits": True},
    "pegasus": _BART,
    "pegasus_x": {**_BART, "stagger_local_blocks": False, "block_size": 4, "num_global_tokens": 2},
    "plbart": _BART,
    "prophetnet": {
        **{key: value for key, value in _BART.items() if "layer" not in key and "heads" not in key},
        **{"hidden_size": 16, "num_encoder_layers": 1, "num_decoder_layers": 1, "disable_ngram_loss": False},
        **{"num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2},
    },
    "seamless_m4t": _SEAMLESS,
    "seamless_m4t_v2": _SEAMLESS,
    "speech_to_text": {**_SOUND, "max_source_positions": 64, "num_conv_layers": 2, "conv_kernel_sizes": (3, 3)},
    "switch_transformers": {**_T5, **_ROUTED, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    | {"router_jitter_noise": 0.0},
    "t5": {**_T5, "feed_forward_proj": "gated-gelu"},
    "t5gemma": {"encoder": _STACK, "decoder": {**_STACK, "cross_attention_hidden_size": 16}, "vocab_size": WORDS},
    "t5gemma2": {
        "encoder": {
            "text_config": _STACK,
            "vision_config": {
                **{"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
                **{"image_size": 8, "patch_size": 4},
            },
            "mm_tokens_per_image": 4,
            **{f"{name}_index": WORDS - 1 - i for i, name in enumerate(("image_token", "boi_token", "eoi_token"))},
        },
        "decoder": _STACK,
        **{"image_token_index": WORDS - 1, "eoi_token_index": WORDS - 3},
    },
    "umt5": _T5,
    "whisper": {**_SOUND, "max_source_positions": SOURCE},
}  # fmt: skip

SINGLE = {"fsmt", "prophetnet"}  # their masks are in fp32

# Classes without a model here, and why. ``pk.lean`` finds no layers in them, as in a decoder alone.
_SPEECH = "an encoder of sound, and no encoder-decoder of text"
UNTRIED = {
    "encoder-decoder": "any two models: tried by name in test_other_models",
    "speech-encoder-decoder": _SPEECH,
    "pop2piano": "music: T5's layers under another name, which stay as they are",
    "speecht5": _SPEECH,
    **dict.fromkeys(
        (
            "audioflamingo3", "canary", "cohere_asr", "dia", "fun_asr_nano", "glmasr", "granite_speech",
            "granite_speech_plus", "kyutai_speech_to_text", "moonshine", "moonshine_streaming",
            "moss_transcribe_diarize", "musicflamingo", "nemo_speechlm", "omniasr", "qwen2_audio", "qwen3_asr",
            "vibevoice", "vibevoice_asr", "voxtral", "voxtral_realtime",
        ),
        _SPEECH,
    ),
}  # fmt: skip


def classes() -> dict[str, str]:
    """Returns model type -> name of its class, for every sequence-to-sequence model of the installed transformers."""
    found: dict[str, str] = {}
    for mapping in MAPPINGS:
        for model_type, name in getattr(modeling_auto, mapping).items():
            found.setdefault(model_type, name)
    return found


def build(model_type: str, cls: type | None = None) -> nn.Module:
    """Returns a seeded model, of the subclass ``cls`` where it is given, in float64 where it can be.

    No parameter of it is 0 or 1.
    """
    config = transformers.AutoConfig.for_model(model_type, **SETTINGS[model_type])
    torch.manual_seed(3)
    model = (cls or getattr(transformers, classes()[model_type]))(config)
    if model_type not in SINGLE:
        model.double()
    shake(model)
    return model.train()


def shake(model: nn.Module) -> None:
    exact_rms_norms(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns source and labels with padding; sound in the place of the source for models of speech."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(3, WORDS, (ROWS, TARGET), generator=generator)
    labels[1, -2:] = -100
    if model.main_input_name == "input_features":
        frames = 2 * SOURCE
        sound = torch.randn(ROWS, 8, frames, generator=generator, dtype=torch.float64)
        if model.config.model_type == "speech_to_text":
            sound = sound.mT
        return {"input_features": sound, "labels": labels}
    source = torch.randint(3, WORDS, (ROWS, SOURCE), generator=generator)
    mask = torch.ones_like(source)
    mask[1, -3:] = 0
    if model.config.model_type == "fsmt":  # it makes decoder inputs of the source
        return {"input_ids": source, "attention_mask": mask, "labels": labels, "decoder_input_ids": labels.clamp(min=3)}
    return {"input_ids": source, "attention_mask": mask, "labels": labels}
