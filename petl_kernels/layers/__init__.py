"""Lean layers: encoder and decoder layers that save less between forward and backward, with the same gradients.

The words of this package:

    layer          an encoder or decoder layer of a Hugging Face model; a lean layer is that module with another class
    block          a part of a layer: an attention or the feed-forward network, with its norm and its residual sum
    family         the models whose layers are built alike: BART's (M2M-100, NLLB, mBART, Marian) and T5's
    tier           1 to 5: how little a lean layer saves (``petl_kernels.lean`` has the list)
    saved          held from the forward pass to the backward pass
    recomputed     not saved, and computed once more in the backward pass from what is saved
    rule           one autograd node for a whole layer (``rule/``); a layer that the rule does not cover runs op by op
    obstacle       the reason why a layer's own forward runs in the place of the lean one
    piece          what an adapter has put on one module (``methods.pieces.Piece``)
    border, wide   buffers where frozen weights stand with room for an adapter: of q, k and v; of a feed-forward network
    boundaries     where the sentences of a packed row begin (``cu_seqlens``)
"""
