"""Pieces: the small modules that an adapter puts beside the model's own, one a place.

A place keeps its path and its parameters' names, so that the plain model's state keys stay what they were. It holds its
pieces in a ``Named``, by the adapter's name; the piece of the active adapter runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from petl_kernels.models.added import AddedModules


class Named(AddedModules):
    """The pieces of one place in the model, by adapter name. At most one is active."""

    active: str | None = None

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> Piece: ...

    def current(self) -> Piece | None:
        """Returns the active piece, None where there is none."""
        return None if self.active is None else self[self.active]


class Piece(nn.Module):
    """One adapter's module in one place. A piece in ``host.petl`` sees what its host reads and writes.

    ``args`` are the host's positional arguments; attentions are called by keywords and have none. Lean layers give
    ``after`` no arguments, so a piece that needs its host's input notes it in ``before``.
    """

    what: str = ""  # its name in reports
    decays: bool = True  # whether weight decay may draw its matrices to zero; vectors have none anyway

    def before(self, host: nn.Module, args: tuple) -> tuple | None:
        """Returns the host's arguments, changed; None leaves them."""
        return None

    def after(self, host: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Returns the host's (first) output, changed."""
        return output

    def state(self) -> dict[str, Tensor]:
        """Returns what is stored: suffix -> tensor."""
        return {}

    def training_state(self) -> dict[str, Tensor]:
        """Returns what is trained in place of ``state``: suffix -> parameter; empty where that is the parameters."""
        return {}

    def fold(self) -> None:
        """Makes ``state`` return the parameters themselves, in pieces that train another form than they store."""


def attach(host: Any, name: str, piece: Piece) -> None:
    """Puts ``piece`` into ``host.petl`` under ``name``; the first one also hooks the host."""
    if not hasattr(host, "petl"):
        host.petl = Named()
        host.register_forward_pre_hook(_before)
        # prepended: what transformers records as a layer's output is then the adapted one
        host.register_forward_hook(_after, prepend=True)
    host.petl[name] = piece


# The hooks are functions of the module and no closures, so that a deep copy of the model runs its own pieces.
def _before(host: Any, args: tuple):
    piece = host.petl.current()
    return None if piece is None else piece.before(host, args)


def _after(host: Any, args: tuple, output):
    piece = host.petl.current()
    if piece is None:
        return None
    if isinstance(output, tuple):
        return (piece.after(host, args, output[0]), *output[1:])
    return piece.after(host, args, output)


def pieces(model: nn.Module, name: str) -> Iterator[tuple[str, Piece]]:
    """Yields (path of the place, piece) for each piece of the adapter ``name``."""
    for path, module in model.named_modules():
        if isinstance(module, Named) and name in module:
            yield path.rpartition(".")[0], module[name]


def run_pieces(model: nn.Module, name: str | None) -> None:
    """Lets every place run the piece of ``name``, or none where it has no such piece."""
    for module in model.modules():
        if isinstance(module, Named):
            module.active = name if name is not None and name in module else None


def discard_pieces(model: nn.Module, name: str) -> None:
    """Takes the pieces of ``name`` away, of an adapter that could not be put in as a whole."""
    for module in list(model.modules()):
        if isinstance(module, Named) and name in module:
            del module[name]


def piece_dtype(tensor: Tensor) -> torch.dtype:
    """Returns the dtype of new parameters beside ``tensor``: at least fp32, since 16 bits would lose small updates."""
    return torch.promote_types(tensor.dtype, torch.float32)
