"""One autograd rule a layer: forward and backward of its blocks, written out.

A lean layer's forward pass runs below autograd, block by block, and one node stands for all of it in the graph. What
backward needs is in this table and nowhere else:

    kept                        what                                            tiers
    x                           the layer's input                               1 2 3 4, on the host: 5
    mean, rstd                  of each norm, 4 bytes a token each              1 2 3
    latent                      x Aᵀ of LoRA, Σ r values a token                1 2 3
    o, lse                      attention's result and its normaliser           1 2 3
    bits                        one a hidden unit, where a ReLU let through     1 2 3
    end                         the sum before a norm that ends the layer       1 2 3
    sum                         x + drop(out(o))                                1 2    (with an adapter on out: 1)
    read                        what an adapter on an output projection reads   1 2    (after the last linear: 1 2 3)
    q, k, v                     before (IA)³ scales them                        1
    z, gate                     pre-activations of GELU, SiLU, gated blocks     1
    hidden                      act(z), where the last linear's adapter reads   1
                                it or its weight is trained

The rest is made again from these: norms in one pass, q, k, v and pre-activations by the products that made them, a
sum by one product. Tiers 4 and 5 keep x alone and run the forward pass again in backward, as tier 1 does. Besides,
every tier keeps the seeds of its dropout, 8 bytes each, and the keys and values of a prefix, for no token. The network
that makes those stands outside of the layers, and has a node of its own, which keeps its hidden units.

    call.py          ``KEPT``, the table; what one forward pass keeps; the gradients that backward collects
    norm.py          LayerNorm and RMSNorm
    residual.py      the sum that ends a block, in one pass with the norm that reads it
    linears.py       linear layers that read one input: frozen, trained, LoRA, (IA)³, quantized
    border.py        linears in one product, with LoRA in a border of their weights
    bottleneck.py    bottleneck adapters on an output projection or beside the feed-forward block
    attention.py     the attention block
    prefix.py        the prefixes of a kind of attention, made once a forward pass
    feed_forward.py  the feed-forward block
    watch.py         whether a layer is still what its rule was made from
    layer.py         the blocks of a layer in their order, as one autograd function

Everything that backward reads is bound when forward runs: weights, adapters, scales, rates, seeds, the dtype of
autocast. Switching adapters or modes in between changes nothing; a weight that is changed in place is refused.
Gradients cannot be differentiated again.
"""

from __future__ import annotations

from petl_kernels.layers.rule.call import Call
from petl_kernels.layers.rule.layer import Rule
from petl_kernels.layers.rule.linears import Unknown
from petl_kernels.layers.rule.watch import Watch

__all__ = ["Call", "Rule", "Unknown", "Watch"]
