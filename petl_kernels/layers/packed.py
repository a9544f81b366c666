"""Packed rows: sentences one after the other in a row of their own length, without padding.

    input_ids          (1, T)     the source tokens of n sentences
    labels             (1, T')    the target tokens of the same sentences
    cu_seqlens         (n + 1,)   where each source begins, and T
    decoder_cu_seqlens (n + 1,)   where each target begins, and T'

A lean model takes these in the place of padded rows and masks. Everything in it but attention, positions and the
decoder's shift works on tokens alone. The attentions of its lean layers keep to the boundaries (``layers/boundaries``),
positions begin anew with each sentence, and decoder inputs are those that the model's own rule makes of each sentence.
So the loss and the gradients are those of the padded sentences.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from petl_kernels.errors import InputError, check_whole, shown
from petl_kernels.layers import device_masks
from petl_kernels.layers.boundaries import packed_mask
from petl_kernels.layers.lean import LeanLayer, layer_states
from petl_kernels.models.transformers_names import (
    POSITIONS,
    STACKS,
    cache_in,
    class_of,
    class_that_runs,
    decoder_inputs,
)

IGNORE = -100  # the label of a token that is not trained on
BOUNDARIES = ("cu_seqlens", "decoder_cu_seqlens")
_SIDES = (("input_ids",), ("labels", "decoder_input_ids"))  # what each of the two bounds
_BESIDE = ("attention_mask", "decoder_attention_mask", "inputs_embeds", "decoder_inputs_embeds", "encoder_outputs")
_ALSO = ("use_cache", "output_attentions")


# ---- making rows ----------------------------------------------------------------------------------------------------


def pack(
    examples: Sequence[Sequence | Mapping[str, Sequence]],
    tokens: tuple[int, int] | None = None,
    sentences: int | None = None,
) -> dict[str, Any]:
    """One packed row of ``examples``, for a lean model: ``model(**pk.pack(examples))``.

    examples: (source ids, target ids) or (source ids, target ids, decoder input ids) of each sentence, as 1-d sequences
    of whole numbers; or mappings with "input_ids", "labels" and perhaps "decoder_input_ids". Labels of -100 are not
    trained on. Where decoder inputs are not given, the model makes them of the labels by its own rule.
    tokens: (T, T'), to fill the row up to that many, with sentences that have no labels. sentences: how many there are
    then, of which those at the end may be empty; so that all rows of a kind have one shape. No sentence that fills up
    is longer than the longest of ``examples``.

    Returns input_ids int64 (1, T); labels int64 (1, T'); decoder_input_ids int64 (1, T') where given; cu_seqlens and
    decoder_cu_seqlens int32 (sentences + 1,); longest, the tokens of the longest sentence on either side as a number:
    with it no device has to be asked. The loss and the gradients of the row are those of ``examples`` in padded rows.
    Raises InputError: no example, one without tokens or with others than whole numbers, one whose decoder inputs are
    not as many as its labels, more tokens or sentences than ``tokens`` and ``sentences`` say.
    """
    given = [_example(i, example) for i, example in enumerate(examples)]
    if not given:
        raise InputError("pack: there are no examples; expected one or more")
    if len({len(example) for example in given}) > 1:
        raise InputError("pack: some examples have decoder inputs and some have none; expected all or none")
    source, labels, *decoder = (np.concatenate(side)[None] for side in zip(*given, strict=True))
    arrays = {"input_ids": source, "labels": labels, **({"decoder_input_ids": decoder[0]} if decoder else {})}
    arrays |= {name: _boundaries(example[side] for example in given) for side, name in enumerate(BOUNDARIES)}
    row = {name: torch.from_numpy(array) for name, array in arrays.items()}
    row["input_ids"] = row["input_ids"].as_subclass(PackedIds)
    row["longest"] = max(len(side) for example in given for side in example)
    return filled(row, tokens, sentences)


def filled(row: dict[str, Any], tokens: tuple[int, int] | None, sentences: int | None) -> dict[str, Any]:
    """Returns ``row``, a packed row on the host, filled up to ``tokens`` and ``sentences`` as ``pack`` does it."""
    filling = [] if tokens is None else _filling(row, tokens)
    count = len(row["cu_seqlens"]) - 1 + len(filling)
    if sentences is not None:
        check_whole("pack: sentences", sentences)
        if count > sentences:
            of_them = f", {len(filling)} of them to fill the row" if filling else ""
            raise InputError(f"pack: there are {count} sentences{of_them}; expected at most sentences={sentences}")
    if not filling and sentences in (None, count):
        return row
    result = dict(row)
    for side, (name, rows) in enumerate(zip(BOUNDARIES, _SIDES, strict=True)):
        ends, sizes = row[name], [size[side] for size in filling] + [0] * ((sentences or count) - count)
        added = torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        result[name] = torch.cat([ends, ends[-1] + added])
        for key in rows:
            if key in row:  # a token that the model has
                token = IGNORE if key == "labels" else int(row[key][0, 0])
                result[key] = F.pad(row[key], (0, sum(sizes)), value=token)
    return result


class PackedIds(Tensor):
    """Source tokens of a packed row. A model that takes no notice of ``cu_seqlens`` cannot look them up."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.embedding:
            raise InputError(
                "cu_seqlens: a model that is not lean reads no packed rows; expected pk.lean(model) before, or padded "
                "rows"
            )
        return super().__torch_function__(function, types, args, kwargs or {})


def _example(index: int, example: Sequence | Mapping) -> tuple[np.ndarray, ...]:
    if isinstance(example, Mapping):
        names = ("input_ids", "labels", *(["decoder_input_ids"] if "decoder_input_ids" in example else []))
        missing = [name for name in names if name not in example]
        if missing:
            raise InputError(f"pack: example {index} has no {missing[0]}; expected input_ids and labels")
        sides = [example[name] for name in names]
    else:
        sides = list(example) if isinstance(example, (tuple, list)) else [example]
        if len(sides) not in (2, 3):
            raise InputError(f"pack: example {index} is {shown(example)}; expected (source ids, target ids)")
    arrays = tuple(_ids(index, name, side) for name, side in zip(("source", "target", "decoder"), sides, strict=False))
    if len(arrays) == 3 and len(arrays[2]) != len(arrays[1]):
        raise InputError(
            f"pack: example {index} has {len(arrays[2])} decoder inputs; expected as many as labels, {len(arrays[1])}"
        )
    return arrays


def _ids(index: int, name: str, side: Any) -> np.ndarray:
    try:
        array = np.asarray(side.cpu() if isinstance(side, Tensor) else side)
    except (TypeError, ValueError):  # lists of lists, say
        array = np.zeros(0)
    if array.ndim != 1 or not array.size or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"pack: example {index}: its {name} is {shown(side)}; expected one token id or more")
    return array.astype(np.int64, copy=False)


def _filling(row: dict[str, Any], tokens: tuple[int, int]) -> list[list[int]]:
    """Returns the source and the target tokens of each sentence that fills ``row`` up to ``tokens``."""
    if not isinstance(tokens, (tuple, list)) or len(tokens) != 2:
        raise InputError(f"pack: tokens {shown(tokens)}; expected (source tokens, target tokens)")
    left = []
    for name, key, wanted in zip(("source", "target"), ("input_ids", "labels"), tokens, strict=True):
        check_whole(f"pack: tokens of the {name}", wanted)
        count = row[key].shape[1]
        if count > wanted:
            raise InputError(f"pack: there are {count} {name} tokens; expected at most the {wanted} of tokens")
        left.append(wanted - count)
    filling = []
    while any(left):
        sizes = [min(count, row["longest"]) for count in left]
        filling.append(sizes)
        left = [count - size for count, size in zip(left, sizes, strict=True)]
    return filling


def _boundaries(sides: Iterator[np.ndarray]) -> np.ndarray:
    return np.cumsum([0, *map(len, sides)], dtype=np.int32)


# ---- reading them ---------------------------------------------------------------------------------------------------


def has_boundaries(inputs: dict) -> bool:
    """Whether ``inputs`` of a model are a packed row."""
    return any(inputs.get(name) is not None for name in BOUNDARIES)


@contextmanager
def unpacked(model: nn.Module, inputs: dict) -> Iterator[dict]:
    """What ``model`` is called with for the packed row ``inputs``, while positions of this thread are those of the row.

    Raises InputError where the row is none, or where ``model`` cannot read it.
    """
    row, places = _read(model, inputs)
    before, _running.positions = _running.positions, places
    try:
        yield row
    finally:
        _running.positions = before


@torch.compiler.disable
def _read(model: nn.Module, inputs: dict) -> tuple[dict, dict[int, Tensor]]:
    """(what the model is called with, the rows that its tables of positions give)"""
    reason = obstacle(model)
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
    return {**row, **masks, "use_cache": False}, _places(model, row, source, target, longest)


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


def _places(model: nn.Module, row: dict, source: _Side, target: _Side, longest: int) -> dict[int, Tensor]:
    """id of a position embedding -> the rows of its table, where the model has such."""
    sides = (model.get_encoder(), source, row["input_ids"]), (model.get_decoder(), target, row["decoder_input_ids"])
    return {
        id(stack.embed_positions): _positions(stack.embed_positions, side, ids, longest)
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
    """The tokens of one side of a packed row, (1, tokens), and where its sentences begin."""

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
        """(sentence, place in it) of each token, both int64 (tokens,)."""
        at = torch.arange(self.tokens.shape[1], device=self.ends.device, dtype=torch.int32)
        sentence = torch.searchsorted(self.ends[1:], at, right=True)
        return sentence, (at - self.ends[sentence]).long()

    def longest(self) -> int:
        """Tokens of the longest sentence, read from the device. Raises InputError for ends that are none."""
        ends, tokens = self.ends.tolist(), self.tokens.shape[1]
        if ends[0] != 0 or ends[-1] != tokens or any(end < start for start, end in pairwise(ends)):
            raise InputError(f"{self.name}: {shown(ends)}; expected to rise from 0 to {tokens}, the number of tokens")
        return max(end - start for start, end in pairwise(ends))

    def shifted(self, model: nn.Module, longest: int) -> Tensor:
        """What the decoder reads to predict the labels, by the rule of ``model`` for each sentence."""
        sentence, place = self.places
        rows = self.tokens.new_full((len(self.ends) - 1, longest), IGNORE)
        rows[sentence, place] = self.tokens[0]
        nothing = (rows == IGNORE).all(1)  # mBART's rule looks for the last label, and a filled row may have none
        rows[:, 0] = rows[:, 0].masked_fill(nothing, 0)
        return decoder_inputs(model, rows)[sentence, place][None]


def _longest(given: Any, source: _Side, target: _Side) -> int:
    """``given``, or what the boundaries say, which waits for a device."""
    if given is not None:
        check_whole("longest", given)
    waits = source.ends.device.type in device_masks.WAITED_FOR or isinstance(source.ends, FakeTensor)
    if given is not None and waits:
        return given
    found = max(source.longest(), target.longest())
    if given is not None and given < found:
        raise InputError(f"longest: {given}; expected {found}, the tokens of the longest sentence, or more")
    return found if given is None else given


# ---- positions ------------------------------------------------------------------------------------------------------


class _Running(threading.local):
    """id of a module -> the rows of its table that the row of this thread takes; None where no row is packed."""

    positions: dict[int, Tensor] | None = None


_running = _Running()


class PackedPositions:
    """Before a class of ``POSITIONS``: as it was, but for packed rows."""

    def forward(self, *args, **kwargs):
        if _running.positions is None or id(self) not in _running.positions:
            return super().forward(*args, **kwargs)
        rows = _running.positions[id(self)]
        if isinstance(self, nn.Embedding):
            return nn.Embedding.forward(self, rows)
        return self.weights[rows].detach()

    def __reduce_ex__(self, protocol):
        return _bare, type(self).petl_bases, self.__dict__


def _positions(module: nn.Module, side: _Side, ids: Tensor, longest: int) -> Tensor:
    """The rows (1, tokens) of the table of ``module`` for the tokens ``ids``."""
    sentence, place = side.places
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
    return ((before[1:] - before[side.ends[sentence].long()]) * counts + pad)[None]


@functools.cache
def _class(original: type) -> type:
    members = {"__module__": original.__module__, "__qualname__": original.__qualname__, "petl_bases": (original,)}
    return type(original.__name__, (PackedPositions, original), members)


def _bare(original: type) -> nn.Module:
    cls = _class(original)
    return cls.__new__(cls)


def packed_positions(model: nn.Module) -> None:
    """Let the position embeddings in ``model`` follow the sentences of packed rows, where it is known how."""
    for module in model.modules():
        if not isinstance(module, PackedPositions) and class_of(type(module).forward) in POSITIONS:
            module.__class__ = _class(type(module))


def plain_positions(model: nn.Module) -> None:
    """Undo ``packed_positions``."""
    for module in model.modules():
        if isinstance(module, PackedPositions):
            (module.__class__,) = type(module).petl_bases


# ---- what reads no packed rows --------------------------------------------------------------------------------------


def obstacle(model: nn.Module) -> str:
    """What in ``model``, whose loss is lean, reads no packed rows, and why; empty when all does.

    Of lean layers that step aside for a hook, say, their own forward tells.
    """
    for name, stack in (("encoder", model.get_encoder()), ("decoder", model.get_decoder())):
        if class_that_runs(stack) not in STACKS:
            return f"the {name} is a {type(stack).__name__} with a forward of its own"
        layers = stack.layers if hasattr(stack, "layers") else stack.block
        if not all(isinstance(layer, LeanLayer) for layer in layers):
            return first_plain_layer(model)
        positions = getattr(stack, "embed_positions", None)
        if positions is not None and (not isinstance(positions, PackedPositions) or "forward" in vars(positions)):
            return f"the positions of the {name} are a {type(positions).__name__}"
    return ""


def first_plain_layer(model: nn.Module) -> str:
    """The first layer that is not lean, and why; empty when all are."""
    plain = (f"{layer.path}: {layer.reason or 'not lean'}" for layer in layer_states(model) if not layer.tier)
    return next(plain, "")
