"""Position embeddings for packed rows, where positions begin anew with each sentence."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from petl_kernels.errors import InputError
from petl_kernels.layers.mixed_in import Mixin, bare, mixed, original_class
from petl_kernels.models.transformers_names import POSITIONS, class_of


class _OfThread(threading.local):
    """positions: by id of a position embedding, the rows of its table for this thread's packed row; else None."""

    positions: dict[int, Tensor] | None = None


_of_thread = _OfThread()


@contextmanager
def positions_of_row(positions: dict[int, Tensor]) -> Iterator[None]:
    """Sets the rows of position tables, by id of the module, for a packed row that runs in this block and thread."""
    before, _of_thread.positions = _of_thread.positions, positions
    try:
        yield
    finally:
        _of_thread.positions = before


class PackedPositions(Mixin):
    """Mixed in before a class of ``POSITIONS``: returns the embeddings of a packed row's positions."""

    weights: Tensor  # the table, where the class is no ``nn.Embedding``

    def forward(self, *args, **kwargs):
        if _of_thread.positions is None or id(self) not in _of_thread.positions:
            return super().forward(*args, **kwargs)
        rows = _of_thread.positions[id(self)]
        if isinstance(self, nn.Embedding):
            return nn.Embedding.forward(self, rows)
        return self.weights[rows].detach()

    def __reduce_ex__(self, protocol):
        return bare, type(self).petl_bases, self.__dict__


def rows_of_positions(module: Any, places: tuple[Tensor, Tensor], ends: Tensor, ids: Tensor, longest: int) -> Tensor:
    """Returns the rows int64 (1, tokens) of the table of ``module`` for the tokens ``ids`` (1, tokens).

    places: sentence and place in it of each token. ends: the boundaries. longest: tokens of the longest sentence.
    """
    sentence, place = places
    if isinstance(module, nn.Embedding):
        offset = getattr(module, "offset", 0)
        limit = module.num_embeddings - offset
        if longest > limit:
            raise InputError(f"cu_seqlens: a sentence of {longest} tokens; expected at most {limit}, as many positions")
        return (place + offset)[None]
    pad = module.padding_idx
    if pad + 1 + longest > module.weights.shape[0]:
        module.make_weights(pad + 1 + longest + module.offset, module.embedding_dim, pad)
    counts = (ids[0] != pad).long()
    before = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return ((before[1:] - before[ends[sentence].long()]) * counts + pad)[None]


def packed_positions(model: nn.Module) -> None:
    """Mixes ``PackedPositions`` into the position embeddings of ``model`` that are of a known class."""
    for module in model.modules():
        if not isinstance(module, PackedPositions) and class_of(type(module).forward) in POSITIONS:
            module.__class__ = mixed(PackedPositions, type(module))


def plain_positions(model: nn.Module) -> None:
    """Undoes ``packed_positions``."""
    for module in model.modules():
        if isinstance(module, PackedPositions):
            module.__class__ = original_class(type(module))
