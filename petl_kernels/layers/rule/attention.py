"""The attention block: h = x + drop(P(out(attention(q, k, v)))), with a norm before it or after it.

    pre-norm     u = LN(x)      q, k, v of u (k and v of the source)      the next block has x = h, u = LN'(h)
    post-norm    u = x                                                    the next block has x = u = LN(h)

P is the adapter on the output projection, where there is one. The norm that reads h, LN' of the next block or the
block's own LN, runs in one pass with the sum; so does its backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from petl_kernels.layers.blocks import AttentionBlock
from petl_kernels.layers.boundaries import boundaries
from petl_kernels.layers.clamp import clamped, clamped_backward
from petl_kernels.layers.masks import as_added, is_causal
from petl_kernels.layers.pieces import active_piece
from petl_kernels.layers.rule.bottleneck import Bottleneck
from petl_kernels.layers.rule.call import Call, Gradients, Place, joined, summed
from petl_kernels.layers.rule.linears import Linears, Unknown
from petl_kernels.layers.rule.norm import Norm
from petl_kernels.layers.rule.prefix import keys_and_values
from petl_kernels.layers.rule.residual import Residual
from petl_kernels.methods.adapter import BottleneckAdapter
from petl_kernels.methods.prefix import Prefix
from petl_kernels.ops.define import run


class Attention:
    """One attention, bound. name: "self" or "cross", the first part of the keys of its saved tensors.

    reader: the norm that reads h; of a pre-norm layer that of the next block, which the layer sets; None where h leaves
    the rule. together: whether prefixes of all attentions are computed with this one's; the layer sets it.
    """

    def __init__(self, name: str, block: AttentionBlock):
        self.name, self.cross, self.block = name, name == "cross", block
        self.heads, self.scale = block.heads, float(block.scale)
        self.dropout, self.residual = float(block.dropout), Residual(name, block.residual_dropout)
        self.pre_norm, self.norm = block.pre_norm, Norm(name, block.norm)
        self.clamps = block.adds_bias  # T5's family
        self.reader: Norm | None = self.norm
        if self.norm.piece is not None:
            raise Unknown("an adapter on the norm of an attention")
        borders = block.borders or {}
        self.linears = [Linears(group, named, borders.get(group)) for group, named in self._groups()]
        self._leave_room()
        self.named = [linear for group in self.linears for linear in group.all]
        self.out = Linears(f"{name}.out", {"out": block.out})
        self.adapter = _adapter(self.out.all[0].piece)
        if any(linear.piece is not None for linear in self.named):
            raise Unknown("an adapter on q, k or v")
        self.scales = any(group.scales for group in self.linears)
        self.reads_u = any(group.reads_input for group in self.linears)
        self.prefix, self.together = _prefix_of(block), True
        self.places = [Place(name, linear.name) for linear in self.named]
        self.o, self.lse = Place(name, "o"), Place(name, "lse")
        self.sum = Place(name, "adapted_sum" if self.adapter else "sum")
        self.read = Place(name, "read")
        self.seed = f"{name}.attention"
        parts = (self.norm, *self.linears, self.out, *([self.adapter] if self.adapter else []))
        self.bound = [tensor for part in parts for tensor in part.bound]
        self.trains_norm = any(tensor.requires_grad for tensor in self.norm.bound)

    def _groups(self) -> list[tuple[str, dict[str, nn.Module]]]:
        """Returns the linears that read one input, with the name of each such group."""
        block = self.block
        if self.cross:
            return [("cross.q", {"q": block.q}), ("cross.kv", {"k": block.k, "v": block.v})]
        return [("self.qkv", {"q": block.q, "k": block.k, "v": block.v})]

    def _leave_room(self) -> None:
        """Lets the norm and the backward pass of attention leave room for borders behind their rows."""
        first = self.linears[0].bordered
        if first and self.pre_norm:
            first.own_input = True
            self.norm.room = (first.room,) if first.room else ()
        self.rooms = [own.room for own in self.linears] if any(own.bordered for own in self.linears) else ()

    def holds(self) -> bool:
        """Returns whether weights in borders are still there."""
        return all(own.bordered.holds() for own in self.linears if own.bordered)

    def set_visible(self, call: Call, mask: Tensor | None, bias: Any, x: Tensor) -> None:
        """Puts into ``call`` what the queries attend to: mask and bias as the kernels read them, the boundaries of a
        packed row, and the prefix."""
        packed = boundaries(mask, not self.cross)
        if packed is not None or is_causal(mask):
            mask = None  # the kernels have arguments for both
        call.causal[self.name] = self.block.causal and mask is None and x.shape[1] > 1
        dtype = call.dtype or x.dtype
        if mask is not None:
            mask, bias = as_added(self.block, mask, bias, dtype)
        call.masks[self.name], call.biases[self.name] = mask, bias
        if packed is not None:
            call.boundaries[self.name] = packed
        if self.prefix is not None:
            call.prefixes[self.name] = keys_and_values(self.prefix, dtype, self.together)

    # ---- forward ----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, u: Tensor, source: Tensor | None, call: Call) -> tuple[Tensor, ...]:
        """Returns x and u (batch, tokens, d) of the next block, and k and v (batch, heads, tokens, head_dim)."""
        u = call.cast(u)
        raw = self._project(u, u if source is None else source, call)
        for place, y in zip(self.places, raw, strict=True):
            call.save(place, y)
        q, k, v = self._heads(raw, call)
        o = self._attend(q, k, v, call)
        del q, raw
        y = self._adapted(self._read(o, call), call)
        if self.reader is None:
            h = self.residual.add(y, x, call)
            return h, h, k, v
        h, u = self._end(y, x, self.reader, call)
        return (h, call.cast(u), k, v) if self.pre_norm else (u, u, k, v)

    def _end(self, y: Tensor, x: Tensor, reader: Norm, call: Call) -> tuple[Tensor, Tensor]:
        """Returns h and the norm of it, and saves h as it is before it is clamped."""
        if not self.clamps or torch.promote_types(y.dtype, x.dtype) != torch.float16:
            h, u = self.residual.add_and_norm(y, x, reader, call)
            call.save(self.sum, h)
            return h, u
        h = self.residual.add(y, x, call)
        call.save(self.sum, h)
        h = clamped(h)
        return h, reader.forward(h, call)

    def recomputed_sum(self, x: Any, call: Call) -> Tensor | None:
        """Returns h, saved or recomputed, as it is before it is clamped; None where nothing in the rule reads it."""
        if self.reader is None:
            return None
        h = call.saved.get(self.sum.key)
        return self.residual.add(self._adapted(self._recomputed_read(call), call), x, call) if h is None else h

    def recomputed_output(self, h: Tensor | None, call: Call) -> Tensor | None:
        """Returns x of the next block, recomputed from h."""
        if h is None:
            return None
        if not self.pre_norm:
            return self.norm.recomputed(h, call)
        return clamped(h) if self.clamps else h

    def _project(self, u: Tensor, source: Tensor, call: Call) -> list[Tensor]:
        if not self.cross:
            return self.linears[0].forward(u, call)
        return [*self.linears[0].forward(u, call), *self.linears[1].forward(source, call)]

    def _heads(self, raw: list[Tensor], call: Call) -> list[Tensor]:
        if self.scales:
            raw = [linear.scaled(y, call) for linear, y in zip(self.named, raw, strict=True)]
        return [y.view(y.shape[0], y.shape[1], self.heads, -1).transpose(1, 2) for y in raw]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Returns o (batch, heads, tokens, head_dim), and saves what backward reads of it."""
        bias, *packed = self._bias_and_boundaries(call)
        o, lse = run("attention", q, k, v, *self._attention_inputs(call, bias), *packed, call.backend)
        call.save(self.o, o)
        call.save(self.lse, lse)
        return o

    def _bias_and_boundaries(self, call: Call) -> tuple[Tensor | None, ...]:
        """Returns the bias by query and key, the boundaries of queries and keys, and a packed row's bias by distance;
        each may be None."""
        bias, packed = call.biases.get(self.name), call.boundaries.get(self.name)
        return (bias, None, None, None) if packed is None else (None, *packed, bias)

    def _attention_inputs(self, call: Call, bias: Tensor | None) -> tuple:
        prefix_k, prefix_v = call.prefixes.get(self.name, (None, None))
        return (
            call.masks.get(self.name),
            bias,
            prefix_k,
            prefix_v,
            call.causal[self.name],
            self.scale,
            self.dropout,
            call.seed(self.seed, self.dropout),
        )

    def _read(self, o: Tensor, call: Call) -> Tensor:
        """Returns the output of the projection, which an adapter on it reads."""
        (raw,) = self.out.forward(rows_of(o), call)
        read = self.out.all[0].scaled(raw, call)
        if self.adapter:
            call.save(self.read, read)
        elif self.out.all[0].after is not None:
            call.save(self.read, raw)
        return read

    def _adapted(self, read: Tensor, call: Call) -> Tensor:
        return self.adapter.forward(read, None, call) if self.adapter else read

    def _recomputed_read(self, call: Call) -> Tensor:
        read = call.saved.get(self.read.key)
        if read is None:
            return self._read(call.saved[self.o.key], call)
        return read if self.adapter else self.out.all[0].scaled(read, call)

    # ---- backward ---------------------------------------------------------------------------------------------------

    def end_backward(self, dx: Any, du: Any, h: Any, call: Call, gradients: Gradients) -> tuple[Tensor, Tensor]:
        """Returns dx, without what comes through u, and the gradient of o (batch, tokens, heads · head_dim).

        dx: the gradient of the next block's x, without what comes through its u. du: that of its u. h: of this block.
        Without a reader dx is the gradient of h, and the others are None.
        """
        dtype = call.saved[self.o.key].dtype
        if self.reader is None:
            return dx, self._out_backward(self.residual.backward(dx, dtype, call), call, gradients)
        if not self.pre_norm:
            du, dx = joined(du, dx), None
        if self.clamps and h.dtype == torch.float16:
            dx = clamped_backward(self.reader.backward(du, dx, clamped(h), call, gradients), h)
            dy = self.residual.backward(dx, dtype, call)
        else:
            dx, dy = self.residual.norm_backward(du, dx, h, self.reader, dtype, call, gradients)
        return dx, self._out_backward(dy, call, gradients)

    def backward(
        self,
        do: Tensor,
        dk_more: Tensor | None,
        dv_more: Tensor | None,
        x: Tensor,
        source: Tensor | None,
        call: Call,
        gradients: Gradients,
        need_du: bool,
        need_dsource: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns du and dsource where they are needed.

        do: as ``end_backward`` returns it. dk_more, dv_more: the gradients of the k and v that ``forward`` has
        returned, or None. x: this block's.
        """
        u = self._recomputed_u(x, call)
        seen = u if source is None else source
        raw: list[Any] = [call.saved.get(place.key) for place in self.places]
        if any(y is None for y in raw):
            assert u is not None and seen is not None, "u is there where products are recomputed"
            raw = self._project(u, seen, call)
        q, k, v = self._heads(raw, call)
        dq, dk, dv = self._attention_backward(do, q, k, v, call, gradients)
        del do, q, k, v
        dk, dv = summed(dk, dk_more), summed(dv, dv_more)
        dq, dk = self._before_heads(dq, dk, call)
        dys = [rows_of(grad) for grad in (dq, dk, dv)]
        if not self.cross:
            return self.linears[0].backward(dys, u, raw, call, gradients, need_du), None
        du = self.linears[0].backward(dys[:1], u, raw[:1], call, gradients, need_du)
        return du, self.linears[1].backward(dys[1:], seen, raw[1:], call, gradients, need_dsource)

    def _before_heads(self, dq: Tensor, dk: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Returns the gradients of q and k that the linears give, from those of q and k that the attention reads."""
        return dq, dk

    def _recomputed_u(self, x: Tensor, call: Call) -> Tensor | None:
        """Returns u in the dtype of products, where backward reads it or recomputes the products."""
        needed = self.reads_u or any(place.key not in call.saved for place in self.places)
        if not needed:
            return None
        return call.cast(self.norm.recomputed(x, call) if self.pre_norm else x)

    def _out_backward(self, dy: Tensor, call: Call, gradients: Gradients) -> Tensor:
        """Returns the gradient of o (batch, tokens, heads · head_dim) from that of what is added to x."""
        o, raw = rows_of(call.saved[self.o.key]), None
        if self.adapter:
            dy = self.adapter.backward(dy, self._recomputed_read(call), True, call, gradients)
        elif self.out.all[0].after is not None:
            raw = call.saved.get(self.read.key)
            if raw is None:
                (raw,) = self.out.forward(o, call)
        return self.out.backward([dy], o, [raw], call, gradients, True)

    def _attention_backward(self, do: Tensor, q, k, v, call: Call, gradients: Gradients) -> tuple[Tensor, ...]:
        o, lse = call.saved[self.o.key], call.saved[self.lse.key]
        do = do.view(do.shape[0], do.shape[1], self.heads, -1).transpose(1, 2)
        prefix = call.prefixes.get(self.name)
        bias, *packed = self._bias_and_boundaries(call)
        inputs, distances = self._attention_inputs(call, bias), packed[-1]
        needs = gradients.wants(bias), gradients.wants(distances)
        dq, dk, dv, dbias, *dprefix, ddistances = run(
            *("attention_backward", do, q, k, v, o, lse, *inputs, needs[0], *packed, needs[1], call.backend),
            *([self.rooms] if self.rooms else ()),
        )
        for own, gradient, need in zip((bias, distances), (dbias, ddistances), needs, strict=True):
            if need:
                gradients.add(own, gradient)
        if prefix is not None:
            for own, gradient in zip(prefix, dprefix, strict=True):
                gradients.add(own, gradient)
        return dq, dk, dv


def _prefix_of(block: AttentionBlock) -> Prefix | None:
    piece = active_piece(block.host)
    if piece is not None and not isinstance(piece, Prefix):
        raise Unknown(f"a {type(piece).__name__} on an attention")
    return piece


def _adapter(piece) -> Bottleneck | None:
    if piece is None:
        return None
    if type(piece) is not BottleneckAdapter:
        raise Unknown(f"a {type(piece).__name__} on an output projection")
    return Bottleneck(piece)


def rows_of(o: Tensor) -> Tensor:
    """Returns o (batch, heads, tokens, head_dim) as (batch, tokens, heads · head_dim)."""
    return o.transpose(1, 2).reshape(o.shape[0], o.shape[2], -1)
