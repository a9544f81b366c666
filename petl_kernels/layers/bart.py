"""Lean encoder and decoder layers of the BART family: M2M-100, NLLB, mBART, BART, Marian, Pegasus.

pre-norm:   h = x + drop(attn(LN(x)))           post-norm:  h = LN(x + drop(attn(x)))
            y = h + drop(ffn(LN(h)))                        y = LN(h + drop(ffn(h)))

with a cross-attention between them in the decoder. The classes are mixed in before the layer's own class.
"""

from __future__ import annotations

from collections.abc import Iterator

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


class LeanBartLayer:
    """Before a layer class of the family. ``petl_tier`` and ``petl_pre_norm`` are set when it is mixed in."""

    petl_tier: int
    petl_pre_norm: bool
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
        """The layer's blocks in their order, with the attention to the source where the layer ``crosses``."""
        attentions = [self._attention("self_attn")]
        if crosses and hasattr(self, "encoder_attn"):
            attentions.append(self._attention("encoder_attn"))
        return attentions, self._feed_forward()

    def finished(self, x: Tensor) -> Tensor:
        """The layer's output, as what follows the last block leaves it."""
        return x if hasattr(self, "encoder_attn") else _finite(x)

    def body(
        self,
        x: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        source: Tensor | None,
        source_mask: Tensor | None,
        tier: int,
    ) -> tuple[Tensor, ...]:
        """(output, k and v of the self-attention, those of the cross-attention)"""
        keys: list[Tensor] = []
        with context(tier > 0, self):
            x = attention_block(self._attention("self_attn"), x, None, mask, None, tier, keys)
            if source is not None and hasattr(self, "encoder_attn"):
                x = attention_block(self._attention("encoder_attn"), x, source, source_mask, None, tier, keys)
            x = feed_forward_block(self._feed_forward(), x, tier)
            return x if hasattr(self, "encoder_attn") else _finite(x), *keys

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
            pre_norm=self.petl_pre_norm,
            adds_bias=False,
            borders=self.petl_borders,
        )

    def _feed_forward(self) -> FeedForwardBlock:
        return FeedForwardBlock(
            inputs=(self.fc1,),
            out=self.fc2,
            norm=self.final_layer_norm,
            activation=activation_name(self.activation_fn),
            dropout=self.activation_dropout if self.training else 0.0,
            residual_dropout=self.dropout if self.training else 0.0,
            pre_norm=self.petl_pre_norm,
            wide=self.petl_wide,
        )

    def layer_index(self) -> int:
        return self.self_attn.layer_idx

    @staticmethod
    def parts(layer: nn.Module) -> Iterator[tuple[str, nn.Module, frozenset[str]]]:
        """(name, module, classes whose ``forward`` it may have) of what the lean forward reads and does not call."""
        for name in ("self_attn", "encoder_attn"):
            if hasattr(layer, name):
                norm = f"{name}_layer_norm"
                yield name, getattr(layer, name), ATTENTIONS
                yield norm, getattr(layer, norm), NORMS
        yield "final_layer_norm", layer.final_layer_norm, NORMS
        yield "activation_fn", layer.activation_fn, frozenset(ACTIVATIONS)

    @staticmethod
    def rates(layer: nn.Module) -> list[float]:
        """The rates of dropout that are in effect."""
        attentions = [getattr(layer, name) for name in ("self_attn", "encoder_attn") if hasattr(layer, name)]
        own = [layer.dropout, layer.activation_dropout] if layer.training else []
        return own + [attention.dropout for attention in attentions if attention.training]

    @staticmethod
    def uncovered(layer: nn.Module) -> str:
        """Why a layer cannot be lean; empty when it can."""
        reason = lacking(layer, BART_LAYER)
        for name in ("self_attn", "encoder_attn"):
            if hasattr(layer, name):
                reason = reason or lacking(getattr(layer, name), BART_ATTENTION)
        if not reason and not activation_name(layer.activation_fn):
            return f"activation {type(layer.activation_fn).__name__}"
        return reason


def _finite(x: Tensor) -> Tensor:
    """As the family's encoders do in fp16."""
    if x.dtype != torch.float16:
        return x
    limit = torch.finfo(x.dtype).max - 1000
    return x.clamp(-limit, limit)
