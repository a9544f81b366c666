"""Lean encoder and decoder layers of the BART family: M2M-100, NLLB, mBART, BART, Marian, Pegasus.

pre-norm:   h = x + drop(attn(LN(x)))           post-norm:  h = LN(x + drop(attn(x)))
            y = h + drop(ffn(LN(h)))                        y = LN(h + drop(ffn(h)))

with a cross-attention between them in the decoder. The classes are mixed in before the layer's own class.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from petl_kernels.layers.blocks import (
    AttentionBlock,
    FeedForwardBlock,
    attention_block,
    feed_forward_block,
    shared_for_products,
)
from petl_kernels.layers.recompute import context
from petl_kernels.transformers_names import ACTIVATIONS, BART_ATTENTION, BART_LAYER, lacking


class LeanBartLayer:
    """Before a layer class of the family. ``petl_tier`` and ``petl_pre_norm`` are set when it is mixed in."""

    petl_tier: int
    petl_pre_norm: bool

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        if self.steps_aside(kwargs):
            if not hasattr(self, "encoder_attn"):
                return super().forward(hidden_states, attention_mask, **kwargs)
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                **kwargs,
            )
        source = shared_for_products(encoder_hidden_states)
        return self.run(hidden_states, attention_mask, source, encoder_attention_mask)

    def body(self, x: Tensor, mask: Tensor | None, source: Tensor | None, source_mask: Tensor | None, tier: int):
        with context(tier > 0):
            x = attention_block(self._attention("self_attn"), x, None, mask, None, tier)
            if source is not None and hasattr(self, "encoder_attn"):
                x = attention_block(self._attention("encoder_attn"), x, source, source_mask, None, tier)
            x = feed_forward_block(self._feed_forward(), x, tier)
            return x if hasattr(self, "encoder_attn") else _finite(x)

    def _attention(self, name: str) -> AttentionBlock:
        attention = getattr(self, name)
        return AttentionBlock(
            host=attention,
            q=attention.q_proj,
            k=attention.k_proj,
            v=attention.v_proj,
            out=attention.out_proj,
            norm=getattr(self, f"{name}_layer_norm"),
            heads=attention.num_heads,
            scale=attention.scaling,
            causal=bool(attention.is_causal),
            dropout=attention.dropout if self.training else 0.0,
            residual_dropout=self.dropout if self.training else 0.0,
            pre_norm=self.petl_pre_norm,
        )

    def _feed_forward(self) -> FeedForwardBlock:
        return FeedForwardBlock(
            inputs=(self.fc1,),
            out=self.fc2,
            norm=self.final_layer_norm,
            activation=ACTIVATIONS[type(self.activation_fn).__name__],
            dropout=self.activation_dropout if self.training else 0.0,
            residual_dropout=self.dropout if self.training else 0.0,
            pre_norm=self.petl_pre_norm,
            wide=self.petl_wide,
        )

    @staticmethod
    def uncovered(layer: nn.Module) -> str:
        """Why a layer cannot be lean; empty when it can."""
        reason = lacking(layer, BART_LAYER) or lacking(layer.self_attn, BART_ATTENTION)
        if not reason and type(layer.activation_fn).__name__ not in ACTIVATIONS:
            return f"activation {type(layer.activation_fn).__name__}"
        return reason


def _finite(x: Tensor) -> Tensor:
    """As the family's encoders do in fp16."""
    if x.dtype != torch.float16:
        return x
    limit = torch.finfo(x.dtype).max - 1000
    return x.clamp(-limit, limit)
