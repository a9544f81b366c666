"""Marks of what petl_kernels adds to a user's model, by which the plain model is told apart from it.

The classes that use them stand above this room: ``methods.pieces.Named`` and ``methods.owner.Owner``.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn


class AddedModules(nn.ModuleDict):
    """Modules that the plain model lacks, in one place of it."""


class AddedParameters:
    """Base of the object in ``model.petl``: ``added`` has the names of parameters of the model's own modules that the
    plain model lacks."""

    @property
    def added(self) -> Collection[str]:
        return ()
