"""Encoder and decoder layers of the T5 family: T5, mT5, MADLAD-400, UMT5. transformers calls such a layer a block.

    h = x + drop(attn(RMSNorm(x)))      with a relative position bias, which the first layer makes for all
    y = h + drop(ffn(RMSNorm(h)))       with a gated or plain feed-forward network

A decoder layer has a cross-attention without a bias between the two. In UMT5 each layer makes a bias of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from petl_kernels.layers.blocks import AttentionBlock, FeedForwardBlock
from petl_kernels.layers.boundaries import is_packed
from petl_kernels.layers.clamp import clamped
from petl_kernels.layers.families.family import Family, rate
from petl_kernels.layers.source import shared_for_products
from petl_kernels.models.transformers_names import (
    ACTIVATIONS,
    T5_ATTENTION,
    T5_FEED_FORWARD,
    T5_NAMES,
    UMT5_NAMES,
    activation_name,
    lacking,
    of,
    unknown_activation,
)

NAMES = (*T5_NAMES, *UMT5_NAMES)
WRAPPERS = of(NAMES, "LayerSelfAttention", "LayerCrossAttention", "LayerFF")
ATTENTIONS, NORMS = of(NAMES, "Attention"), of(NAMES, "LayerNorm")
FEED_FORWARDS, DROPOUTS = of(NAMES, "DenseActDense", "DenseGatedActDense"), frozenset(["Dropout"])


class T5Blocks(Family):
    """The blocks of a layer of the family, whose classes differ in where a position bias comes from."""

    layer: Any  # a list of modules: the self-attention's, a decoder's cross-attention's, the feed-forward network's

    def blocks(self, crosses: bool) -> tuple[list[AttentionBlock], FeedForwardBlock]:
        """Returns the layer's blocks in their order; crosses: with the cross-attention, where the layer has one."""
        attentions = [self._attention(0, "SelfAttention")]
        if crosses and len(self.layer) == 3:
            attentions.append(self._attention(1, "EncDecAttention"))
        return attentions, self._feed_forward()

    def after_block(self, x: Tensor) -> Tensor:
        return clamped(x)

    def finished(self, x: Tensor) -> Tensor:
        return x

    def _position_bias(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """Returns the bias (1, heads, tokens, tokens); for a packed row by distance, (heads, 2R + 1) from -R to R.

        Distances beyond the attention's largest, R, are in the bucket of R. None for a layer that makes no bias.
        """
        attention = self.layer[0].SelfAttention
        if not attention.has_relative_attention_bias:
            return None
        if not is_packed(mask):
            return attention.compute_bias(x.shape[1], x.shape[1], device=x.device)
        reach = attention.relative_attention_max_distance
        return attention.compute_bias(reach + 1, 2 * reach + 1, device=x.device)[0, :, reach]

    def _attention(self, index: int, name: str) -> AttentionBlock:
        part = self.layer[index]
        attention = getattr(part, name)
        return AttentionBlock(
            host=attention,
            q=attention.q,
            k=attention.k,
            v=attention.v,
            out=attention.o,
            norm=part.layer_norm,
            heads=attention.n_heads,
            scale=1.0,
            causal=bool(attention.is_causal),
            dropout=attention.dropout if attention.training else 0.0,
            residual_dropout=rate(part.dropout),
            pre_norm=True,
            adds_bias=True,
            borders=self.petl_lean.borders,
        )

    def _feed_forward(self) -> FeedForwardBlock:
        part = self.layer[-1]
        ffn = part.DenseReluDense
        return FeedForwardBlock(
            inputs=(ffn.wi_0, ffn.wi_1) if hasattr(ffn, "wi_0") else (ffn.wi,),
            out=ffn.wo,
            norm=part.layer_norm,
            activation=activation_name(ffn.act),
            dropout=rate(ffn.dropout),
            residual_dropout=rate(part.dropout),
            pre_norm=True,
            wide=self.petl_lean.wide,
        )

    def layer_index(self) -> int:
        return self.layer[0].SelfAttention.layer_idx

    @classmethod
    def parts(cls, layer: Any) -> Iterator[tuple[str, nn.Module, frozenset[str]]]:
        """Yields (path, module, classes whose ``forward`` it may have) of what the lean forward does not call."""
        for i, part in enumerate(layer.layer):
            at = f"layer.{i}"
            yield at, part, WRAPPERS
            yield f"{at}.layer_norm", part.layer_norm, NORMS
            yield f"{at}.dropout", part.dropout, DROPOUTS
        yield "layer.0.SelfAttention", layer.layer[0].SelfAttention, ATTENTIONS
        if len(layer.layer) == 3:
            yield "layer.1.EncDecAttention", layer.layer[1].EncDecAttention, ATTENTIONS
        ffn = part.DenseReluDense
        yield f"{at}.DenseReluDense", ffn, FEED_FORWARDS
        yield f"{at}.DenseReluDense.dropout", ffn.dropout, DROPOUTS
        yield f"{at}.DenseReluDense.act", ffn.act, frozenset(ACTIVATIONS)

    @classmethod
    def rates(cls, layer: Any) -> list[float]:
        """Returns the rates of dropout that are in effect."""
        attentions = [layer.layer[0].SelfAttention, *(part.EncDecAttention for part in layer.layer[1:-1])]
        dropouts = [*(part.dropout for part in layer.layer), layer.layer[-1].DenseReluDense.dropout]
        return [*map(rate, dropouts), *(attention.dropout for attention in attentions if attention.training)]

    @classmethod
    def uncovered(cls, layer: Any) -> str:
        """Returns why a layer cannot be lean; "" when it can."""
        ffn = layer.layer[-1].DenseReluDense
        reason = lacking(layer.layer[0].SelfAttention, T5_ATTENTION) or lacking(ffn, T5_FEED_FORWARD)
        return reason or unknown_activation(ffn.act)


class LeanT5Layer(T5Blocks):
    """Mixed in before a layer class of T5, mT5 and MADLAD-400."""

    known = of(T5_NAMES, "Block")

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        encoder_decoder_position_bias: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns hidden states, the self-attention's position bias, and None: the cross-attention has no bias."""
        if self.steps_aside(kwargs):
            self.refuse_packed(attention_mask, kwargs)
            return super().forward(
                hidden_states,
                attention_mask,
                position_bias,
                encoder_hidden_states,
                encoder_attention_mask,
                encoder_decoder_position_bias,
                **kwargs,
            )
        if position_bias is None:
            position_bias = self._position_bias(hidden_states, attention_mask)
        source = shared_for_products(encoder_hidden_states)
        y = self.run(kwargs, hidden_states, attention_mask, position_bias, source, encoder_attention_mask)
        return y, position_bias, encoder_decoder_position_bias


class LeanUMT5Layer(T5Blocks):
    """Mixed in before a layer class of UMT5, where each layer has a position bias of its own."""

    known = of(UMT5_NAMES, "Block")

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
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, **kwargs
            )
        bias = self._position_bias(hidden_states, attention_mask)
        source = shared_for_products(encoder_hidden_states)
        return self.run(kwargs, hidden_states, attention_mask, bias, source, encoder_attention_mask)
