"""The feed-forward block, which ends a layer: h = x + drop(ffn(u)), with a norm before it or after it.

    pre-norm     u = LN(x)      the layer's output is h
    post-norm    u = x          the layer's output is LN(h)

Three ways, by what adapters do to its linears:

    frozen    ``ops.frozen_ffn``: kept are the bits of a ReLU, or z (and the gate)
    wide      ``ops.parallel_ffn``: the same, with a parallel adapter as more hidden units
    open      linears, activation, linear, each with what adapters put on it

An adapter on the last linear reads its output; a parallel one that is not among the hidden units reads the block's
input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from petl_kernels.layers.blocks import FeedForwardBlock, is_wide
from petl_kernels.layers.rule.bottleneck import Bottleneck
from petl_kernels.layers.rule.call import Call, Gradients, Place, summed
from petl_kernels.layers.rule.linears import Linear, Linears, Unknown, current
from petl_kernels.layers.rule.norm import Norm
from petl_kernels.layers.rule.residual import Residual
from petl_kernels.methods.adapter import BottleneckAdapter, ParallelAdapter, PostNormPfeiffer, ReadInput
from petl_kernels.methods.base import Piece
from petl_kernels.methods.ia3 import Scale
from petl_kernels.ops.define import run
from petl_kernels.ops.frozen_ffn import what_to_keep
from petl_kernels.ops.parallel_ffn import fill
from petl_kernels.ops.quantized import parts_of

BLOCK = "ffn"
READ, END = Place(BLOCK, "adapted_read"), Place(BLOCK, "end")
BITS, Z, GATE, HIDDEN = (Place(BLOCK, name) for name in ("bits", "z", "gate", "hidden"))
PROJECTED = Place(BLOCK, "read")
DROPPED = f"{BLOCK}.hidden"  # name of a seed


class FeedForward:
    """The feed-forward block as the rule reads it."""

    def __init__(self, parts: FeedForwardBlock):
        wide = is_wide(parts)  # in any case: it lets go of weights that are trained by now
        self.parts, self.pre_norm, self.norm = parts, parts.pre_norm, Norm(BLOCK, parts.norm)
        named = {str(i): module for i, module in enumerate((*parts.inputs, parts.out))}
        self.linears = Linears(BLOCK, named).all
        frozen = _is_frozen(parts, self.linears)
        wide = wide and frozen
        self.inner = Wide(parts) if wide else Frozen(parts) if frozen else Open(parts)
        self.after, self.beside = _adapters(parts, wide)
        residual = Residual(BLOCK, parts.residual_dropout)
        self.end = Sum(residual) if self.pre_norm else SumAndNorm(residual, self.norm, current(parts.norm))
        self.reads_u = self.inner.reads_u or self.beside is not None
        adapters = [adapter for adapter in (self.after, self.beside) if adapter is not None]
        self.bound = [tensor for part in (self.norm, self.inner, *adapters, self.end) for tensor in part.bound]
        self.trains_norm = any(tensor.requires_grad for tensor in self.norm.bound)

    def holds(self) -> bool:
        """Whether a network with an adapter inside still has its weights there."""
        return not isinstance(self.inner, Wide) or is_wide(self.parts)

    def forward(self, x: Tensor, u: Tensor, call: Call) -> Tensor:
        """Returns the layer's output."""
        u = call.cast(u)
        y = self.inner.forward(u, call)
        if self.beside:
            y = self.beside.forward(u.to(y.dtype), y, call)
        if self.after:
            call.keep(READ, y)
            y = self.after.forward(y, None, call)
        return self.end.forward(y, x, call)

    def backward(self, dy: Tensor, x: Tensor, call: Call, gradients: Gradients) -> tuple[Tensor, Tensor]:
        """Returns dx, without what comes through u, and du."""
        dh, e = self.end.backward(dy, call.dtype or x.dtype, call, gradients)
        if self.after:
            e = self.after.backward(e, call.kept[READ.key], True, call, gradients, True)
        u = None
        if self.reads_u or self.inner.makes_again(call):
            u = call.cast(self.norm.again(x, call) if self.pre_norm else x)
        du = self.inner.backward(e, u, call, gradients, True)
        if self.beside:
            du = summed(du, self.beside.backward(e, u, False, call, gradients, True))
        return dh, du


class Sum:
    """The end of a pre-norm layer: h = x + drop(y)."""

    def __init__(self, residual: Residual):
        self.residual, self.bound = residual, []

    def forward(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        return self.residual.add(y, x, call)

    def backward(self, dh: Tensor, dtype: torch.dtype, call: Call, gradients: Gradients) -> tuple[Tensor, Tensor]:
        """Returns the gradients of x and of y, the latter in ``dtype``."""
        return dh, self.residual.backward(dh, dtype, call)


class SumAndNorm:
    """The end of a post-norm layer: LN(h) of that sum, or LN(h + A(LN(h))) with Pfeiffer's adapter."""

    def __init__(self, residual: Residual, norm: Norm, piece: Piece | None):
        if piece is not None and type(piece) is not PostNormPfeiffer:
            raise Unknown(f"a {type(piece).__name__} on the norm of the feed-forward block")
        self.residual, self.norm, self.adapter = residual, norm, None if piece is None else Bottleneck(piece)
        self.inner = norm if piece is None else norm.named(f"{BLOCK}.inner")
        self.bound = [] if self.adapter is None else self.adapter.bound

    def forward(self, y: Tensor, x: Tensor, call: Call) -> Tensor:
        h, u = self.residual.add_and_norm(y, x, self.inner, call)
        call.keep(END, h)
        return u if self.adapter is None else self.norm.forward(self._adapted(u, h, call), call)

    def _adapted(self, u: Tensor, h: Tensor, call: Call) -> Tensor:
        return self.adapter.forward(call.cast(u), call.cast(h), call)

    def backward(self, du: Tensor, dtype: torch.dtype, call: Call, gradients: Gradients) -> tuple[Tensor, Tensor]:
        """Returns the gradients of x and of y, the latter in ``dtype``."""
        h, dh = call.kept[END.key], None
        if self.adapter is not None:
            u = self.inner.again(h, call)
            dh = self.norm.backward(du, None, self._adapted(u, h, call), call, gradients)
            du = self.adapter.backward(dh, call.cast(u), False, call, gradients, True)
        return self.residual.norm_backward(du, dh, h, self.inner, dtype, call, gradients)


class Frozen:
    """A network whose weights are frozen, by the op that goes through the tokens in chunks."""

    def __init__(self, parts: FeedForwardBlock):
        first, out = parts.inputs[0], parts.out
        self.w1, self.c1, self.w2, self.c2 = parts_of(first.weight), first.bias, parts_of(out.weight), out.bias
        self.gate = parts_of(parts.inputs[1].weight) if len(parts.inputs) > 1 else []
        self.activation, self.bits = parts.activation, parts.activation == "relu" and not self.gate
        own = *self.w1, self.c1, *self.w2, self.c2, *self.gate
        self.bound = [tensor for tensor in own if tensor is not None]
        self.reads_u = False

    def makes_again(self, call: Call) -> bool:
        return self._keeps(call) == "x"

    def _keeps(self, call: Call) -> str:
        return what_to_keep(self.activation, bool(self.gate), not self.bits and call.tier > 1)

    def forward(self, u: Tensor, call: Call) -> Tensor:
        keeps = self._keeps(call) if call.keeps_some else "nothing"
        weights = self.w1, self.c1, self.w2, self.c2, self.gate
        y, z, gate = run("frozen_ffn", u, *weights, self.activation, keeps, call.backend)
        call.keep(BITS if self.bits else Z, z)
        if self.gate:
            call.keep(GATE, gate)
        return y

    def backward(self, dy: Tensor, u: Tensor | None, call: Call, gradients: Gradients, need_du: bool) -> Tensor | None:
        keeps, nothing = self._keeps(call), dy.new_empty(0)
        z = call.kept.get((BITS if self.bits else Z).key)
        gate = call.kept.get(GATE.key)
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
            need_du,
            need_dc1,
            need_dc2,
            call.backend,
        )
        if need_dc1:
            gradients.add(self.c1, dc1)
        if need_dc2:
            gradients.add(self.c2, dc2)
        return du if need_du else None


class Wide:
    """A frozen network with a parallel adapter among its hidden units."""

    def __init__(self, parts: FeedForwardBlock):
        wide, adapter = parts.wide, Bottleneck(current(parts.out))
        self.w1, self.c1, self.w2, self.c2 = wide.w1, wide.c1, wide.w2, parts.out.bias
        self.adapter, self.inner = adapter, adapter.parameters[2:]
        self.activation, self.bits = parts.activation, parts.activation == "relu"
        self.bound = adapter.bound if self.c2 is None else [*adapter.bound, self.c2]
        self.trains = any(tensor.requires_grad for tensor in adapter.bound)
        self.reads_u = self.trains

    def makes_again(self, call: Call) -> bool:
        return self._keeps(call) == "x"

    def _keeps(self, call: Call) -> str:
        return what_to_keep(self.activation, False, not self.bits and call.tier > 1)

    def _filled(self) -> Tensor | None:
        """Writes the adapter into the network's room, and returns the bias of both."""
        return fill(self.w1, self.c1, self.w2, self.c2, *self.inner, self.adapter.scale)

    def forward(self, u: Tensor, call: Call) -> Tensor:
        c2 = self._filled()
        keeps = self._keeps(call) if call.keeps_some else "nothing"
        own = *self.inner, self.activation, self.adapter.scale, keeps, call.backend
        y, z = run("parallel_ffn", u, self.w1, self.c1, self.w2, c2, *own)
        call.keep(BITS if self.bits else Z, z)
        return y

    def backward(self, dy: Tensor, u: Tensor | None, call: Call, gradients: Gradients, need_du: bool) -> Tensor | None:
        self._filled()  # another adapter may have been in the room since
        z = call.kept.get((BITS if self.bits else Z).key)
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
            need_du,
            self.trains,
            up_bias is not None,
            call.backend,
        )
        for parameter, gradient in zip(self.inner, found, strict=True):
            if gradients.wants(parameter):
                gradients.add(parameter, gradient)
        return du if need_du else None


class Open:
    """Linears, activation and linear, one after the other."""

    def __init__(self, parts: FeedForwardBlock):
        names = ("z", "gate")[: len(parts.inputs)]
        self.inputs = Linears(f"{BLOCK}.in", dict(zip(names, parts.inputs, strict=True)))
        self.out = Linears(f"{BLOCK}.out", {"out": parts.out})
        self.activation, self.dropout = parts.activation, float(parts.dropout)
        self.gated = len(parts.inputs) > 1
        self.bits = self.activation == "relu" and not self.gated
        self.bound = [*self.inputs.bound, *self.out.bound]
        self.reads_u = self.inputs.reads_input
        self.scales = any(linear.after is not None for linear in self.inputs.all)

    def makes_again(self, call: Call) -> bool:
        hidden = self.out.reads_input and call.kept.get(HIDDEN.key) is None
        return hidden or ((self.scales or not self.bits) and call.kept.get(Z.key) is None)

    def forward(self, u: Tensor, call: Call) -> Tensor:
        raw = self.inputs.forward(u, call)
        if self.scales or not self.bits:
            for place, z in zip((Z, GATE), raw, strict=False):
                call.keep(place, z)
        hidden = self._activate(raw, call)
        if self.out.reads_input:
            call.keep(HIDDEN, hidden)
        (y,) = self.out.forward(hidden, call)
        if self.out.all[0].after is not None:
            call.keep(PROJECTED, y)
        return self.out.all[0].scaled(y)

    def _activate(self, raw: list[Tensor], call: Call) -> Tensor:
        zs = self._scaled(raw)
        seed = call.seed(DROPPED, self.dropout)
        if self.gated:
            return run("gated_activation", *zs, self.activation, self.dropout, seed, call.backend)
        hidden, bits = run("activation", *zs, self.activation, self.dropout, seed, call.backend)
        if self.bits:
            call.keep(BITS, bits)
        return hidden

    def _scaled(self, raw: list[Tensor]) -> list[Tensor]:
        return [linear.scaled(y) for linear, y in zip(self.inputs.all, raw, strict=True)]

    def backward(self, dy: Tensor, u: Tensor | None, call: Call, gradients: Gradients, need_du: bool) -> Tensor | None:
        raw = [call.kept.get(place.key) for place in (Z, GATE)[: len(self.inputs.all)]]
        hidden = call.kept.get(HIDDEN.key)
        if self.makes_again(call):
            raw = self.inputs.forward(u, call)
        if self.out.reads_input and hidden is None:
            hidden = self._activate(raw, call)
        read = call.kept.get(PROJECTED.key)
        if self.out.all[0].after is not None and read is None:
            (read,) = self.out.forward(self._activate(raw, call) if hidden is None else hidden, call)
        dhidden = self.out.backward([dy], hidden, [read], call, gradients, True)
        seed = call.seeds.get(DROPPED)
        if self.gated:
            zs = self._scaled(raw)
            dzs = run("gated_activation_backward", dhidden, *zs, self.activation, self.dropout, seed, call.backend)
        else:
            saved = call.kept[BITS.key] if self.bits else self._scaled(raw)[0]
            dzs = [run("activation_backward", dhidden, saved, self.activation, self.dropout, seed, call.backend)]
        return self.inputs.backward(list(dzs), u, raw, call, gradients, need_du)


def _is_frozen(parts: FeedForwardBlock, linears: list[Linear]) -> bool:
    plain = all(not linear.reads_input and linear.after is None for linear in linears)
    gate_biased = len(parts.inputs) > 1 and any(linear.bias is not None for linear in linears)
    return plain and parts.dropout == 0 and not gate_biased


def _adapters(parts: FeedForwardBlock, wide: bool) -> tuple[Bottleneck | None, Bottleneck | None]:
    """Returns the adapter that reads the last linear's output, and the one that reads the block's input."""
    piece = current(parts.out)
    for module in parts.inputs:
        own = current(module)
        if own is not None and not isinstance(own, ReadInput) and not isinstance(own, Scale):
            raise Unknown(f"a {type(own).__name__} on the first linear of the feed-forward block")
    if piece is None or wide or isinstance(piece, Scale):
        return None, None
    if type(piece) is ParallelAdapter:
        return None, Bottleneck(piece)
    if type(piece) is BottleneckAdapter:
        return Bottleneck(piece), None
    raise Unknown(f"a {type(piece).__name__} on the last linear of the feed-forward block")
