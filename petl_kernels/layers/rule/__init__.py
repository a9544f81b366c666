"""One autograd rule a layer: forward and backward of its blocks, written out.

A lean layer's forward pass runs below autograd, block by block, and is one node of the graph. This table has all that
the node saves (``call.SAVED``):

    saved                       what                                            tiers
    x                           the layer's input                               1 2 3 4, on the host: 5
    mean, rstd                  of each norm, 4 bytes a token each              1 2 3
    latent                      x Aᵀ of LoRA, Σ r values a token                1 2 3
    o, lse                      attention's result and its normaliser           1 2 3  (capped attention has no lse)
    bits                        one a hidden unit, where a ReLU let through     1 2 3
    end                         the sum before a norm that ends the layer, or   1 2 3
                                the network's output before one behind it
    sum                         x + drop(out(o)), where a norm of it reads it   1 2    (with an adapter on out: 1)
                                                                                       (with a norm behind out: none)
    read                        what an adapter, or a norm, behind an output    1 2    (after the last linear: 1 2 3)
                                projection reads
    q, k, v                     before (IA)³ scales them                        1
    z, gate                     pre-activations of GELU, SiLU, gated blocks     1
    hidden                      act(z), where the last linear's adapter reads   1
                                it or its weight is trained

The rest is recomputed: norms in one pass, q, k, v and pre-activations by their products, a sum by one product. Tiers 4
and 5 save x alone; backward runs the forward pass at tier 1 first. Every tier also saves the seeds of its dropout,
8 bytes each, DoRA's norms of rows, 4 bytes each, and the keys and values of a prefix, which no token adds to. The
network that computes prefixes is outside of the layers; a node of its own saves its hidden units. A layer with experts
has a rule for its attentions alone: the norm behind them and the experts are outside (``layers/experts.py``).

    call.py          the table; what one forward pass saves; the gradients that backward collects
    norm.py          LayerNorm and RMSNorm
    residual.py      the sum that ends a block, in one pass with the norm that reads it
    linears.py       linear layers that read one input: frozen, trained, LoRA, DoRA, (IA)³, SSF, quantized
    border.py        linears in one product, with LoRA in a border of their weights
    bottleneck.py    bottleneck adapters on an output projection or beside the feed-forward network
    attention.py     the attention block
    capped_attention.py  that of T5Gemma
    prefix.py        the prefixes of a kind of attention, computed once a forward pass
    feed_forward.py  the feed-forward block
    watch.py         the comparison of a layer with what its rule was made from
    layer.py         the blocks of a layer in their order, as one autograd function

Everything that backward reads is bound when forward runs: weights, adapters, scales, rates, seeds, the dtype of
autocast. Another adapter or mode between forward and backward changes nothing; a weight that is changed in place is
refused. Gradients cannot be differentiated again.
"""

from __future__ import annotations

from petl_kernels.layers.rule.call import Call
from petl_kernels.layers.rule.layer import Rule
from petl_kernels.layers.rule.linears import Unknown
from petl_kernels.layers.rule.watch import Watch

__all__ = ["Call", "Rule", "Unknown", "Watch"]
