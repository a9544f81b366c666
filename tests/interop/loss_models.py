"""Small models of every class whose loss is known, and the batches that they read."""

from __future__ import annotations

import torch
import transformers
from layers.lean_cases import exact_rms_norms
from torch import Tensor, nn

WORDS = 97
_BART = {
    "vocab_size": WORDS,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "init_std": 0.2,
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
    "num_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "initializer_factor": 2.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_LONG = {"max_encoder_position_embeddings": 32, "max_decoder_position_embeddings": 32, "attention_window": [4]}
_SETTINGS = {
    "LED": {**_BART, **_LONG},
    "BigBirdPegasus": {**_BART, "attention_type": "original_full"},
    "PegasusX": {**_BART, "stagger_local_blocks": False, "block_size": 8, "num_global_tokens": 2},
    "LongT5": {**_T5, "local_radius": 5},
    "NllbMoe": {
        **_BART,
        "num_experts": 4,
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 1,
        "expert_capacity": 64,
        "router_jitter_noise": 0.0,
        "moe_token_dropout": 0.0,
        "output_router_logits": True,
    },
    **{family: _T5 for family in ("T5", "MT5", "UMT5")},
}


def tiny(name: str, cls: type | None = None) -> nn.Module:
    """A model of the class ``name`` of transformers, or of ``cls``, a subclass of it, in float64; seeded."""
    family = name.removesuffix("ForConditionalGeneration").removesuffix("MTModel")
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**_SETTINGS.get(family, _BART))
    model = (cls or getattr(transformers, name))(config).double()
    with torch.no_grad():  # biases and norms away from 0 and 1, so that mistakes with them show
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and (tensor.dim() == 1 or tensor.shape[0] == 1):
                tensor.add_(0.1 * torch.randn_like(tensor))
    exact_rms_norms(model)
    return model.train()


def labelled(rows: int = 2) -> dict[str, Tensor]:
    """Sources with padding and labels that are ignored in part."""
    generator = torch.Generator().manual_seed(5)
    source = torch.randint(3, WORDS, (rows, 6), generator=generator)
    labels = torch.randint(3, WORDS, (rows, 4), generator=generator)
    mask = torch.ones_like(source)
    mask[1, 4:] = 0
    labels[1, 2:] = -100
    return {"input_ids": source, "attention_mask": mask, "labels": labels}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Where one has none, the other's is zero; 1e-9 of the largest are allowed."""
    largest = max(value.abs().max() for value in expected.values())
    for name in found.keys() | expected.keys():
        one, other = found.get(name), expected.get(name)
        zero = torch.zeros_like(one if other is None else other)
        one, other = zero if one is None else one, zero if other is None else other
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9 * largest, msg=name)
