"""A lean model that reads packed rows (``packed.py``).

All of it but attention, positions and the decoder's shift works on tokens alone. The attentions of its lean layers keep
to the boundaries (``boundaries.py``), positions begin anew with each sentence (``packed_positions.py``), and decoder
inputs are those that the model's own rule makes of each sentence. So the loss and the gradients are those of the padded
sentences.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from petl_kernels.errors import InputError, check_whole, shown
from petl_kernels.layers import device_masks
from petl_kernels.layers.boundaries import packed_mask
from petl_kernels.layers.lean import layer_states
from petl_kernels.layers.lean_layer import LeanLayer
from petl_kernels.layers.packed import BOUNDARIES, IGNORE, PackedIds
from petl_kernels.layers.packed_positions import PackedPositions, positions_of_row, rows_of_positions
from petl_kernels.layers.uncompiled import uncompiled
from petl_kernels.models.transformers_names import STACKS, cache_in, class_that_runs, decoder_inputs

# Arguments that a packed row has no place for: they have to be None, or False.
_BESIDE = ("attention_mask", "decoder_attention_mask", "inputs_embeds", "decoder_inputs_embeds", "encoder_outputs")
_ALSO = ("use_cache", "output_attentions")


def has_boundaries(inputs: dict) -> bool:
    """Returns whether ``inputs`` of a model are a packed row."""
    return any(inputs.get(name) is not None for name in BOUNDARIES)


@contextmanager
def unpacked(model: nn.Module, inputs: dict) -> Iterator[dict]:
    """Yields the arguments of ``model`` for the packed row ``inputs``, and sets this thread's positions to the row's.

    Raises InputError where the row is none, or where ``model`` cannot read it.
    """
    row, positions = _read(model, inputs)
    with positions_of_row(positions):
        yield row


@uncompiled
def _read(model: nn.Module, inputs: dict) -> tuple[dict, dict[int, Tensor]]:
    """Returns the arguments of ``model``, and the rows of its tables of positions by id of the embedding."""
    reason = packed_obstacle(model)
    if reason:
        raise InputError(f"cu_seqlens: {type(model).__name__} reads no packed rows ({reason}); expected padded ones")
    row = {name: value for name, value in inputs.items() if name not in (*BOUNDARIES, "longest")}
    _check_alone(model, row)
    source, target = _sides(inputs, row)
    longest = _longest(inputs.get("longest"), source, target)
    row["input_ids"] = source.tokens
    if row.get("decoder_input_ids") is None:
        row["decoder_input_ids"] = target.shifted(model, longest)
    masks = {
        "attention_mask": packed_mask(source.ends, target.ends),
        "decoder_attention_mask": packed_mask(target.ends, target.ends),
    }
    return {**row, **masks, "use_cache": False}, _positions(model, row, source, target, longest)


def _sides(inputs: dict, row: dict) -> tuple[_Side, _Side]:
    ids, labels, decoder = (row.get(name) for name in ("input_ids", "labels", "decoder_input_ids"))
    if labels is not None and decoder is not None and labels.shape != decoder.shape:
        of = tuple(decoder.shape)
        raise InputError(f"decoder_input_ids: of shape {of}; expected that of labels, {tuple(labels.shape)}")
    ids = ids.as_subclass(Tensor) if isinstance(ids, PackedIds) else ids
    source = _Side("cu_seqlens", inputs.get("cu_seqlens"), "input_ids", ids)
    targets = labels if decoder is None else decoder
    target = _Side("decoder_cu_seqlens", inputs.get("decoder_cu_seqlens"), "labels or decoder_input_ids", targets)
    if len(source.ends) != len(target.ends):
        raise InputError(
            f"decoder_cu_seqlens: of {len(target.ends) - 1} sentences; expected {len(source.ends) - 1}, as cu_seqlens"
        )
    return source, target


def _positions(model: Any, row: dict, source: _Side, target: _Side, longest: int) -> dict[int, Tensor]:
    sides = (model.get_encoder(), source, row["input_ids"]), (model.get_decoder(), target, row["decoder_input_ids"])
    return {
        id(stack.embed_positions): rows_of_positions(stack.embed_positions, side.places, side.ends, ids, longest)
        for stack, side, ids in sides
        if hasattr(stack, "embed_positions")
    }


def _check_alone(model: nn.Module, row: dict) -> None:
    if getattr(model, "_is_replica", False):
        raise InputError("cu_seqlens: DataParallel cannot divide a packed row; expected DistributedDataParallel")
    for name in _BESIDE:
        if row.get(name) is not None:
            raise InputError(f"{name}: given beside cu_seqlens; expected None (a packed row has no padding)")
    for name in _ALSO:
        if row.get(name):
            raise InputError(f"{name}: {shown(row[name])} beside cu_seqlens; expected False")
    if cache_in(row) is not None:
        raise InputError("cache: given beside cu_seqlens; expected None")


class _Side:
    """One side of a packed row. tokens: (1, tokens). ends: int32 (sentences + 1,), its boundaries."""

    def __init__(self, name: str, ends: Tensor | None, of: str, tokens: Tensor | None):
        if tokens is None:
            raise InputError(f"{of}: not given; expected token ids of shape (1, tokens) with cu_seqlens")
        if tokens.dim() != 2 or tokens.shape[0] != 1:
            raise InputError(f"{of}: of shape {tuple(tokens.shape)} with cu_seqlens; expected (1, tokens)")
        if not isinstance(ends, Tensor) or ends.dtype != torch.int32 or ends.dim() != 1 or len(ends) < 2:
            what = f"{ends.dtype} of shape {tuple(ends.shape)}" if isinstance(ends, Tensor) else shown(ends)
            raise InputError(f"{name}: {what}; expected int32 of shape (sentences + 1,)")
        self.name, self.tokens = name, tokens
        self.ends = ends if ends.device == tokens.device else ends.to(tokens.device)

    @functools.cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """The sentence of each token, and its place there, both int64 (tokens,)."""
        at = torch.arange(self.tokens.shape[1], device=self.ends.device, dtype=torch.int32)
        sentence = torch.searchsorted(self.ends[1:], at, right=True)
        return sentence, (at - self.ends[sentence]).long()

    def longest(self) -> int:
        """Returns the tokens of the longest sentence, read from the device. Raises InputError for ends that do not rise
        from 0 to the number of tokens."""
        ends, tokens = self.ends.tolist(), self.tokens.shape[1]
        if ends[0] != 0 or ends[-1] != tokens or any(end < start for start, end in pairwise(ends)):
            raise InputError(f"{self.name}: {shown(ends)}; expected to rise from 0 to {tokens}, the number of tokens")
        return max(end - start for start, end in pairwise(ends))

    def shifted(self, model: nn.Module, longest: int) -> Tensor:
        """Returns decoder inputs (1, tokens) for the labels, by the rule of ``model`` for each sentence."""
        sentence, place = self.places
        rows = self.tokens.new_full((len(self.ends) - 1, longest), IGNORE)
        rows[sentence, place] = self.tokens[0]
        nothing = (rows == IGNORE).all(1)  # mBART's rule looks for the last label, and a filled row may have none
        rows[:, 0] = rows[:, 0].masked_fill(nothing, 0)
        return decoder_inputs(model, rows)[sentence, place][None]


def _longest(given: Any, source: _Side, target: _Side) -> int:
    """Returns ``given``, or the length that the boundaries have, for which the host waits."""
    if given is not None:
        check_whole("longest", given)
    waits = source.ends.device.type in device_masks.WAITED_FOR or isinstance(source.ends, FakeTensor)
    if given is not None and waits:
        return given
    found = max(source.longest(), target.longest())
    if given is not None and given < found:
        raise InputError(f"longest: {given}; expected {found}, the tokens of the longest sentence, or more")
    return found if given is None else given


def packed_obstacle(model: Any) -> str:
    """Returns what in ``model``, whose loss is lean, reads no packed rows, and why; "" when all does.

    A lean layer that steps aside, for a hook, say, refuses a packed row itself.
    """
    for name, stack in (("encoder", model.get_encoder()), ("decoder", model.get_decoder())):
        if class_that_runs(stack) not in STACKS:
            experts = next((layer.own for layer in layer_states(model) if layer.own), "")
            if experts:
                return f"{experts}, which have places for so many tokens of a batch, padding among them"
            return f"the {name} is a {type(stack).__name__} with a forward of its own"
        layers = stack.layers if hasattr(stack, "layers") else stack.block
        if not all(isinstance(layer, LeanLayer) for layer in layers):
            return first_plain_layer(model)
        positions = getattr(stack, "embed_positions", None)
        if positions is not None and (not isinstance(positions, PackedPositions) or "forward" in vars(positions)):
            return f"the positions of the {name} are a {type(positions).__name__}"
    return ""


def first_plain_layer(model: nn.Module) -> str:
    """Returns the path of the first layer that is not lean, and why; "" when all are."""
    plain = (f"{layer.path}: {layer.reason or 'not lean'}" for layer in layer_states(model) if not layer.tier)
    return next(plain, "")
