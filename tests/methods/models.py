"""Small models of each family, from configs: 2 + 2 layers, d = 32, 99 words."""

from __future__ import annotations

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedModel,
    SeamlessM4TConfig,
    SeamlessM4TForTextToText,
    T5Config,
    T5ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

FAMILIES = ("m2m100", "mbart", "marian", "t5")
RELATIVES = ("bart", "mt5", "umt5", "seamless", "t5gemma")  # of the same structure in other classes
_BART = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "init_std": 0.15,
    "scale_embedding": True,
}
_GEMMA = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "query_pre_attn_scalar": 12,
    "sliding_window": 3,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 5.0,
    "initializer_range": 0.15,
}


def build(family: str, attention: str = "sdpa", **settings):
    """A seeded model in eval mode."""
    torch.manual_seed(7)
    if family == "m2m100":
        model = M2M100ForConditionalGeneration(
            M2M100Config(**{**_BART, **settings}, pad_token_id=1, attn_implementation=attention)
        )
    elif family == "mbart":
        model = MBartForConditionalGeneration(
            MBartConfig(**{**_BART, **settings}, pad_token_id=1, attn_implementation=attention)
        )
    elif family == "marian":
        model = MarianMTModel(
            MarianConfig(
                **{**_BART, **settings},
                pad_token_id=98,
                eos_token_id=0,
                decoder_start_token_id=98,
                activation_function="swish",
                attn_implementation=attention,
            )
        )
    elif family == "bart":
        model = BartForConditionalGeneration(
            BartConfig(**{**_BART, **settings}, pad_token_id=1, attn_implementation=attention)
        )
    elif family == "seamless":
        names = {"d_model": "hidden_size", "init_std": "initializer_range"}
        given = {names.get(name, name): value for name, value in {**_BART, **settings}.items()}
        model = SeamlessM4TForTextToText(
            SeamlessM4TConfig(**given, pad_token_id=1, activation_dropout=0.0, attn_implementation=attention)
        )
    elif family == "t5gemma":  # always with its eager attention; the first layer of a side has a window of three tokens
        stack = {**_GEMMA, **settings}
        rates = {name: stack.pop(name) for name in ("dropout_rate", "attention_dropout") if name in stack}
        model = T5GemmaForConditionalGeneration(
            T5GemmaConfig(encoder=dict(stack), decoder=dict(stack), vocab_size=stack["vocab_size"], **rates)
        )
    else:
        config_class, model_class = {
            "t5": (T5Config, T5ForConditionalGeneration),
            "mt5": (MT5Config, MT5ForConditionalGeneration),
            "umt5": (UMT5Config, UMT5ForConditionalGeneration),
        }[family]
        config = config_class(
            vocab_size=99,
            d_model=32,
            d_kv=12,
            d_ff=56,
            num_layers=2,
            num_heads=3,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            attn_implementation=attention,
            **{"feed_forward_proj": "gated-gelu", **settings},
        )
        model = model_class(config)
        torch.nn.init.normal_(model.shared.weight, std=0.3)
    with torch.no_grad():  # biases and norms away from 0 and 1, so that mistakes with them show
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def set_attention(model, name: str) -> None:
    """Sets it in all parts: transformers 5.17 leaves out T5's encoder and decoder, whose configs are copies."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.set_attn_implementation(name)


def batch(model, rows: int = 3) -> dict[str, torch.Tensor]:
    """Source with padding, and a target; token 2 stands for the language and the end."""
    torch.manual_seed(11)
    pad = model.config.pad_token_id
    source = torch.randint(3, 97, (rows, 7))
    mask = torch.ones_like(source)
    mask[1, 4:] = 0
    source[mask == 0] = pad
    return {"input_ids": source, "attention_mask": mask, "decoder_input_ids": torch.randint(3, 97, (rows, 5))}


def logits(model, inputs=None) -> torch.Tensor:
    with torch.no_grad():
        return model(**(inputs or batch(model)), use_cache=False).logits


def train_a_little(model, steps: int = 2, rate: float = 0.05) -> None:
    """Steps that move every trained parameter."""
    inputs = batch(model)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(**inputs, use_cache=False).logits
        torch.nn.functional.cross_entropy(out.flatten(0, 1), inputs["decoder_input_ids"].flatten()).backward()
        optimizer.step()
    model.eval()
