"""The base of the layers of the BART family and of SeamlessM4T's: all but their feed-forward networks.

A layer has a self-attention, in a decoder a cross-attention, and a feed-forward network. An attention has q_proj,
k_proj, v_proj and out_proj, and its norm is named after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from petl_kernels.layers.blocks import AttentionBlock, ExpertsBlock, FeedForwardBlock
from petl_kernels.layers.families.family import Family
from petl_kernels.layers.source import shared_for_products
from petl_kernels.models.transformers_names import PROJECTED_ATTENTION, lacking

NORMS = frozenset(["LayerNorm"])


class ProjectedLayer(Family):
    """The base of such families.

    cross: the name of a decoder's cross-attention. attentions: the classes whose ``forward`` attentions may have.
    """

    cross: ClassVar[str]
    attentions: ClassVar[frozenset[str]]

    self_attn: Any

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
            if not hasattr(self, self.cross):
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

    def blocks(self, crosses: bool) -> tuple[list[AttentionBlock], FeedForwardBlock | ExpertsBlock]:
        """Returns the layer's blocks in their order; crosses: with the cross-attention, where the layer has one."""
        attentions = [self._attention("self_attn")]
        if crosses and hasattr(self, self.cross):
            attentions.append(self._attention(self.cross))
        return attentions, self._feed_forward()

    def after_block(self, x: Tensor) -> Tensor:
        return x

    def layer_index(self) -> int:
        return self.self_attn.layer_idx

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
            residual_dropout=self._attention_dropout(),
            pre_norm=self.petl_lean.pre_norm,
            adds_bias=False,
            borders=self.petl_lean.borders,
        )

    def _attention_dropout(self) -> float:
        """Returns the rate of the dropout in effect on what an attention adds."""
        raise NotImplementedError

    def _feed_forward(self) -> FeedForwardBlock | ExpertsBlock:
        raise NotImplementedError

    @classmethod
    def parts(cls, layer: Any) -> Iterator[tuple[str, nn.Module, frozenset[str]]]:
        """Yields (name, module, classes whose ``forward`` it may have) of what the lean forward does not call."""
        for name, attention in cls._attentions_of(layer):
            norm = f"{name}_layer_norm"
            yield name, attention, cls.attentions
            yield norm, getattr(layer, norm), NORMS

    @classmethod
    def rates(cls, layer: Any) -> list[float]:
        """Returns the rates of dropout that are in effect."""
        return [attention.dropout for _, attention in cls._attentions_of(layer) if attention.training]

    @classmethod
    def uncovered(cls, layer: Any) -> str:
        """Returns why a layer cannot be lean; "" when it can."""
        reasons = (lacking(attention, PROJECTED_ATTENTION) for _, attention in cls._attentions_of(layer))
        return next(filter(None, reasons), "")

    @classmethod
    def _attentions_of(cls, layer: nn.Module) -> Iterator[tuple[str, Any]]:
        for name in ("self_attn", cls.cross):
            if hasattr(layer, name):
                yield name, getattr(layer, name)
