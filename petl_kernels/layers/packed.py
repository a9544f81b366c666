"""Packed rows: sentences one after the other in one row, without padding.

    input_ids          (1, T)     the source tokens of n sentences
    labels             (1, T')    the target tokens of the same sentences
    cu_seqlens         (n + 1,)   where each source begins, and T
    decoder_cu_seqlens (n + 1,)   where each target begins, and T'

A lean model takes these in the place of padded rows and masks (``packed_model.py``), with the loss and the gradients of
the padded sentences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from petl_kernels.errors import InputError, check_whole, shown

IGNORE = -100  # the label of a token that is not trained on
BOUNDARIES = ("cu_seqlens", "decoder_cu_seqlens")
_SIDES = (("input_ids",), ("labels", "decoder_input_ids"))  # the tensors that each of the two bounds


def pack(
    examples: Sequence[Sequence | Mapping[str, Sequence]],
    tokens: tuple[int, int] | None = None,
    sentences: int | None = None,
) -> dict[str, Any]:
    """Returns one packed row of ``examples``, for a lean model: ``model(**pk.pack(examples))``.

    examples: (source ids, target ids) or (source ids, target ids, decoder input ids) of each sentence, as 1-d sequences
    of whole numbers; or mappings with "input_ids", "labels" and perhaps "decoder_input_ids". Labels of -100 are not
    trained on. Where decoder inputs are not given, the model makes them of the labels by its own rule.
    tokens: (T, T'), to fill the row up to that many with sentences without labels, none longer than the longest of
    ``examples``. sentences: to add empty ones up to that many. So all rows of a kind can have one shape.

    Returns input_ids int64 (1, T); labels int64 (1, T'); decoder_input_ids int64 (1, T') where given; cu_seqlens and
    decoder_cu_seqlens int32 (sentences + 1,); longest, the tokens of the longest sentence on either side as a number,
    with which the host need not wait for a device. The loss and the gradients are those of ``examples`` in padded rows.
    Raises InputError for no example, one without tokens or with others than whole numbers, one whose decoder inputs are
    not as many as its labels, and for more tokens or sentences than ``tokens`` and ``sentences``.
    """
    given = [_example(i, example) for i, example in enumerate(examples)]
    if not given:
        raise InputError("pack: there are no examples; expected one or more")
    if len({len(example) for example in given}) > 1:
        raise InputError("pack: some examples have decoder inputs and some have none; expected all or none")
    source, labels, *decoder = (np.concatenate(side)[None] for side in zip(*given, strict=True))
    arrays = {"input_ids": source, "labels": labels, **({"decoder_input_ids": decoder[0]} if decoder else {})}
    arrays |= {name: _boundaries(example[side] for example in given) for side, name in enumerate(BOUNDARIES)}
    row: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    row["input_ids"] = row["input_ids"].as_subclass(PackedIds)
    row["longest"] = max(len(side) for example in given for side in example)
    return filled(row, tokens, sentences)


def filled(row: dict[str, Any], tokens: tuple[int, int] | None, sentences: int | None) -> dict[str, Any]:
    """Returns ``row``, a packed row on the host, filled up to ``tokens`` and ``sentences`` as by ``pack``."""
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
    """Source tokens of a packed row. A model that ignores ``cu_seqlens`` gets InputError from its embedding."""

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
    """Returns the numbers of source and target tokens of each sentence that fills ``row`` up to ``tokens``."""
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
