"""The prefixes of attentions, computed by their network while there is one.

    [P_k; P_v] = tanh(P' W_1ᵀ + b_1) W_2ᵀ + b_2

In one forward pass of a model (``one_pass``) the first attention of a kind computes the prefixes of all attentions of
this kind at once, keys and values as the rows of one product, in one node of the graph. So a step sums the network's
gradients once a kind, and not twice an attention. A layer that runs outside of such a pass, or has hooks of others,
computes its own prefix alone. A prefix that no attention has read gets no gradient, as if it did not exist.

A node saves tanh's output, (2 · length, 512) an attention, in the dtype of the network's parameters. The network works
in that dtype under autocast too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petl_kernels.layers.hooks import hooks_on
from petl_kernels.layers.rule.watch import changed, stamps
from petl_kernels.methods.prefix import Prefix
from petl_kernels.ops.define import accumulate_dtype, below_autograd

# In a forward pass of this thread: the prefixes, by attention and by (dtype, grad mode, inference mode).
_computed: ContextVar[dict[tuple, _Computed] | None] = ContextVar("petl_prefixes", default=None)


@contextmanager
def one_pass() -> Iterator[None]:
    """Marks one forward pass of a model: in this block the parameters of prefixes stay the same."""
    before = _computed.set({})
    try:
        yield
    finally:
        _computed.reset(before)


def keys_and_values(piece: Prefix, dtype: torch.dtype, together: bool) -> tuple[Tensor, Tensor]:
    """Returns keys and values of the prefix, (length, heads, head_dim) each, in ``dtype``.

    together: whether the prefixes of all attentions of the kind are computed with it.
    """
    computed = _computed.get() if together and piece.mlp is not None else None
    if computed is None:
        return _alone(piece, dtype)
    mode = dtype, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    found = computed.get((piece, mode))
    if found is None or not found.holds(piece):
        computed.update({(own.piece, mode): own for own in _together(piece, dtype)})
        found = computed.get((piece, mode))
    return _alone(piece, dtype) if found is None else found.rows


class _Computed:
    """The keys and values of one attention's prefix, and the parameters that they were computed from."""

    __slots__ = ("piece", "inputs", "rows")

    def __init__(self, piece: Prefix, rows: tuple[Tensor, Tensor]):
        self.piece, self.inputs, self.rows = piece, _inputs(piece), rows

    def holds(self, piece: Prefix) -> bool:
        """Returns whether they were computed from the parameters that the attention has now."""
        return all(map(is_, self.inputs, _inputs(piece)))


def _inputs(piece: Any) -> tuple[Tensor, ...]:
    first, _, second = piece.mlp[0]
    return piece.key, piece.value, first.weight, first.bias, second.weight, second.bias


def _alone(piece: Prefix, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if piece.mlp is not None and _is_plain(*piece.mlp):
        key, value = _network([piece], dtype)
        return key, value
    key, value = (own.to(dtype).view(-1, piece.heads, piece.head_dim) for own in piece.folded())
    return key, value


def _together(piece: Prefix, dtype: torch.dtype) -> Iterator[_Computed]:
    """Yields the prefixes of all attentions of the kind of ``piece``; none where they cannot be one product."""
    mlp: Any = piece.mlp
    if piece not in piece.kind or not _is_plain(*mlp):  # a replica's piece is not in its kind
        return
    group = [other for other in piece.kind if _is_like(other, piece)]
    rows = _network(group, dtype)
    yield from map(_Computed, group, zip(rows[::2], rows[1::2], strict=True))


def _is_like(other: Prefix, piece: Any) -> bool:
    """Returns whether both are rows for one product; not so where a tensor is elsewhere until its layer runs (FSDP)."""
    if other.mlp is None or other.mlp[0] is not piece.mlp[0]:
        return False
    mine = piece.key
    return all(
        own is not None
        and type(own) is type(mine)
        and (own.shape, own.dtype, own.device) == (mine.shape, mine.dtype, mine.device)
        for own in map(other._parameters.get, ("key", "value"))
    )


def _is_plain(mlp: Any) -> bool:
    """Returns whether the network is as this package builds it, without hooks or another forward."""
    if [type(part) for part in mlp.modules()] != [nn.Sequential, nn.Linear, nn.Tanh, nn.Linear]:
        return False
    seen = any(hooks_on(part) or "forward" in part.__dict__ for part in mlp.modules())
    return not seen and all(part.bias is not None for part in (mlp[0], mlp[2]))


# ---- the network ----------------------------------------------------------------------------------------------------


def _network(group: Sequence[Prefix], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Returns keys and values of each, one after the other, (length, heads, head_dim)."""
    mlp: Any = group[0].mlp
    first, _, second = mlp[0]
    shape = group[0].heads, group[0].head_dim
    inputs = [own for piece in group for own in (piece.key, piece.value)]
    read = first.weight, first.bias, second.weight, second.bias, *inputs
    if torch.is_grad_enabled():
        return _Network.apply(dtype, shape, *read)
    with below_autograd(first.weight.device.type):
        return _run(dtype, shape, read)[0]


def _run(dtype: torch.dtype, shape: tuple[int, int], read: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
    w1, b1, w2, b2, *inputs = read
    hidden = F.linear(torch.cat(inputs), w1, b1).tanh_()
    rows = F.linear(hidden, w2, b2).to(dtype)
    return rows.view(len(inputs), -1, *shape).unbind(), hidden


class _Network(torch.autograd.Function):
    """The network as one node. It holds the tensors that backward reads, which may run for one layer after another."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, shape: tuple[int, int], *read: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        with below_autograd(read[0].device.type):
            rows, ctx.hidden = _run(dtype, shape, read)
        ctx.read, ctx.stamps = read, stamps(list(read))
        return rows

    @staticmethod
    def backward(ctx, *drows: Tensor | None) -> tuple[Tensor | None, ...]:
        at = [i for i, own in enumerate(drows) if own is not None]  # the others are no part of the loss
        if not at:
            return (None,) * len(ctx.needs_input_grad)
        _refuse_changes(ctx.read, ctx.stamps, at)
        with torch.no_grad(), below_autograd(ctx.hidden.device.type):
            return None, None, *_gradients(ctx.read, ctx.hidden, drows, at, ctx.needs_input_grad[2:])


def _refuse_changes(read: Sequence[Tensor], before: bytes | list, at: Sequence[int]) -> None:
    now, each = stamps(list(read)), len(before) // len(read)
    for i in (0, 1, 2, 3, *(4 + i for i in at)):
        if now[i * each : (i + 1) * each] != before[i * each : (i + 1) * each]:
            names = "0.weight", "0.bias", "2.weight", "2.bias"
            raise changed(f"{names[i]} of the network of prefixes" if i < 4 else "the key or value of a prefix")


def _gradients(
    read: Sequence[Tensor], hidden: Tensor, drows: Sequence[Tensor | None], at: Sequence[int], needs: Sequence[bool]
) -> list[Tensor | None]:
    w1, _, w2, _, *inputs = read
    found: list[Tensor | None] = [None] * len(read)
    if len(at) < len(inputs):
        hidden = hidden.view(len(inputs), -1, hidden.shape[1])[at].flatten(0, 1)
    dy = torch.cat([own for own in drows if own is not None]).view(-1, w2.shape[0]).to(w2.dtype)
    dhidden = torch.ops.aten.tanh_backward(dy @ w2, hidden)
    if needs[0]:
        found[0] = dhidden.t() @ torch.cat([inputs[i] for i in at])
    if needs[1]:
        found[1] = _column_sums(dhidden)
    if needs[2]:
        found[2] = dy.t() @ hidden
    if needs[3]:
        found[3] = _column_sums(dy)
    if any(needs[4:]):
        for i, own in zip(at, (dhidden @ w1).view(len(at), -1, w1.shape[1]).unbind(), strict=True):
            found[4 + i] = own if needs[4 + i] else None
    return found


def _column_sums(dy: Tensor) -> Tensor:
    return dy.sum(0, dtype=accumulate_dtype(dy.dtype)).to(dy.dtype)
