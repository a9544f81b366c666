"""Encoder and decoder layers of SeamlessM4T's text side, and the dense ones of NLLB-MoE.

    h = x + drop(attn(LN(x)))
    y = h + drop(ffn(LN(h)))            the feed-forward network is a module of its own

A decoder layer has a cross-attention between the two. A layer of NLLB-MoE with experts stays as it is.
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
    M4T_ATTENTION,
    M4T_NAMES,
    M4T_NETWORK,
    NLLB_MOE_NAMES,
    activation_name,
    feed_forward_norm,
    lacking,
    of,
)

NAMES = (*M4T_NAMES, *NLLB_MOE_NAMES)
ATTENTIONS, NORMS, DROPOUTS = of(NAMES, "Attention"), frozenset(["LayerNorm"]), frozenset(["Dropout"])
NETWORKS = of(M4T_NAMES, "FeedForwardNetwork") | of(NLLB_MOE_NAMES, "DenseActDense")


class LeanM4TLayer(Family):
    """Mixed in before a layer class of the family."""

    self_attn: Any
    ffn: Any
    attn_dropout: nn.Dropout

    known = of(NAMES, "EncoderLayer", "DecoderLayer")

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
            if not hasattr(self, "cross_attention"):
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
        if crosses and hasattr(self, "cross_attention"):
            attentions.append(self._attention("cross_attention"))
        return attentions, self._feed_forward()

    def after_block(self, x: Tensor) -> Tensor:
        return x

    def finished(self, x: Tensor) -> Tensor:
        """Returns the layer's output; NLLB-MoE clamps it in fp16, where something in it is infinite."""
        if x.dtype != torch.float16 or type(self.self_attn).__name__ not in of(NLLB_MOE_NAMES, "Attention"):
            return x
        is_decoder = hasattr(self, "cross_attention")
        overflows = torch.isinf(x).any() if is_decoder else ~torch.isfinite(x).all()
        limit = torch.where(overflows, torch.finfo(x.dtype).max - 1000, torch.inf)
        return x.clamp(-limit, limit)

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
            residual_dropout=_rate(self.attn_dropout),
            pre_norm=True,
            adds_bias=False,
            borders=self.petl_lean.borders,
        )

    def _feed_forward(self) -> FeedForwardBlock:
        name = feed_forward_norm(self)
        return FeedForwardBlock(
            inputs=(self.ffn.fc1,),
            out=self.ffn.fc2,
            norm=getattr(self, name),
            activation=activation_name(self.ffn.act),
            dropout=_rate(self.ffn.dropout),
            residual_dropout=_rate(_last_dropout(self)),
            pre_norm=True,
            wide=self.petl_lean.wide,
        )

    def layer_index(self) -> int:
        return self.self_attn.layer_idx

    @staticmethod
    def parts(layer: Any) -> Iterator[tuple[str, nn.Module, frozenset[str]]]:
        """Yields (name, module, classes whose ``forward`` it may have) of what the lean forward does not call."""
        for name in ("self_attn", "cross_attention"):
            if hasattr(layer, name):
                norm = f"{name}_layer_norm"
                yield name, getattr(layer, name), ATTENTIONS
                yield norm, getattr(layer, norm), NORMS
        norm = feed_forward_norm(layer)
        yield norm, getattr(layer, norm), NORMS
        yield "attn_dropout", layer.attn_dropout, DROPOUTS
        yield _dropout_name(layer), _last_dropout(layer), DROPOUTS
        yield "ffn", layer.ffn, NETWORKS
        yield "ffn.dropout", layer.ffn.dropout, DROPOUTS
        yield "ffn.act", layer.ffn.act, frozenset(ACTIVATIONS)

    @staticmethod
    def rates(layer: Any) -> list[float]:
        """Returns the rates of dropout that are in effect."""
        attentions = [getattr(layer, name) for name in ("self_attn", "cross_attention") if hasattr(layer, name)]
        dropouts = [layer.attn_dropout, _last_dropout(layer), layer.ffn.dropout]
        return [*map(_rate, dropouts), *(attention.dropout for attention in attentions if attention.training)]

    @staticmethod
    def uncovered(layer: Any) -> str:
        """Returns why a layer cannot be lean; "" when it can."""
        if hasattr(layer.ffn, "experts"):
            return "a feed-forward network of experts"
        reason = lacking(layer, ("attn_dropout", _dropout_name(layer))) or lacking(layer.ffn, M4T_NETWORK)
        for name in ("self_attn", "cross_attention"):
            if hasattr(layer, name):
                reason = reason or lacking(getattr(layer, name), M4T_ATTENTION)
        if not reason and not activation_name(layer.ffn.act):
            return f"activation {type(layer.ffn.act).__name__}"
        return reason


def _dropout_name(layer: nn.Module) -> str:
    return feed_forward_norm(layer).replace("layer_norm", "dropout")


def _last_dropout(layer: nn.Module) -> nn.Dropout:
    return getattr(layer, _dropout_name(layer))


def _rate(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0
