"""The feed-forward block, which ends a layer: h = x + drop(ffn(u)), with a norm before it or after it.

    pre-norm     u = LN(x)      the layer's output is h
    post-norm    u = x          the layer's output is LN(h)

The network runs in one of three ways:

    frozen    by ``ops.frozen_ffn``, where its linears are frozen and plain; it saves a ReLU's bits, or z (and gate)
    wide      by ``ops.parallel_ffn``: the same, with a parallel adapter as more hidden units
    open      as linears, activation and linear, each with its adapters

An adapter on the last linear reads its output; a parallel one that is not among the hidden units reads u.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from petl_kernels.layers.blocks import FeedForwardBlock
from petl_kernels.layers.pieces import active_piece
from petl_kernels.layers.rule.bottleneck import Bottleneck
from petl_kernels.layers.rule.call import Call, Gradients, Place, summed
from petl_kernels.layers.rule.linears import Linear, Linears, Unknown
from petl_kernels.layers.rule.norm import Norm
from petl_kernels.layers.rule.residual import Residual
from petl_kernels.methods.adapter import BottleneckAdapter, ParallelAdapter, PostNormPfeiffer, ReadInput
from petl_kernels.methods.ia3 import Scale
from petl_kernels.methods.pieces import Piece
from petl_kernels.methods.ssf import ScaleShift
from petl_kernels.ops.define import run
from petl_kernels.ops.frozen_ffn import what_to_keep
from petl_kernels.ops.parallel_ffn import fill
from petl_kernels.ops.quantized import parts_of

BLOCK = "ffn"
READ, END = Place(BLOCK, "adapted_read"), Place(BLOCK, "end")
BITS, Z, GATE, HIDDEN = (Place(BLOCK, name) for name in ("bits", "z", "gate", "hidden"))
PROJECTED = Place(BLOCK, "read")
HIDDEN_SEED = f"{BLOCK}.hidden"


class FeedForward:
    """The feed-forward block, bound.

    inner: the network. after: the adapter that reads the last linear's output, beside: the one that reads u; or None.
    end: the sum, and the norm of a post-norm block. wide_out: whether the last linear computes in fp32 beside inputs in
    fp16, as T5's does.
    """

    def __init__(self, block: FeedForwardBlock, wide_out: bool):
        block.release_unused()
        self.block, self.pre_norm, self.norm = block, block.pre_norm, Norm(BLOCK, block.norm)
        named = {str(i): module for i, module in enumerate((*block.inputs, block.out))}
        self.linears = Linears(BLOCK, named).all
        frozen = not wide_out and _is_frozen(block, self.linears)
        wide = frozen and block.is_wide()
        self.inner = Wide(block) if wide else Frozen(block) if frozen else Open(block, wide_out)
        self.wide_out = wide_out
        self.after, self.beside = _adapters(block, wide)
        if self.pre_norm and self.norm.piece is not None:
            raise Unknown("an adapter on the norm before a feed-forward network")
        residual = Residual(BLOCK, block.residual_dropout)
        if block.post is not None:
            self.end = NormAndSum(residual, Norm(f"{BLOCK}.post", block.post), self.after)
        else:
            self.end = Sum(residual) if self.pre_norm else SumAndNorm(residual, self.norm, self.norm.piece)
        self.reads_u = self.inner.reads_u or self.beside is not None
        adapters = [adapter for adapter in (self.after, self.beside) if adapter is not None]
        self.bound = [tensor for part in (self.norm, self.inner, *adapters, self.end) for tensor in part.bound]
        self.trains_norm = any(tensor.requires_grad for tensor in self.norm.bound)

    def holds(self) -> bool:
        """Returns whether the weights of a wide network are still in its buffers."""
        return not isinstance(self.inner, Wide) or self.block.is_wide()

    def forward(self, x: Tensor, u: Tensor, call: Call) -> Tensor:
        """Returns the layer's output."""
        u = call.cast(u)
        y = self.inner.forward(u, call)
        if self.beside:
            y = self.beside.forward(u.to(y.dtype), y, call)
        if self.after:
            call.save(READ, y)
            y = self.after.forward(y, None, call)
        return self.end.forward(y, x, call)

    def backward(self, dy: Tensor, x: Tensor, call: Call, gradients: Gradients) -> tuple[Tensor, Tensor]:
        """Returns dx, without what comes through u, and du."""
        dtype = torch.float32 if self.wide_out else call.dtype or x.dtype
        dh, e = self.end.backward(dy, dtype, call, gradients)
        if self.after:
            e = self.after.backward(e, call.saved[READ.key], True, call, gradients)
        u = None
        if self.reads_u or self.inner.recomputes(call):
            u = call.cast(self.norm.recomputed(x, call) if self.pre_norm else x)
        du = self.inner.backward(e, u, call, gradients)
        if self.beside:
            assert u is not None, "an adapter beside the network reads u"
            du = summed(du, self.beside.backward(e, u.to(e.dtype), False, call, gradients))
        return dh.to(x.dtype), du


class Sum:
    """The end of a pre-norm layer: h = x + drop(y)."""

    def __init__(self, residual: Residual):
        self.residual, self.bound = residual, []

    def forward(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        return self.residual.add(y, x, call)

    def backward(self, dh: Tensor, dtype: torch.dtype, call: Call, gradients: Gradients) -> tuple[Tensor, Tensor]:
        """Returns the gradients of x and of y, the latter in ``dtype``."""
        return dh, self.residual.backward(dh, dtype, call)


class NormAndSum:
    """The end of a layer with a norm behind its network: h = x + drop(post(y)).

    after: the adapter that y is the output of, or None: y is saved then only as what the adapter reads.
    """

    def __init__(self, residual: Residual, post: Norm, after: Bottleneck | None):
        if post.piece is not None:
            raise Unknown("an adapter on the norm behind a feed-forward network")
        self.residual, self.post, self.after, self.bound = residual, post, after, post.bound

    def forward(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        if self.after is None:
            call.save(END, y)
        return self.residual.add(self.post.forward(y, call), x, call)

    def backward(self, dh: Tensor, dtype: torch.dtype, call: Call, gradients: Gradients) -> tuple[Tensor, Tensor]:
        """Returns the gradients of x and of y, the latter in ``dtype``."""
        y = call.saved[END.key] if self.after is None else self.after.forward(call.saved[READ.key], None, call)
        return dh, self.post.backward(self.residual.backward(dh, dtype, call), None, y, call, gradients)


class SumAndNorm:
    """The end of a post-norm layer: LN(h), or LN(h + A(LN(h))) with Pfeiffer's adapter A."""

    def __init__(self, residual: Residual, norm: Norm, piece: Piece | None):
        if piece is not None and type(piece) is not PostNormPfeiffer:
            raise Unknown(f"a {type(piece).__name__} on the norm of the feed-forward block")
        self.residual, self.norm, self.adapter = residual, norm, None if piece is None else Bottleneck(piece)
        self.inner = norm if piece is None else norm.named(f"{BLOCK}.inner")
        self.bound = [] if self.adapter is None else self.adapter.bound

    def forward(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        h, u = self.residual.add_and_norm(y, x, self.inner, call)
        call.save(END, h)
        return u if self.adapter is None else self.norm.forward(_adapted(self.adapter, u, h, call), call)

    def backward(self, du: Tensor, dtype: torch.dtype, call: Call, gradients: Gradients) -> tuple[Tensor, Tensor]:
        """Returns the gradients of x and of y, the latter in ``dtype``."""
        h, dh = call.saved[END.key], None
        if self.adapter is not None:
            u = self.inner.recomputed(h, call)
            dh = self.norm.backward(du, None, _adapted(self.adapter, u, h, call), call, gradients)
            du = self.adapter.backward(dh, call.cast(u), False, call, gradients)
        return self.residual.norm_backward(du, dh, h, self.inner, dtype, call, gradients)


def _adapted(adapter: Bottleneck, u: Tensor, h: Tensor, call: Call) -> Tensor:
    return adapter.forward(call.cast(u), call.cast(h), call)


class Frozen:
    """A network with frozen weights, by the op that runs the tokens in chunks."""

    def __init__(self, block: FeedForwardBlock):
        first, out = block.inputs[0], block.out
        self.w1, self.c1, self.w2, self.c2 = parts_of(first.weight), first.bias, parts_of(out.weight), out.bias
        self.gate = parts_of(block.inputs[1].weight) if len(block.inputs) > 1 else []
        self.activation, self.bits = block.activation, block.activation == "relu" and not self.gate
        own = *self.w1, self.c1, *self.w2, self.c2, *self.gate
        self.bound = [tensor for tensor in own if tensor is not None]
        self.reads_u = False

    def recomputes(self, call: Call) -> bool:
        return self._keeps(call) == "x"

    def _keeps(self, call: Call) -> str:
        return what_to_keep(self.activation, bool(self.gate), not self.bits and call.tier > 1)

    def forward(self, u: Tensor, call: Call) -> Tensor:
        keeps = self._keeps(call) if call.saves_some else "nothing"
        weights = self.w1, self.c1, self.w2, self.c2, self.gate
        y, z, gate = run("frozen_ffn", u, *weights, self.activation, keeps, call.backend)
        call.save(BITS if self.bits else Z, z)
        if self.gate:
            call.save(GATE, gate)
        return y

    def backward(self, dy: Tensor, u: Tensor | None, call: Call, gradients: Gradients) -> Tensor:
        keeps, nothing = self._keeps(call), dy.new_empty(0)
        z = call.saved.get((BITS if self.bits else Z).key)
        gate = call.saved.get(GATE.key)
        need_dc1, need_dc2 = gradients.wants(self.c1), gradients.wants(self.c2)
        du, dc1, dc2 = run(
            "frozen_ffn_backward",
            dy,
            u if keeps == "x" else None,
            nothing if z is None else z,
            nothing if gate is None else gate,
            self.w1,
            self.c1,
            self.w2,
            self.gate,
            self.activation,
            keeps,
            True,
            need_dc1,
            need_dc2,
            call.backend,
        )
        if need_dc1:
            gradients.add(self.c1, dc1)
        if need_dc2:
            gradients.add(self.c2, dc2)
        return du


class Wide:
    """A frozen network with a parallel adapter among its hidden units."""

    def __init__(self, block: FeedForwardBlock):
        wide = block.wide
        assert wide is not None, "the block is wide"
        adapter = Bottleneck(wide.modules[2])
        self.w1, self.c1, self.w2, self.c2 = wide.w1, wide.c1, wide.w2, block.out.bias
        self.adapter, self.inner = adapter, adapter.parameters[2:]
        self.activation, self.bits = block.activation, block.activation == "relu"
        self.bound = adapter.bound if self.c2 is None else [*adapter.bound, self.c2]
        self.trains = any(tensor.requires_grad for tensor in adapter.bound)
        self.reads_u = self.trains

    def recomputes(self, call: Call) -> bool:
        return self._keeps(call) == "x"

    def _keeps(self, call: Call) -> str:
        return what_to_keep(self.activation, False, not self.bits and call.tier > 1)

    def _filled(self) -> Tensor | None:
        """Writes the adapter into the room of the buffers, and returns the bias of both."""
        return fill(self.w1, self.c1, self.w2, self.c2, *self.inner, self.adapter.scale)

    def forward(self, u: Tensor, call: Call) -> Tensor:
        c2 = self._filled()
        keeps = self._keeps(call) if call.saves_some else "nothing"
        own = *self.inner, self.activation, self.adapter.scale, keeps, call.backend
        y, z = run("parallel_ffn", u, self.w1, self.c1, self.w2, c2, *own)
        call.save(BITS if self.bits else Z, z)
        return y

    def backward(self, dy: Tensor, u: Tensor | None, call: Call, gradients: Gradients) -> Tensor:
        self._filled()  # another adapter may have been in the room since
        z = call.saved.get((BITS if self.bits else Z).key)
        *inner, up_bias = self.inner
        du, *found = run(
            "parallel_ffn_backward",
            dy,
            u,
            dy.new_empty(0) if z is None else z,
            self.w1,
            self.c1,
            self.w2,
            *inner,
            self.activation,
            self.adapter.scale,
            self._keeps(call),
            True,
            self.trains,
            up_bias is not None,
            call.backend,
        )
        for parameter, gradient in zip(self.inner, found, strict=True):
            if gradients.wants(parameter):
                gradients.add(parameter, gradient)
        return du


class Open:
    """Linears, activation and linear, one after the other."""

    def __init__(self, block: FeedForwardBlock, wide_out: bool):
        self.wide_out = wide_out
        names = ("z", "gate")[: len(block.inputs)]
        self.inputs = Linears(f"{BLOCK}.in", dict(zip(names, block.inputs, strict=True)))
        self.out = Linears(f"{BLOCK}.out", {"out": block.out})
        self.activation, self.dropout = block.activation, float(block.dropout)
        self.gated = len(block.inputs) > 1
        self.bits = self.activation == "relu" and not self.gated
        self.bound = [*self.inputs.bound, *self.out.bound]
        self.reads_u = self.inputs.reads_input
        self.scales = any(linear.after is not None for linear in self.inputs.all)

    def recomputes(self, call: Call) -> bool:
        hidden = self.out.reads_input and call.saved.get(HIDDEN.key) is None
        return hidden or ((self.scales or not self.bits) and call.saved.get(Z.key) is None)

    def forward(self, u: Tensor, call: Call) -> Tensor:
        raw = self.inputs.forward(u, call)
        if self.scales or not self.bits:
            for place, z in zip((Z, GATE), raw, strict=False):
                call.save(place, z)
        hidden = self._activate(raw, call)
        if self.out.reads_input:
            call.save(HIDDEN, hidden)
        y = self._projected(hidden, call)
        if self.out.all[0].after is not None:
            call.save(PROJECTED, y)
        return self.out.all[0].scaled(y, call)

    def _projected(self, hidden: Tensor, call: Call) -> Tensor:
        (y,) = self.out.forward(hidden.float() if self.wide_out else hidden, call)
        return y

    def _activate(self, raw: list[Tensor], call: Call) -> Tensor:
        zs = self._scaled(raw, call)
        seed = call.seed(HIDDEN_SEED, self.dropout)
        if self.gated:
            return run("gated_activation", *zs, self.activation, self.dropout, seed, call.backend)
        hidden, bits = run("activation", *zs, self.activation, self.dropout, seed, call.backend)
        if self.bits:
            call.save(BITS, bits)
        return hidden

    def _scaled(self, raw: list[Tensor], call: Call) -> list[Tensor]:
        return [linear.scaled(y, call) for linear, y in zip(self.inputs.all, raw, strict=True)]

    def backward(self, dy: Tensor, u: Tensor | None, call: Call, gradients: Gradients) -> Tensor:
        raw: list[Any] = [call.saved.get(place.key) for place in (Z, GATE)[: len(self.inputs.all)]]
        hidden = call.saved.get(HIDDEN.key)
        if self.recomputes(call):
            assert u is not None, "u is there where products are recomputed"
            raw = self.inputs.forward(u, call)
        if self.out.reads_input and hidden is None:
            hidden = self._activate(raw, call)
        read = call.saved.get(PROJECTED.key)
        if self.out.all[0].after is not None and read is None:
            read = self._projected(self._activate(raw, call) if hidden is None else hidden, call)
        if self.wide_out and hidden is not None:
            hidden = hidden.float()
        dhidden = self.out.backward([dy], hidden, [read], call, gradients, True)
        if self.wide_out:
            dhidden = call.cast(dhidden)
        seed = call.seeds.get(HIDDEN_SEED)
        if self.gated:
            zs = self._scaled(raw, call)
            dzs = run("gated_activation_backward", dhidden, *zs, self.activation, self.dropout, seed, call.backend)
        else:
            saved = call.saved[BITS.key] if self.bits else self._scaled(raw, call)[0]
            dzs = [run("activation_backward", dhidden, saved, self.activation, self.dropout, seed, call.backend)]
        return self.inputs.backward(list(dzs), u, raw, call, gradients, True)


def _is_frozen(block: FeedForwardBlock, linears: list[Linear]) -> bool:
    plain = all(not linear.reads_input and linear.after is None for linear in linears)
    gate_biased = len(block.inputs) > 1 and any(linear.bias is not None for linear in linears)
    return plain and block.dropout == 0 and not gate_biased


def _adapters(block: FeedForwardBlock, wide: bool) -> tuple[Bottleneck | None, Bottleneck | None]:
    """Returns the adapter that reads the last linear's output, and the one that reads u; None for one inside."""
    piece = active_piece(block.out)
    for module in block.inputs:
        own = active_piece(module)
        if own is not None and not isinstance(own, (ReadInput, Scale, ScaleShift)):
            raise Unknown(f"a {type(own).__name__} on the first linear of the feed-forward block")
    if piece is None or wide or isinstance(piece, (Scale, ScaleShift)):
        return None, None
    if type(piece) is ParallelAdapter:
        return None, Bottleneck(piece)
    if type(piece) is BottleneckAdapter:
        return Bottleneck(piece), None
    raise Unknown(f"a {type(piece).__name__} on the last linear of the feed-forward block")
