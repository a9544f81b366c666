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

from petl_kernels.layers.blocks import FeedForwardBlock
from petl_kernels.layers.families.projected import NORMS, ProjectedLayer
from petl_kernels.models.transformers_names import (
    ACTIVATIONS,
    BART_LAYER,
    BART_NAMES,
    activation_name,
    lacking,
    of,
    unknown_activation,
)


class LeanBartLayer(ProjectedLayer):
    """Mixed in before a layer class of the family."""

    fc1: nn.Module
    fc2: nn.Module
    final_layer_norm: nn.Module
    activation_fn: nn.Module
    activation_dropout: float
    dropout: float

    known = of(BART_NAMES, "EncoderLayer", "DecoderLayer")
    cross = "encoder_attn"
    attentions = of(BART_NAMES, "Attention")

    def finished(self, x: Tensor) -> Tensor:
        """Returns the layer's output; the family's encoders clamp it in fp16."""
        return x if hasattr(self, "encoder_attn") else _finite(x)

    def _attention_dropout(self) -> float:
        return self.dropout if self.training else 0.0

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

    @classmethod
    def parts(cls, layer: Any) -> Iterator[tuple[str, nn.Module, frozenset[str]]]:
        yield from super().parts(layer)
        yield "final_layer_norm", layer.final_layer_norm, NORMS
        yield "activation_fn", layer.activation_fn, frozenset(ACTIVATIONS)

    @classmethod
    def rates(cls, layer: Any) -> list[float]:
        own = [layer.dropout, layer.activation_dropout] if layer.training else []
        return own + super().rates(layer)

    @classmethod
    def uncovered(cls, layer: Any) -> str:
        return lacking(layer, BART_LAYER) or super().uncovered(layer) or unknown_activation(layer.activation_fn)


def _finite(x: Tensor) -> Tensor:
    """Returns x, clamped in fp16 as the family's encoders do it."""
    if x.dtype != torch.float16:
        return x
    limit = torch.finfo(x.dtype).max - 1000
    return x.clamp(-limit, limit)
