"""The blocks of one layer in their order, as one autograd function."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from petl_kernels.errors import InputError
from petl_kernels.layers.blocks import AttentionBlock, CappedBlock, ExpertsBlock, FeedForwardBlock
from petl_kernels.layers.hooks import hooks_on, is_foreign
from petl_kernels.layers.host_copy import host_copy
from petl_kernels.layers.rotary import Rotary
from petl_kernels.layers.rule.attention import Attention
from petl_kernels.layers.rule.call import Call, Gradients, joined
from petl_kernels.layers.rule.capped_attention import CappedAttention
from petl_kernels.layers.rule.feed_forward import FeedForward
from petl_kernels.layers.rule.linears import Linear, Unknown
from petl_kernels.layers.rule.watch import changed, stamps
from petl_kernels.layers.wide_linear import WIDE
from petl_kernels.ops.define import below_autograd

# From tier WHOLE on a layer saves its input alone, and backward runs its forward pass again at tier WITHIN.
WHOLE, WITHIN = 4, 1


class Rule:
    """The blocks of ``layer``, bound: a forward pass and its backward pass read the tensors that are in here.

    path: that of the layer, for errors. products: the dtype of products outside of autocast where it is not that of the
    stream, as in T5 in fp16; or None. x: an input like those that the rule is for, of which the dtype and the device
    count. experts: a feed-forward block that runs outside of the rule, which then ends before it. Raises Unknown for
    what the rule does not cover.
    """

    def __init__(
        self,
        layer: nn.Module,
        path: str,
        attentions: Sequence[AttentionBlock],
        ffn: FeedForwardBlock | ExpertsBlock,
        x: Tensor,
    ):
        self.path = path
        self.attentions = [_attention(*own) for own in zip(("self", "cross"), attentions, strict=False)]
        # hooks of others may put parameters there only while the layer runs
        together = not any(map(is_foreign, hooks_on(layer))) and "forward" not in layer.__dict__
        for attention in self.attentions:
            attention.together = together
        self.experts = ffn if isinstance(ffn, ExpertsBlock) else None
        self.products, wide_out = None, not isinstance(ffn, ExpertsBlock) and _has_wide_out(ffn, x)
        if wide_out and not torch.is_autocast_enabled(x.device.type):
            self.products = torch.float16
        self.ffn = None if isinstance(ffn, ExpertsBlock) else FeedForward(ffn, wide_out)
        self.pre_norm = self.attentions[0].pre_norm
        blocks = [*self.attentions, *([self.ffn] if self.ffn else [])]
        if self.pre_norm:
            readers = [block.norm for block in blocks[1:]]
            for attention, reader in itertools.zip_longest(self.attentions, readers):
                attention.reader = reader
        bound = [tensor for block in blocks for tensor in block.bound]
        self.trained = list({id(tensor): tensor for tensor in bound if tensor.requires_grad}.values())
        self.bound = bound
        self.names = {id(own): f"{self.path}.{name}" for name, own in layer.named_parameters()}
        linears = [own for attention in self.attentions for own in attention.linears]
        for bordered in (own.bordered for own in linears if own.bordered):
            self.names |= {id(own): self.names[id(weight)] for own, weight in bordered.watched}
        self._refuse_dtypes(x, attentions[0].adds_bias)

    def holds(self) -> bool:
        """Returns whether weights in buffers are still there, which ``Watch`` does not compare."""
        return all(block.holds() for block in (*self.attentions, self.ffn) if block)

    def _refuse_dtypes(self, x: Tensor, is_t5: bool) -> None:
        if is_t5 and x.dtype == torch.float16 and not (self.ffn and self.ffn.wide_out):
            raise Unknown("T5 with its last projection in fp16, which clamps behind it")
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            return
        wanted = self.products or x.dtype
        for linear in self._linears():
            if linear.weight.dtype != wanted:
                raise Unknown(f"a weight in {linear.weight.dtype} beside inputs in {wanted}")

    def _linears(self) -> Iterator[Linear]:
        """Yields the linears that compute in the dtype of products."""
        for attention in self.attentions:
            yield from (*attention.named, *attention.out.all)
        if self.ffn:
            yield from self.ffn.linears[:-1] if self.ffn.wide_out else self.ffn.linears

    def __call__(
        self,
        call: Call,
        x: Tensor,
        mask: Tensor | None,
        bias: Tensor | Rotary | None,
        source: Tensor | None,
        source_mask: Tensor | None,
        with_keys: bool,
    ) -> tuple[Tensor, ...]:
        """Returns y (batch, tokens, d); with_keys: also k and v (batch, heads, tokens, head_dim) of each attention.

        y: the layer's output, or what its experts read. x: (batch, tokens, d). source: (batch, source tokens, d), or
        None. mask, source_mask, and bias, that of the self-attention or its rotation: as the model gives them to its
        layers.
        """
        call.dtype = self.products or call.dtype
        for attention, own, added in zip(self.attentions, (mask, source_mask), (bias, None), strict=False):
            attention.set_visible(call, own, added, x)
        outputs = self._run(call, x, source)
        return outputs if with_keys else outputs[:1]

    def _run(self, call: Call, x: Tensor, source: Tensor | None) -> tuple[Tensor, ...]:
        if not torch.is_grad_enabled():
            with below_autograd(x.device.type):
                return self.forward(x, source, call)
        more = [bias for bias in call.biases.values() if bias is not None and bias.requires_grad]
        more += [own for prefix in call.prefixes.values() for own in prefix]
        wanted = [*self.trained, *more]
        return _OneNode.apply(self, call, wanted, x, source, *wanted)

    def forward(self, x: Tensor, source: Tensor | None, call: Call) -> tuple[Tensor, ...]:
        keys, u = [], call.cast(self.attentions[0].norm.forward(x, call)) if self.pre_norm else x
        for attention in self.attentions:
            x, u, k, v = attention.forward(x, u, source if attention.cross else None, call)
            keys += k, v
        return self.ffn.forward(x, u, call) if self.ffn else x, *keys

    def backward(
        self,
        dy: Tensor,
        dkeys: Sequence[Tensor | None],
        x: Tensor,
        source: Tensor | None,
        call: Call,
        gradients: Gradients,
        need_dx: bool,
        need_dsource: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns dx and dsource where they are needed. dkeys: gradients of the k and v that ``forward`` returned."""
        inputs: list[Tensor | None] = [x]
        sums: list[Tensor | None] = []
        dsource = None
        for attention in self.attentions:
            sums.append(attention.recomputed_sum(inputs[-1], call))
            inputs.append(attention.recomputed_output(sums[-1], call))
        dx, du = self._end_backward(dy, inputs.pop(), call, gradients)
        for i in reversed(range(len(self.attentions))):
            attention = self.attentions[i]
            dx, do = attention.end_backward(dx, du, sums.pop(), call, gradients)
            du = None  # not held while the next one is made
            given = source if attention.cross else None
            need_du = i > 0 or need_dx or (self.pre_norm and attention.trains_norm)
            own, needs = dkeys[2 * i : 2 * i + 2], (need_du, need_dsource and attention.cross)
            du, found = attention.backward(do, *own, inputs.pop(), given, call, gradients, *needs)
            dsource = found if attention.cross else dsource
        return self._first_backward(dx, du, x, call, gradients, need_dx), dsource

    def _end_backward(
        self, dy: Tensor, h: Tensor | None, call: Call, gradients: Gradients
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the gradient of the last attention's h, without what comes through the norm of it, and the norm's."""
        if self.ffn is None:
            return dy, None
        assert h is not None, "the feed-forward block reads h"
        return self.ffn.backward(dy, h, call, gradients)

    def _first_backward(
        self, dx: Tensor, du: Tensor | None, x: Tensor, call: Call, gradients: Gradients, need_dx: bool
    ) -> Tensor | None:
        """Returns the gradient of the layer's input from dx, without what comes through u, and du."""
        norm = self.attentions[0].norm
        if need_dx:
            assert du is not None, "dx needs du"
            return norm.backward(du, dx, x, call, gradients) if self.pre_norm else joined(du, dx)
        if self.pre_norm and du is not None:
            norm.parameters_backward(du, x, call, gradients)
        return None


def _has_wide_out(ffn: FeedForwardBlock, x: Tensor) -> bool:
    """Returns whether the network's last linear is in fp32 beside products in fp16, as transformers loads T5."""
    if torch.is_autocast_enabled(x.device.type):
        return type(ffn.out) in WIDE.values()
    others = {linear.weight.dtype for linear in ffn.inputs}
    return ffn.out.weight.dtype == torch.float32 and others == {torch.float16}


def _attention(name: str, block: AttentionBlock) -> Attention:
    return CappedAttention(name, block) if isinstance(block, CappedBlock) else Attention(name, block)


class _OneNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rule: Rule, call: Call, wanted: list[Tensor], x: Tensor, source: Tensor | None, *_):
        ctx.rule, ctx.call, ctx.wanted = rule, call, wanted
        ctx.set_materialize_grads(False)
        ctx.stamps = stamps(rule.bound)
        held = host_copy(x) if call.tier == 5 else None
        with below_autograd(x.device.type):
            outputs = rule.forward(x, source, call)
        if held is not None:
            held.leave()
        ctx.held, ctx.names = held, list(call.saved)
        seen = [own for own in (*call.masks.values(), *call.biases.values(), *(call.rotary or ())) if own is not None]
        ctx.save_for_backward(None if held is not None else x, source, *wanted, *seen, *call.saved.values())
        call.saved = {}
        return outputs

    @staticmethod
    def backward(ctx, dy: Tensor | None, *dkeys: Tensor | None):
        if torch.is_grad_enabled():
            raise InputError(
                f"{ctx.rule.path}: the gradient of a lean layer cannot be differentiated again (create_graph=True): "
                "expected first derivatives only"
            )
        rule, wanted = ctx.rule, ctx.wanted
        x, source, *others = ctx.saved_tensors
        if stamps(rule.bound) != ctx.stamps:
            raise _changed(rule, ctx.stamps)
        needs_x, needs_source, *needs = ctx.needs_input_grad[3:]
        gradients = Gradients([tensor for tensor, need in zip(wanted, needs, strict=True) if need])
        saved = dict(zip(ctx.names, others[len(others) - len(ctx.names) :], strict=True))
        with torch.no_grad(), below_autograd(ctx.call.device.type):
            x = ctx.held.get().detach() if ctx.held is not None else x
            call = ctx.call.for_backward(saved)
            if call.tier >= WHOLE:
                call.tier = WITHIN
                rule.forward(x, source, call)
            if dy is None:
                dy = torch.zeros_like(x)
            dx, dsource = rule.backward(dy, dkeys, x, source, call, gradients, needs_x, needs_source)
        return None, None, None, dx, dsource, *(gradients.of(tensor) for tensor in wanted)


def _changed(rule: Rule, before: bytes | list) -> RuntimeError:
    """Returns the error that names the first tensor of ``rule`` whose values are no longer those of ``before``."""
    now, each = stamps(rule.bound), len(before) // len(rule.bound)
    at = next(i for i in range(len(rule.bound)) if now[i * each : (i + 1) * each] != before[i * each : (i + 1) * each])
    tensor = rule.bound[at]
    name = rule.names.get(id(tensor), f"a weight of shape {tuple(tensor.shape)}")
    return changed(name)
