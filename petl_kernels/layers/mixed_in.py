"""Classes of the same name with a mixin before them, for modules that get another ``forward`` in place.

The name stays: transformers and accelerate find layers by the names of their classes, and ``save_pretrained`` writes
that of the model into its config.
"""

from __future__ import annotations

import functools


@functools.cache
def mixed(*bases: type) -> type:
    """Returns the class ``bases``, mixins first and the original class last, under the name of the original."""
    original = bases[-1]
    members = {"__module__": original.__module__, "__qualname__": original.__qualname__, "petl_bases": bases}
    return type(original.__name__, bases, members)


def original_class(cls: type) -> type:
    """Returns the class without mixins; ``cls`` itself where it has none."""
    return getattr(cls, "petl_bases", (cls,))[-1]


def bare(*bases: type) -> object:
    """Returns an object of ``mixed(*bases)`` without attributes, to be filled by ``copy`` or ``pickle``."""
    cls = mixed(*bases)
    return cls.__new__(cls)
