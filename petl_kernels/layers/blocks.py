"""The description of a layer's blocks: their modules, and how these are joined.

A family reads one of its layers into blocks (``families/``). The rule binds them (``rule/``), or they run op by op
(``op_by_op.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from petl_kernels.layers.border import Border
from petl_kernels.layers.hooks import hooks_on
from petl_kernels.layers.pieces import active_piece
from petl_kernels.layers.wide_ffn import WideFFN


@dataclass(frozen=True)
class AttentionBlock:
    """h = x + drop(out(attention(q, k, v))), with a norm before it or after it.

    host: the attention module, which holds prefixes. dropout: the rate on its probabilities. residual_dropout: the rate
    on what is added to x. adds_bias: whether the attention has a position bias, into which transformers puts the mask
    (T5's family). borders: by group of linears (``border.groups_of``); None where the weights cannot move.
    """

    host: Any
    q: nn.Module
    k: nn.Module
    v: nn.Module
    out: nn.Module
    norm: nn.Module
    heads: int
    scale: float
    causal: bool
    dropout: float
    residual_dropout: float
    pre_norm: bool
    adds_bias: bool
    borders: dict[str, Border] | None


@dataclass(frozen=True)
class CappedBlock(AttentionBlock):
    """h = x + drop(post(out(attention(q, k, v)))), with a norm before it as well, and ``ops.capped_attention``.

    Several heads of queries share keys and values, all of ``head_dim``; those of a self-attention are turned by their
    positions. cap: that on the scores, or 0.
    """

    post: nn.Module
    head_dim: int
    cap: float


@dataclass(frozen=True)
class FeedForwardBlock:
    """h = x + drop(out(drop(act(inputs[0])) ⊙ inputs[1])), with a norm before it or after it.

    inputs: one linear; two where the block is gated, the activation's first. activation: the ops' name. dropout: the
    rate on the hidden units. wide: the buffers with room for a parallel adapter, where there is one. post: a norm of
    the network's output, before it is added to x, or None.
    """

    inputs: tuple[Any, ...]
    out: Any
    norm: nn.Module
    activation: str
    dropout: float
    residual_dropout: float
    pre_norm: bool
    wide: WideFFN | None
    post: nn.Module | None = None

    def is_wide(self) -> bool:
        """Returns whether the network runs with its adapter inside; never in compiled graphs, which cannot compare the
        addresses of weights."""
        if self.wide is None or torch.compiler.is_compiling():
            return False
        adapter = active_piece(self.out)
        if adapter is None:
            return False
        return self.wide.serves(self.inputs[0], self.out, adapter) and not hooks_on(adapter)

    def release_unused(self) -> None:
        """Frees the buffers of a wide network whose weights have left them, or are trained by now."""
        if self.wide is None or torch.compiler.is_compiling():
            return
        if not self.wide.serves(self.inputs[0], self.out, active_piece(self.out)):
            self.wide.undo()


@dataclass(frozen=True)
class ExpertsBlock:
    """h = x + drop(network(norm(x), mask)), where ``network`` is the model's own module: a router and its experts.

    mask: the self-attention's as the model gives it to its layers, from which the router leaves out padding. norm,
    network: called as the layer's own forward calls them (``experts.py``).
    """

    norm: nn.Module
    network: nn.Module
    residual_dropout: float
