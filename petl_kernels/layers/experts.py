"""The feed-forward block of a layer with experts: a router chooses for each token the experts that read it.

Norm, router and experts are the model's own modules, and run outside of the layer's rule, under PyTorch's autograd. So
which tokens an expert has places for, its dropout and what the router hands to the model's loss are the plain model's.

    tier        saved of norm, router and experts
    1           what autograd saves
    2 3 4       the block's input
    5           the block's input, on the host

From tier 2 on backward runs them again, with the random numbers of the forward pass (PyTorch's checkpoint): the same
input makes the same choices. Where a weight or setting has changed since, places of an expert among them, backward
raises RuntimeError. The dropout on what is added saves its seed, 8 bytes.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from petl_kernels import ops
from petl_kernels.layers.blocks import ExpertsBlock
from petl_kernels.layers.recompute import checkpointed

# The first tier that runs the experts again, as tier 2 does the products of other feed-forward networks.
AGAIN = 2


def experts_block(layer: nn.Module, block: ExpertsBlock, x: Tensor, mask: Tensor | None, tier: int) -> Tensor:
    """Returns h (batch, tokens, d) of x (batch, tokens, d). layer: the lean layer that the block is of."""
    network = partial(_network, block)
    y = network(x, mask) if tier < AGAIN else checkpointed(layer, network, x, mask, offload=tier == 5)
    return ops.dropout_add(y, x, block.residual_dropout)


def _network(block: ExpertsBlock, x: Tensor, mask: Tensor | None) -> Tensor:
    return block.network(block.norm(x), mask)
