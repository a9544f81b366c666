"""Lean encoder and decoder blocks of the T5 family: T5, mT5, MADLAD-400.

    h = x + drop(attn(RMSNorm(x)))      with a relative position bias, which the first block makes for all
    y = h + drop(ffn(RMSNorm(h)))       with a gated or plain feed-forward block

and a cross-attention without a bias between them in the decoder. The class is mixed in before the block's own.
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
from petl_kernels.layers.boundaries import is_packed
from petl_kernels.layers.recompute import context
from petl_kernels.models.transformers_names import (
    ACTIVATIONS,
    T5_ATTENTION,
    T5_FEED_FORWARD,
    T5_NAMES,
    activation_name,
    lacking,
    of,
)

WRAPPERS = of(T5_NAMES, "LayerSelfAttention", "LayerCrossAttention", "LayerFF")
ATTENTIONS, NORMS = of(T5_NAMES, "Attention"), of(T5_NAMES, "LayerNorm")
FEED_FORWARDS, DROPOUTS = of(T5_NAMES, "DenseActDense", "DenseGatedActDense"), frozenset(["Dropout"])


class LeanT5Layer:
    """Before a block class of the family. ``petl_tier`` is set when it is mixed in."""

    petl_tier: int
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
        """(hidden states, the self-attention's position bias, None: the cross-attention has no bias)"""
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

    def blocks(self, crosses: bool) -> tuple[list[AttentionBlock], FeedForwardBlock]:
        """The layer's blocks in their order, with the attention to the source where the layer ``crosses``."""
        attentions = [self._attention(0, "SelfAttention")]
        if crosses and len(self.layer) == 3:
            attentions.append(self._attention(1, "EncDecAttention"))
        return attentions, self._feed_forward()

    def finished(self, x: Tensor) -> Tensor:
        """The layer's output, as what follows the last block leaves it."""
        return x

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
            x = _finite(attention_block(self._attention(0, "SelfAttention"), x, None, mask, bias, tier, keys))
            if source is not None and len(self.layer) == 3:
                cross = self._attention(1, "EncDecAttention")
                x = _finite(attention_block(cross, x, source, source_mask, None, tier, keys))
            return _finite(feed_forward_block(self._feed_forward(), x, tier)), *keys

    def _position_bias(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """(1, heads, tokens, tokens); for a packed row by distance: (heads, 2R + 1), from -R to R.

        What is farther than the attention's largest distance R is in the bucket of R.
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
            residual_dropout=_rate(part.dropout),
            pre_norm=True,
            adds_bias=True,
            borders=self.petl_borders,
        )

    def _feed_forward(self) -> FeedForwardBlock:
        part = self.layer[-1]
        ffn = part.DenseReluDense
        return FeedForwardBlock(
            inputs=(ffn.wi_0, ffn.wi_1) if hasattr(ffn, "wi_0") else (ffn.wi,),
            out=ffn.wo,
            norm=part.layer_norm,
            activation=activation_name(ffn.act),
            dropout=_rate(ffn.dropout),
            residual_dropout=_rate(part.dropout),
            pre_norm=True,
            wide=self.petl_wide,
        )

    def layer_index(self) -> int:
        return self.layer[0].SelfAttention.layer_idx

    @staticmethod
    def parts(layer: nn.Module) -> Iterator[tuple[str, nn.Module, frozenset[str]]]:
        """(path, module, classes whose ``forward`` it may have) of what the lean forward reads and does not call."""
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

    @staticmethod
    def rates(layer: nn.Module) -> list[float]:
        """The rates of dropout that are in effect."""
        attentions = [layer.layer[0].SelfAttention, *(part.EncDecAttention for part in layer.layer[1:-1])]
        dropouts = [*(part.dropout for part in layer.layer), layer.layer[-1].DenseReluDense.dropout]
        return [*map(_rate, dropouts), *(attention.dropout for attention in attentions if attention.training)]

    @staticmethod
    def uncovered(layer: nn.Module) -> str:
        """Why a block cannot be lean; empty when it can."""
        ffn = layer.layer[-1].DenseReluDense
        reason = lacking(layer.layer[0].SelfAttention, T5_ATTENTION) or lacking(ffn, T5_FEED_FORWARD)
        if not reason and not activation_name(ffn.act):
            return f"activation {type(ffn.act).__name__}"
        return reason


def _rate(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0


def _finite(x: Tensor) -> Tensor:
    """As the family does in fp16, where its sums overflow."""
    if x.dtype != torch.float16:
        return x
    largest = torch.finfo(x.dtype).max
    limit = torch.where(torch.isinf(x).any(), largest - 1000, largest)
    return x.clamp(-limit, limit)
