"""Encoder and decoder layers of SeamlessM4T's text side and of NLLB-MoE.

    h = x + drop(attn(LN(x)))
    y = h + drop(ffn(LN(h)))            the feed-forward network is a module of its own

A decoder layer has a cross-attention between the two. In NLLB-MoE the network may be a router with experts, which
stays the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from petl_kernels.layers.blocks import ExpertsBlock, FeedForwardBlock
from petl_kernels.layers.families.family import rate
from petl_kernels.layers.families.projected import NORMS, ProjectedLayer
from petl_kernels.models.transformers_names import (
    ACTIVATIONS,
    M4T_NAMES,
    M4T_NETWORK,
    NLLB_MOE_NAMES,
    activation_name,
    feed_forward_norm,
    has_experts,
    lacking,
    of,
    unknown_activation,
)

NAMES = (*M4T_NAMES, *NLLB_MOE_NAMES)
DROPOUTS = frozenset(["Dropout"])
NETWORKS = of(M4T_NAMES, "FeedForwardNetwork") | of(NLLB_MOE_NAMES, "DenseActDense")


class LeanM4TLayer(ProjectedLayer):
    """Mixed in before a layer class of the family."""

    ffn: Any
    attn_dropout: nn.Dropout

    known = of(NAMES, "EncoderLayer", "DecoderLayer")
    cross = "cross_attention"
    attentions = of(NAMES, "Attention")

    def finished(self, x: Tensor) -> Tensor:
        """Returns the layer's output; NLLB-MoE clamps it in fp16, where something in it is infinite."""
        if x.dtype != torch.float16 or type(self.self_attn).__name__ not in of(NLLB_MOE_NAMES, "Attention"):
            return x
        is_decoder = hasattr(self, "cross_attention")
        overflows = torch.isinf(x).any() if is_decoder else ~torch.isfinite(x).all()
        limit = torch.where(overflows, torch.finfo(x.dtype).max - 1000, torch.inf)
        return x.clamp(-limit, limit)

    def _attention_dropout(self) -> float:
        return rate(self.attn_dropout)

    def _feed_forward(self) -> FeedForwardBlock | ExpertsBlock:
        norm, residual_dropout = getattr(self, feed_forward_norm(self)), rate(_last_dropout(self))
        if has_experts(self):
            return ExpertsBlock(norm, self.ffn, residual_dropout)
        return FeedForwardBlock(
            inputs=(self.ffn.fc1,),
            out=self.ffn.fc2,
            norm=norm,
            activation=activation_name(self.ffn.act),
            dropout=rate(self.ffn.dropout),
            residual_dropout=residual_dropout,
            pre_norm=True,
            wide=self.petl_lean.wide,
        )

    @classmethod
    def parts(cls, layer: Any) -> Iterator[tuple[str, nn.Module, frozenset[str]]]:
        yield from super().parts(layer)
        yield "attn_dropout", layer.attn_dropout, DROPOUTS
        yield _dropout_name(layer), _last_dropout(layer), DROPOUTS
        if has_experts(layer):
            return
        norm = feed_forward_norm(layer)
        yield norm, getattr(layer, norm), NORMS
        yield "ffn", layer.ffn, NETWORKS
        yield "ffn.dropout", layer.ffn.dropout, DROPOUTS
        yield "ffn.act", layer.ffn.act, frozenset(ACTIVATIONS)

    @classmethod
    def called(cls, layer: Any) -> tuple[nn.Module, ...]:
        return (getattr(layer, feed_forward_norm(layer)), layer.ffn) if has_experts(layer) else ()

    @classmethod
    def rates(cls, layer: Any) -> list[float]:
        dropouts = [layer.attn_dropout, _last_dropout(layer)]
        if not has_experts(layer):
            dropouts.append(layer.ffn.dropout)
        return [*map(rate, dropouts), *super().rates(layer)]

    @classmethod
    def uncovered(cls, layer: Any) -> str:
        reason = lacking(layer, ("attn_dropout", _dropout_name(layer))) or super().uncovered(layer)
        if reason or has_experts(layer):
            return reason
        return lacking(layer.ffn, M4T_NETWORK) or unknown_activation(layer.ffn.act)


def _dropout_name(layer: nn.Module) -> str:
    return feed_forward_norm(layer).replace("layer_norm", "dropout")


def _last_dropout(layer: nn.Module) -> nn.Dropout:
    return getattr(layer, _dropout_name(layer))
