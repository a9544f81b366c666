"""The families of layers: how each one's modules are read into blocks, and which classes it covers.

A family is a class that is mixed in before the class of a layer, after ``LeanLayer``. It has

    known                 names of the classes whose ``forward`` it stands for
    functions             names of transformers' attention functions whose numbers it has
    forward               with the signature of those, which runs ``LeanLayer.run``
    blocks(crosses)       the attentions in their order and the feed-forward block, or that of experts, as they are now
    after_block(x)        what the family does with the output of each block
    finished(x)           what it does with the output of the last
    layer_index()         the layer's place in a cache
    parts(layer)          the modules that the lean forward reads and does not call
    called(layer)         those that it calls, and so leaves as they are
    rates(layer)          the rates of dropout in effect
    uncovered(layer)      why a layer of the family cannot be lean; "" when it can
"""

from __future__ import annotations

from torch import nn

from petl_kernels.layers.families.bart import LeanBartLayer
from petl_kernels.layers.families.family import Family
from petl_kernels.layers.families.m4t import LeanM4TLayer
from petl_kernels.layers.families.t5 import LeanT5Layer, LeanUMT5Layer
from petl_kernels.layers.families.t5gemma import LeanT5GemmaLayer
from petl_kernels.layers.mixed_in import original_class
from petl_kernels.models.transformers_names import class_of

# By the family of ``models.structure``: classes for layers that are built alike and run different forwards.
FAMILIES: dict[str, tuple[type[Family], ...]] = {
    "bart": (LeanBartLayer,),
    "t5": (LeanT5Layer, LeanUMT5Layer),
    "m4t": (LeanM4TLayer,),
    "gemma": (LeanT5GemmaLayer,),
}


def family_for(family: str, cls: type[nn.Module]) -> type[Family]:
    """Returns the class that stands for the ``forward`` of the layer class ``cls``; the family's first if none does."""
    known = class_of(original_class(cls).forward)
    return next((found for found in FAMILIES[family] if known in found.known), FAMILIES[family][0])
