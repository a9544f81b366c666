"""Encoder and decoder layers of the BART family: M2M-100, NLLB, mBART, BART, Marian, Pegasus.

    pre-norm:   h = x + drop(attn(LN(x)))           post-norm:  h = LN(x + drop(attn(x)))
                y = h + drop(ffn(LN(h)))                        y = LN(h + drop(ffn(h)))

A decoder layer has a cross-attention between the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from petl_kernels.layers.blocks import AttentionBlock, FeedForwardBlock
from petl_kernels.layers.families.family import Family
from petl_kernels.layers.source import shared_for_products
from petl_kernels.models.transformers_names import (
    ACTIVATIONS,
    BART_ATTENTION,
    BART_LAYER,
    BART_NAMES,
    activation_name,
    lacking,
    of,
)

ATTENTIONS, NORMS = of(BART_NAMES, "Attention"), frozenset(["LayerNorm"])


class LeanBartLayer(Family):
    """Mixed in before a layer class of the family."""

    self_attn: Any
    fc1: nn.Module
    fc2: nn.Module
    final_layer_norm: nn.Module
    activation_fn: nn.Module
    activation_dropout: float
    dropout: float

    known = of(BART_NAMES, "EncoderLayer", "DecoderLayer")

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        if self.steps_aside(kwargs):
            self.refuse_packed(attention_mask, kwargs)
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
        return self.run(kwargs, hidden_states, attention_mask, None, source, encoder_attention_mask)

    def blocks(self, crosses: bool) -> tuple[list[AttentionBlock], FeedForwardBlock]:
        """Returns the layer's blocks in their order; crosses: with the cross-attention, where the layer has one."""
        attentions = [self._attention("self_attn")]
        if crosses and hasattr(self, "encoder_attn"):
            attentions.append(self._attention("encoder_attn"))
        return attentions, self._feed_forward()

    def after_block(self, x: Tensor) -> Tensor:
        return x

    def finished(self, x: Tensor) -> Tensor:
        """Returns the layer's output; the family's encoders clamp it in fp16."""
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
            dropout=attention.dropout if attention.training else 0.0,
            residual_dropout=self.dropout if self.training else 0.0,
            pre_norm=self.petl_lean.pre_norm,
            adds_bias=False,
            borders=self.petl_lean.borders,
        )

    def _feed_forward(self) -> FeedForwardBlock:
        return FeedForwardBlock(
            inputs=(self.fc1,),
            out=self.fc2,
            norm=self.final_layer_norm,
            activation=activation_name(self.activation_fn),
            dropout=self.activation_dropout if self.training else 0.0,
            residual_dropout=self.dropout if self.training else 0.0,
            pre_norm=self.petl_lean.pre_norm,
            wide=self.petl_lean.wide,
        )

    def layer_index(self) -> int:
        return self.self_attn.layer_idx

    @staticmethod
    def parts(layer: Any) -> Iterator[tuple[str, nn.Module, frozenset[str]]]:
        """Yields (name, module, classes whose ``forward`` it may have) of what the lean forward does not call."""
        for name in ("self_attn", "encoder_attn"):
            if hasattr(layer, name):
                norm = f"{name}_layer_norm"
                yield name, getattr(layer, name), ATTENTIONS
                yield norm, getattr(layer, norm), NORMS
        yield "final_layer_norm", layer.final_layer_norm, NORMS
        yield "activation_fn", layer.activation_fn, frozenset(ACTIVATIONS)

    @staticmethod
    def rates(layer: Any) -> list[float]:
        """Returns the rates of dropout that are in effect."""
        attentions = [getattr(layer, name) for name in ("self_attn", "encoder_attn") if hasattr(layer, name)]
        own = [layer.dropout, layer.activation_dropout] if layer.training else []
        return own + [attention.dropout for attention in attentions if attention.training]

    @staticmethod
    def uncovered(layer: Any) -> str:
        """Returns why a layer cannot be lean; "" when it can."""
        reason = lacking(layer, BART_LAYER)
        for name in ("self_attn", "encoder_attn"):
            if hasattr(layer, name):
                reason = reason or lacking(getattr(layer, name), BART_ATTENTION)
        if not reason and not activation_name(layer.activation_fn):
            return f"activation {type(layer.activation_fn).__name__}"
        return reason


def _finite(x: Tensor) -> Tensor:
    """Returns x, clamped in fp16 as the family's encoders do it."""
    if x.dtype != torch.float16:
        return x
    limit = torch.finfo(x.dtype).max - 1000
    return x.clamp(-limit, limit)
