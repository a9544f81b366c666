"""attention in Triton: flash forward and backward, with the prefix as blocks of keys in front of the others.

Forward, one launch: a block of queries walks over the blocks of the prefix, then over those of the keys, with one
online softmax. Backward of short sentences, one launch: a program has a head of a sentence, and makes scores and mask
once for all gradients. Longer ones, and those with a prefix, have two launches: dq by blocks of queries (with delta,
which it leaves for the other), dk and dv by blocks of keys; a prefix adds one of the latter kind, whose sums over each
batch row are added in a fixed order.

The gradient of a bias by distance is a launch of its own, which makes scores again by blocks of distances. The kernels
are in ``attention_forward.py`` and ``attention_backward.py``, on the scores of ``attention_scores.py``.

A gradient of the bias and more than MAX_FEATURES features go to the reference, which works in chunks.
"""

from __future__ import annotations

import torch

from petl_kernels.backends.triton import config
from petl_kernels.backends.triton.attention_backward import (
    _distance_gradient_kernel,
    _key_gradients_kernel,
    _query_gradient_kernel,
    _sentence_gradients_kernel,
)
from petl_kernels.backends.triton.attention_forward import _attention_kernel
from petl_kernels.backends.triton.common import dropout_arguments, launch
from petl_kernels.backends.triton.registry import reference, serves, serves_with_room
from petl_kernels.ops.attention_reference import mask_columns

MAX_FEATURES = 128


@serves
def attention(q, k, v, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, cu_q, cu_k, distance_bias):
    arguments = q, k, v, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, cu_q, cu_k, distance_bias
    if q.shape[3] > MAX_FEATURES:
        return reference("attention")(*arguments)
    batch, heads, queries, _ = q.shape
    o, lse = _like_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    if o.numel() == 0:
        return o, lse
    given = _Inputs(*arguments)
    tile = config.attention_tile(config.ATTENTION_FORWARD, q, dropout, distance_bias is not None)
    launch(
        _attention_kernel, (config.cdiv(queries, tile.m), batch * heads),
        o, lse, *given.tensors(), *given.packed(), *given.sizes(), _strides(o), *given.strides(), *given.numbers(),
        **given.constexprs(), BITS=given.bits(), BM=tile.m, BN=tile.n, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return o, lse


@serves_with_room
def attention_backward(
    do, q, k, v, o, lse, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, need_dbias,
    cu_q, cu_k, distance_bias, need_ddistance_bias, outs=None,
):  # fmt: skip
    """Returns (dq, dk, dv, dbias, dprefix_k, dprefix_v, ddistance_bias); ``outs`` takes the first three.

    outs: views (B, H, L, D) of any strides whose features are adjacent."""
    arguments = mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed
    packed = cu_q, cu_k, distance_bias
    if need_dbias or q.shape[3] > MAX_FEATURES:
        grads = reference("attention_backward")(
            do, q, k, v, o, lse, *arguments, need_dbias, *packed, need_ddistance_bias
        )
        if outs is None:
            return grads
        return *(out.copy_(own) for out, own in zip(outs, grads[:3], strict=True)), *grads[3:]
    given = _Inputs(q, k, v, *arguments, *packed)
    dq, dk, dv = (_like_heads(x) for x in (q, k, v)) if outs is None else outs
    do, o = _adjacent(do), _adjacent(o)
    delta = torch.empty_like(lse)
    tile = config.attention_sentence_tile(q, given.sentences(), cu_q is not None)
    if tile is None or given.prefix or need_ddistance_bias:
        dprefix = _gradients_by_blocks(dq, dk, dv, delta, do, o, lse, given)
    else:
        dprefix = (lse.new_empty(0, *q.shape[1::2]) for _ in range(2))
        _gradients_of_sentences(dq, dk, dv, delta, do, o, lse, given, tile)
    ddistance = _distance_gradient(do, lse, delta, given) if need_ddistance_bias else q.new_empty(0)
    return dq, dk, dv, q.new_empty(0), *dprefix, ddistance


def _gradients_of_sentences(dq, dk, dv, delta, do, o, lse, given: _Inputs, tile: config.Tile) -> None:
    """Launches one program for each head of each sentence."""
    if dq.numel() == dk.numel() == 0:
        return
    _, heads, queries, features = dq.shape
    launch(
        _sentence_gradients_kernel, (given.sentences(), heads),
        dq, dk, dv, delta, do, o, lse, *given.tensors()[:5], given.seed, *given.packed()[:3], given.packed()[4],
        queries, given.k.shape[2], features, given.columns,
        *map(_strides, (dq, dk, dv, do, o)), *given.strides(), *given.numbers(), **given.constexprs(),
        BM=tile.m, BN=tile.n, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def _gradients_by_blocks(dq, dk, dv, delta, do, o, lse, given: _Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes dq by blocks of queries, dk and dv by blocks of keys; returns the gradients of the prefix."""
    batch, heads, queries, features = dq.shape
    tile = config.attention_tile(config.ATTENTION_BACKWARD, given.q, given.dropout, given.distance_bias is not None)
    options = {"BM": tile.m, "BN": tile.n, "warps": tile.warps, "stages": tile.stages}
    if dq.numel() > 0:
        launch(
            _query_gradient_kernel, (config.cdiv(queries, tile.m), batch * heads),
            dq, delta, do, o, lse, *given.tensors(), *given.packed(), *given.sizes(),
            _strides(dq), _strides(do), _strides(o), *given.strides(), *given.numbers(),
            **given.constexprs(), BITS=given.bits(), **options,
        )  # fmt: skip

    def key_gradients(dk, dv, given: _Inputs, first: int) -> None:
        if dk.numel() > 0:
            launch(
                _key_gradients_kernel, (config.cdiv(dk.shape[2], tile.n), batch * heads),
                dk, dv, do, lse, delta, *given.tensors()[:5], given.seed, *given.packed(), *given.sizes()[:3], features,
                first, given.columns, *map(_strides, (dk, dv, do)), *given.strides(), *given.numbers(),
                **given.constexprs(), BITS=given.bits(), **options,
            )  # fmt: skip

    key_gradients(dk, dv, given, given.first)
    if not given.prefix:
        return lse.new_empty(0, heads, features), lse.new_empty(0, heads, features)
    partials = lse.new_empty(2, batch, heads, given.prefix, features)
    own_k, own_v = partials
    key_gradients(own_k, own_v, given.of_prefix(), 0)
    of_k, of_v = partials.sum(1).transpose(1, 2).contiguous()
    return of_k, of_v


def _distance_gradient(do, lse, delta, given: _Inputs) -> torch.Tensor:
    """Returns the gradient (H, 2R + 1) of the bias by distance: the programs' partial sums, added in their order."""
    assert given.distance_bias is not None, "a gradient of the bias that is there"
    batch, heads, queries, _ = given.q.shape
    distances, tile = given.distance_bias.shape[1], config.attention_distances_tile(given.q)
    blocks, tiles = config.cdiv(distances, tile.k), batch * config.cdiv(queries, tile.m)
    parts = max(1, min(tiles, config.cdiv(2 * config.processors(do.device), blocks * heads)))
    partials = do.new_zeros(parts, heads, distances, dtype=torch.float32)
    if tiles:
        launch(
            _distance_gradient_kernel, (blocks, heads, parts),
            partials, do, lse, delta, *given.tensors()[:5], given.seed, *given.packed(), *given.sizes(), tiles,
            _strides(do), *given.strides(), *given.numbers(),
            **given.constexprs(), BITS=given.bits(), BM=tile.m, BN=tile.n, BR=tile.k,
            warps=tile.warps, stages=tile.stages,
        )  # fmt: skip
    return partials.sum(0)


class _Inputs:
    """Holds the kernels' common arguments."""

    def __init__(
        self, q, k, v, mask, bias, prefix_k, prefix_v, causal, scale, dropout, seed, cu_q, cu_k, distance_bias
    ):
        self.q, self.k, self.v = _adjacent(q), _adjacent(k), _adjacent(v)
        self.mask = mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask
        self.bias, self.causal, self.scale, self.dropout, self.seed = bias, causal, scale, dropout, seed
        self.cu_q, self.cu_k = (cu if cu is None else cu.contiguous() for cu in (cu_q, cu_k))
        self.distance_bias = distance_bias if distance_bias is None else distance_bias.contiguous()
        self.prefix = 0 if prefix_k is None else prefix_k.shape[0]
        self.prefix_k, self.prefix_v = (
            p.to(q.dtype).contiguous() if p is not None and self.prefix else None for p in (prefix_k, prefix_v)
        )
        self.first, self.columns = mask_columns(self.prefix, k.shape[2])

    def of_prefix(self) -> _Inputs:
        """Returns the inputs of the same queries with the prefix as their only keys, all of which they see."""
        own = (p for p in (self.prefix_k, self.prefix_v) if p is not None)
        k, v = (p.transpose(0, 1).expand(self.q.shape[0], -1, -1, -1) for p in own)
        nothing = None, None, None
        part = _Inputs(self.q, k, v, None, *nothing, False, self.scale, self.dropout, self.seed, *nothing)
        part.columns, part.first = self.columns, 0
        return part

    def tensors(self) -> tuple:
        return self.q, self.k, self.v, self.mask, self.bias, self.prefix_k, self.prefix_v, self.seed

    def packed(self) -> tuple:
        sentences = 0 if self.cu_q is None else self.cu_q.shape[0] - 1
        reach = 0 if self.distance_bias is None else self.distance_bias.shape[1] // 2
        return self.cu_q, self.cu_k, self.distance_bias, sentences, reach

    def sizes(self) -> tuple:
        _, heads, queries, features = self.q.shape
        return heads, queries, self.k.shape[2], features, self.prefix, self.first, self.columns

    def strides(self) -> tuple:
        return *map(_strides, (self.q, self.k, self.v)), _of_mask(self.mask), _broadcast(self.bias)

    def numbers(self) -> tuple:
        _, threshold, keep_scale, _ = dropout_arguments(self.dropout, self.seed)
        return self.scale, threshold, keep_scale

    def constexprs(self) -> dict:
        block = config.padded(self.q.shape[3], MAX_FEATURES)
        return {"CAUSAL": self.causal, "DROPOUT": self.dropout > 0, "BD": block}

    def sentences(self) -> int:
        return self.q.shape[0] if self.cu_q is None else self.cu_q.shape[0] - 1

    def bits(self) -> int:
        """Returns how many bits the number of a packed row's sentence has."""
        return max(0, self.packed()[3] - 1).bit_length()


def _like_heads(x: torch.Tensor) -> torch.Tensor:
    batch, heads, length, features = x.shape
    return x.new_empty(batch, length, heads, features).transpose(1, 2)


def _adjacent(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _strides(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(x.stride()[:3])


def _broadcast(x: torch.Tensor | None) -> tuple[int, ...]:
    if x is None:
        return 0, 0, 0, 0
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _of_mask(mask: torch.Tensor | None) -> tuple[int | None, ...]:
    """Returns the strides of a mask; None for that of rows where all queries share one row, which is then read once."""
    batch, head, row, column = _broadcast(mask)
    return batch, head, None if mask is not None and mask.shape[2] == 1 else row, column
