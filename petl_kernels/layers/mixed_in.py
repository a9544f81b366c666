"""Classes of the same name with a mixin before them, for modules that get another ``forward`` in place.

The name stays: transformers and accelerate find layers by the names of their classes, and ``save_pretrained`` writes
that of the model into its config.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    class Mixin(nn.Module):
        """A mixin as the objects of its mixed classes are: modules."""

        petl_bases: tuple[type, ...]

else:
    Mixin = object  # the base of a mixin


@functools.cache
def mixed(*bases: type) -> type[Any]:
    """Returns the class ``bases``, mixins first and the original class last, under the name of the original."""
    original = bases[-1]
    members = {"__module__": original.__module__, "__qualname__": original.__qualname__, "petl_bases": bases}
    return type(original.__name__, bases, members)


def original_class(cls: type) -> type[Any]:
    """Returns the class without mixins; ``cls`` itself where it has none."""
    return getattr(cls, "petl_bases", (cls,))[-1]


def bare(*bases: type) -> object:
    """Returns an object of ``mixed(*bases)`` without attributes, to be filled by ``copy`` or ``pickle``."""
    cls: Any = mixed(*bases)
    return cls.__new__(cls)
