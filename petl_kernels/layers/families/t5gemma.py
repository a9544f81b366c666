"""Encoder and decoder layers of T5Gemma.

    h = x + drop(N'(attn(N(x))))        with rotary positions, shared keys and capped scores
    y = h + drop(N'(ffn(N(h))))         with a gated feed-forward network

A decoder layer has a cross-attention without positions between the two. A window of positions is part of the mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from petl_kernels.layers.blocks import AttentionBlock, CappedBlock, FeedForwardBlock
from petl_kernels.layers.families.family import Family
from petl_kernels.layers.rotary import Rotary
from petl_kernels.layers.source import shared_for_products
from petl_kernels.models.transformers_names import (
    ACTIVATIONS,
    OFFSET_NORMS,
    T5GEMMA_ATTENTION,
    T5GEMMA_LAYER,
    T5GEMMA_NAMES,
    T5GEMMA_NETWORK,
    activation_name,
    lacking,
    of,
)

ATTENTIONS = of(T5GEMMA_NAMES, "SelfAttention"), of(T5GEMMA_NAMES, "CrossAttention")
NORMS, NETWORKS, DROPOUTS = frozenset(OFFSET_NORMS), of(T5GEMMA_NAMES, "MLP"), frozenset(["Dropout"])
# What a stack hands to its decoder layers behind the first four arguments, in this order.
_MORE = ("cache", "use_cache", "encoder_hidden_states", "encoder_attention_mask")


class LeanT5GemmaLayer(Family):
    """Mixed in before a layer class of T5Gemma."""

    self_attn: Any
    mlp: Any
    dropout: nn.Dropout
    pre_feedforward_layernorm: nn.Module
    post_feedforward_layernorm: nn.Module

    known = of(T5GEMMA_NAMES, "EncoderLayer", "DecoderLayer")
    # sdpa's function of transformers leaves the cap out.
    functions: ClassVar[tuple[str, ...]] = ("eager", "petl_prefix_eager")

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *more: Any,
        **kwargs,
    ) -> Tensor:
        given: dict[str, Any] = {**dict(zip(_MORE, more, strict=False)), **kwargs}
        source, source_mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        is_read = position_embeddings is not None and all(map(_is_read, (attention_mask, source_mask)))
        if not is_read or self.steps_aside(given):
            self.refuse_packed(attention_mask, given)
            return super().forward(hidden_states, position_embeddings, attention_mask, position_ids, *more, **kwargs)
        assert position_embeddings is not None
        rotary, source = Rotary(*position_embeddings), shared_for_products(source)
        return self.run(given, hidden_states, attention_mask, rotary, source, source_mask)

    def blocks(self, crosses: bool) -> tuple[list[AttentionBlock], FeedForwardBlock]:
        """Returns the layer's blocks in their order; crosses: with the cross-attention, where the layer has one."""
        attentions: list[AttentionBlock] = [self._attention("self_attn")]
        if crosses and hasattr(self, "cross_attn"):
            attentions.append(self._attention("cross_attn"))
        return attentions, self._feed_forward()

    def after_block(self, x: Tensor) -> Tensor:
        return x

    def finished(self, x: Tensor) -> Tensor:
        return x

    def _attention(self, name: str) -> CappedBlock:
        attention = getattr(self, name)
        return CappedBlock(
            host=attention,
            q=attention.q_proj,
            k=attention.k_proj,
            v=attention.v_proj,
            out=attention.o_proj,
            norm=getattr(self, f"pre_{name}_layernorm"),
            heads=attention.config.num_attention_heads,
            scale=attention.scaling,
            causal=False,  # the mask has it
            dropout=attention.attention_dropout if attention.training else 0.0,
            residual_dropout=_rate(self.dropout),
            pre_norm=True,
            adds_bias=False,
            borders=self.petl_lean.borders,
            post=getattr(self, f"post_{name}_layernorm"),
            head_dim=attention.head_dim,
            cap=attention.attn_logit_softcapping or 0.0,
        )

    def _feed_forward(self) -> FeedForwardBlock:
        return FeedForwardBlock(
            inputs=(self.mlp.gate_proj, self.mlp.up_proj),
            out=self.mlp.down_proj,
            norm=self.pre_feedforward_layernorm,
            activation=activation_name(self.mlp.act_fn),
            dropout=_rate(self.mlp.dropout),
            residual_dropout=_rate(self.dropout),
            pre_norm=True,
            wide=self.petl_lean.wide,
            post=self.post_feedforward_layernorm,
        )

    def layer_index(self) -> int:
        return self.self_attn.layer_idx

    @staticmethod
    def parts(layer: Any) -> Iterator[tuple[str, nn.Module, frozenset[str]]]:
        """Yields (name, module, classes whose ``forward`` it may have) of what the lean forward does not call."""
        names = ["feedforward"]
        for name, classes in zip(("self_attn", "cross_attn"), ATTENTIONS, strict=True):
            if hasattr(layer, name):
                yield name, getattr(layer, name), classes
                names.append(name)
        for norm in (f"{place}_{name}_layernorm" for name in names for place in ("pre", "post")):
            yield norm, getattr(layer, norm), NORMS
        yield "mlp", layer.mlp, NETWORKS
        yield "mlp.act_fn", layer.mlp.act_fn, frozenset(ACTIVATIONS)
        yield "mlp.dropout", layer.mlp.dropout, DROPOUTS
        yield "dropout", layer.dropout, DROPOUTS

    @staticmethod
    def rates(layer: Any) -> list[float]:
        """Returns the rates of dropout that are in effect."""
        attentions = [getattr(layer, name) for name in ("self_attn", "cross_attn") if hasattr(layer, name)]
        own = [attention.attention_dropout for attention in attentions if attention.training]
        return [_rate(layer.dropout), _rate(layer.mlp.dropout), *own]

    @staticmethod
    def uncovered(layer: Any) -> str:
        """Returns why a layer cannot be lean; "" when it can."""
        reason = lacking(layer, T5GEMMA_LAYER) or lacking(layer.mlp, T5GEMMA_NETWORK)
        for name in ("self_attn", "cross_attn"):
            if hasattr(layer, name):
                reason = reason or lacking(getattr(layer, name), T5GEMMA_ATTENTION)
        if not reason and not activation_name(layer.mlp.act_fn):
            return f"activation {type(layer.mlp.act_fn).__name__}"
        return reason


def _rate(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0


def _is_read(mask: Tensor | None) -> bool:
    """Returns whether ``mask`` is one of transformers' eager function, alike for all heads."""
    return mask is None or (mask.dim() == 4 and mask.shape[1] == 1 and mask.is_floating_point())
