"""The attention block of T5Gemma: h = x + drop(post(P(out(attention(q, k, v))))), with a norm before it, too.

q and k of a self-attention are turned by their positions, and ``ops.capped_attention`` has the rest. All else is that
of ``attention.py``, with these differences: the output of the projection is saved and the sum is not, since the norm
behind it reads that; there is no lse, since backward takes the softmax again.
"""

from __future__ import annotations

from torch import Tensor

from petl_kernels.layers.blocks import CappedBlock
from petl_kernels.layers.masks import as_added
from petl_kernels.layers.rotary import Rotary, rotated, rotated_back
from petl_kernels.layers.rule.attention import Attention, rows_of
from petl_kernels.layers.rule.call import Call, Gradients, Place
from petl_kernels.layers.rule.linears import Unknown
from petl_kernels.layers.rule.norm import Norm
from petl_kernels.layers.rule.prefix import keys_and_values
from petl_kernels.ops.define import run


class CappedAttention(Attention):
    """One such attention, bound."""

    def __init__(self, name: str, block: CappedBlock):
        super().__init__(name, block)
        self.head_dim, self.cap = block.head_dim, float(block.cap)
        self.post = Norm(f"{name}.post", block.post)
        if self.post.piece is not None:
            raise Unknown("an adapter on the norm behind an attention")
        self.sum = Place(name, "normed_sum")
        self.bound += self.post.bound

    def set_visible(self, call: Call, mask: Tensor | None, bias: Tensor | Rotary | None, x: Tensor) -> None:
        """Puts into ``call`` what the queries attend to. bias: the rotation of the layer's positions, or None."""
        dtype = call.dtype or x.dtype
        call.masks[self.name] = None if mask is None else as_added(self.block, mask, None, dtype)[0]
        if isinstance(bias, Rotary):
            call.rotary = bias
        if self.prefix is not None:
            call.prefixes[self.name] = keys_and_values(self.prefix, dtype, self.together)

    def _heads(self, raw: list[Tensor], call: Call) -> list[Tensor]:
        if self.scales:
            raw = [linear.scaled(y, call) for linear, y in zip(self.named, raw, strict=True)]
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in raw)
        if self.cross or call.rotary is None:
            return [q, k, v]
        return [rotated(q, call.rotary), rotated(k, call.rotary), v]

    def _before_heads(self, dq: Tensor, dk: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        if self.cross or call.rotary is None:
            return dq, dk
        return rotated_back(dq, call.rotary), rotated_back(dk, call.rotary)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        o = run("capped_attention", q, k, v, *self._capped_inputs(call))
        call.save(self.o, o)
        return o

    def _capped_inputs(self, call: Call) -> tuple:
        seed = call.seed(self.seed, self.dropout)
        prefix = call.prefixes.get(self.name, (None, None))
        return call.masks.get(self.name), *prefix, self.cap, self.scale, self.dropout, seed, call.backend

    def _attention_backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, call: Call, gradients: Gradients
    ) -> tuple[Tensor, ...]:
        o, inputs = call.saved[self.o.key], self._capped_inputs(call)
        do = do.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        dq, dk, dv, *dprefix = run("capped_attention_backward", do, q, k, v, o, *inputs)
        for own, gradient in zip(call.prefixes.get(self.name, ()), dprefix, strict=False):
            gradients.add(own, gradient)
        return dq, dk, dv

    def _read(self, o: Tensor, call: Call) -> Tensor:
        (raw,) = self.out.forward(rows_of(o), call)
        read = self.out.all[0].scaled(raw, call)
        call.save(self.read, read if self.adapter else raw)
        return read

    def _adapted(self, read: Tensor, call: Call) -> Tensor:
        return self.post.forward(super()._adapted(read, call), call)

    def _out_backward(self, dy: Tensor, call: Call, gradients: Gradients) -> Tensor:
        y = super()._adapted(self._recomputed_read(call), call)
        return super()._out_backward(self.post.backward(dy, None, y, call, gradients), call, gradients)
