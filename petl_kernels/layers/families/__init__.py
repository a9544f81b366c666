"""The families of layers: how each one's modules are read into blocks, and which classes it covers.

A family is a class that is mixed in before the class of a layer, after ``LeanLayer``. It has

    known                 names of the classes whose ``forward`` it stands for
    forward               with the signature of those, which runs ``LeanLayer.run``
    blocks(crosses)       the attentions in their order and the feed-forward block, as they are now
    after_block(x)        what the family does with the output of each block
    finished(x)           what it does with the output of the last
    layer_index()         the layer's place in a cache
    parts(layer)          the modules that the lean forward reads and does not call
    rates(layer)          the rates of dropout in effect
    uncovered(layer)      why a layer of the family cannot be lean; "" when it can
"""

from __future__ import annotations

from petl_kernels.layers.families.bart import LeanBartLayer
from petl_kernels.layers.families.family import Family
from petl_kernels.layers.families.t5 import LeanT5Layer

FAMILIES: dict[str, type[Family]] = {"bart": LeanBartLayer, "t5": LeanT5Layer}
