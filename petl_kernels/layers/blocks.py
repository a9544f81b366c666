"""The blocks of an encoder-decoder layer out of lean ops: attention with its residual, feed-forward with its residual.

``tier`` says which steps are made again in backward rather than kept (``recompute.maybe``); 0 keeps all of them.

    step                                        made again from tier    by
    LN(x), casts for autocast                   1                       one pass over x
    q, k, v                                     2                       three products
    pre-activation of GELU, SiLU, gated blocks  2                       one product (two when gated)
    x + drop(out(attention))                    3                       one product

An adapter on an output projection changes the last line: what it reads is kept in place of the sum, which follows from
it without a product of the layer's size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from petl_kernels import ops
from petl_kernels.layers.boundaries import boundaries
from petl_kernels.layers.frozen_linear import FrozenLinear
from petl_kernels.layers.hooks import hooks_on
from petl_kernels.layers.recompute import maybe, remade_by
from petl_kernels.methods.adapter import ParallelAdapter, ReadInput
from petl_kernels.methods.base import Piece
from petl_kernels.methods.lora import LoRALinear
from petl_kernels.methods.prefix import Prefix
from petl_kernels.models.transformers_names import activation_name, attention_implementation

if TYPE_CHECKING:
    from petl_kernels.layers.border import Border
    from petl_kernels.layers.wide_ffn import WideFFN

# What each tier makes again, first tier that does.
NORMS, PRODUCTS, SUMS = 1, 2, 3


@dataclass(frozen=True)
class AttentionBlock:
    """The parts of one attention and how they are joined; ``dropout`` acts on its probabilities.

    adds_bias: the attention has a position bias, into which transformers puts the mask (T5's family).
    """

    host: nn.Module  # the attention itself, which holds prefixes
    q: nn.Module
    k: nn.Module
    v: nn.Module
    out: nn.Module
    norm: nn.Module
    heads: int
    scale: float
    causal: bool
    dropout: float
    residual_dropout: float
    pre_norm: bool
    adds_bias: bool
    borders: dict[str, Border] | None  # of q, k and v, where their weights stand together (``layers/border.py``)


@dataclass(frozen=True)
class FeedForwardBlock:
    inputs: tuple[nn.Module, ...]  # two when it is gated: the activation's, and the gate
    out: nn.Module
    norm: nn.Module
    activation: str
    dropout: float
    residual_dropout: float
    pre_norm: bool
    wide: WideFFN | None  # with room for a parallel adapter, where it has the layer's activation


def activation_of(layer: nn.Module) -> str:
    """The ops' name for the activation of an encoder or decoder layer; empty for one that they do not have."""
    function = getattr(layer, "activation_fn", None) or layer.layer[-1].DenseReluDense.act
    return activation_name(function)


def attention_block(
    block: AttentionBlock,
    x: Tensor,
    source: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    tier: int,
    keys: list[Tensor],
) -> Tensor:
    """x (batch, tokens, d) -> the same, with what it attends to added.

    ``source`` (batch, source tokens, d) is None for self-attention, else what ``shared_for_products`` returned.
    ``keys`` gets k and v (batch, heads, tokens, head_dim), for a cache.
    """
    u = _read(block, x, tier)
    seen = u if source is None else source
    o = _before(block.out, _attend(block, u, seen, mask, bias, tier, keys))
    piece = _changes_output(block.out)
    if piece is None and _is_plain(block.out):
        total = maybe(tier >= SUMS, partial(_project_and_add, block), o, x, reads=(block.out,))
    else:
        read = maybe(tier >= SUMS and _is_plain(block.out), _forward(block.out), o, reads=(block.out,))
        total = maybe(tier >= PRODUCTS, partial(_adapt_and_add, block, piece), read, x, reads=_pieces(block.out))
    return total if block.pre_norm else _normed(block.norm, total, tier)


def feed_forward_block(block: FeedForwardBlock, x: Tensor, tier: int) -> Tensor:
    """x (batch, tokens, d) -> x + drop(ffn(x)), with the norm before it or after it."""
    u = _read(block, x, tier)
    wide = is_wide(block)  # first: it lets go of weights that are trained by now
    if _is_frozen_ffn(block):
        y = (_parallel_ffn if wide else _frozen_ffn)(block, u, tier)
    else:
        again = tier >= PRODUCTS
        hidden = [linear(module, u, again) for module in block.inputs]
        y = linear(block.out, maybe(again, partial(_activate, block), *hidden))
    total = ops.dropout_add(y, x, block.residual_dropout)
    return total if block.pre_norm else _normed(block.norm, total, tier)


def shared_for_products(source: Tensor | None) -> Tensor | None:
    """The encoder's output in the dtype that autocast gives to products, in one storage for all decoder layers.

    Each layer's gradient is added up in the dtype of ``source``, as if each had cast it for itself.
    """
    if source is None or _cast(source) is source:
        return source
    if source.is_inference() or torch.is_inference_mode_enabled() or torch.compiler.is_compiling():
        return _cast(source)
    key = source._version, torch.get_autocast_dtype(source.device.type)
    known, cast = getattr(source, "petl_cast", (None, None))  # on the tensor, so that it goes when the tensor goes
    if known != key:
        cast = _cast(source.detach())
        source.petl_cast = key, cast
    return _SharedCast.apply(source, cast)


def as_causal(mask: Tensor) -> Tensor:
    """``mask``, marked as one that hides what comes later and nothing else: lean layers need not read it."""
    mask.petl_causal = True
    return mask


class _SharedCast(torch.autograd.Function):
    """``source`` cast to ``cast``, which stands in memory already."""

    @staticmethod
    def forward(ctx, source: Tensor, cast: Tensor) -> Tensor:
        ctx.dtype = source.dtype
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


# ---- steps ----------------------------------------------------------------------------------------------------------


def _read(block: AttentionBlock | FeedForwardBlock, x: Tensor, tier: int) -> Tensor:
    """What the products of a block read."""
    if not block.pre_norm:
        return _for_products(x, tier)
    return _norm(block.norm, x, tier, _cast)


def _normed(norm: nn.Module, x: Tensor, tier: int) -> Tensor:
    """The end of a post-norm block, with the adapter that stands there (Pfeiffer's)."""
    y = _norm(norm, x, tier)
    piece = _current(norm)
    return y if piece is None else piece.after(norm, (x,), y)


def _for_products(x: Tensor, tier: int) -> Tensor:
    return x if _cast(x) is x else maybe(tier >= NORMS, _cast, x)


def _cast(x: Tensor) -> Tensor:
    """In the dtype that autocast gives to products: once for all that read it."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


def _norm(norm: nn.Module, x: Tensor, tier: int, then: Callable[[Tensor], Tensor] = lambda y: y) -> Tensor:
    """then(norm(x)); made again from x and the statistics that the norm's own rule keeps.

    An RMSNorm of 16 bits returns 16 bits, also for a wider x.
    """
    if isinstance(norm, nn.LayerNorm):
        y, *statistics = ops.layer_norm_with_statistics(x, norm.weight, norm.bias, norm.eps)
        again, weights = ops.layer_norm_from_statistics, _present(norm.weight, norm.bias)
    else:
        y, *statistics = ops.rms_norm_with_statistics(x, norm.weight, norm.variance_epsilon)
        again, weights = ops.rms_norm_from_statistics, (norm.weight,)
        if norm.weight.dtype.itemsize == 2 and norm.weight.dtype != x.dtype:
            then = partial(_narrowed, norm.weight.dtype, then)
    if tier < NORMS:
        return then(y)
    return remade_by(lambda *tensors: then(again(*tensors)), then(y), x, *statistics, weights=weights)


def _present(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in tensors if tensor is not None)


def _narrowed(dtype: torch.dtype, then: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    return then(y.to(dtype))


def _attend(
    block: AttentionBlock,
    u: Tensor,
    source: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    tier: int,
    keys: list[Tensor],
) -> Tensor:
    """(batch, tokens, heads · head_dim)"""
    packed = boundaries(mask, u is source)
    if packed is not None or getattr(mask, "petl_causal", False):
        mask = None  # the op knows a shorter way
    q, k, v = (_heads(y, block.heads) for y in _projections(block, u, source, tier))
    keys += k, v
    causal = block.causal and mask is None and q.shape[2] > 1
    if mask is not None:
        mask, bias = as_added(block, mask, bias, q.dtype)
    prefix_k, prefix_v = _prefix(block, q)
    given = causal, block.scale, block.dropout, None, prefix_k, prefix_v
    if packed is None:
        o = ops.attention(q, k, v, mask, bias, *given)
    else:  # whose position bias comes by distance
        o = ops.attention(q, k, v, None, None, *given, *packed, bias)
    return o.transpose(1, 2).reshape(*u.shape[:-1], -1)


def _heads(y: Tensor, heads: int) -> Tensor:
    return y.view(*y.shape[:-1], heads, -1).transpose(1, 2)


def _prefix(block: AttentionBlock, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
    piece = _current(block.host)
    if not isinstance(piece, Prefix):
        return None, None
    return tuple(own.to(q.dtype).view(-1, block.heads, q.shape[-1]) for own in piece.folded())


def _projections(block: AttentionBlock, u: Tensor, source: Tensor, tier: int) -> list[Tensor]:
    again = tier >= PRODUCTS
    if u is source:
        return linears((block.q, block.k, block.v), u, again)
    return [linear(block.q, u, again), *linears((block.k, block.v), source, again)]


def as_added(
    block: AttentionBlock, mask: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Mask and bias that give the numbers of transformers' attention function, also to a query that sees nothing.

    Its eager function adds a mask as it is, and finfo.min leaves nothing of the scores beside it: such a query attends
    to every key alike. With a position bias sdpa's does so too, with finfo.min in the place of hidden keys' bias; in
    fp16, whose finfo.min leaves the scores, without that bias. Else sdpa gives 0 where a boolean mask shows no key.
    One exception: a query whose whole row of a mask is -inf gets 0 here in every case, and NaN from the eager function.
    """
    eager = str(attention_implementation(block.host.config)).endswith("eager")
    if eager:
        return _shared(mask, _added_by_eager, dtype), bias
    if not block.adds_bias:
        return mask, bias
    if dtype == torch.float16 and bias is not None:
        return None, torch.where(mask, bias, torch.finfo(dtype).min) if mask.dtype == torch.bool else bias + mask
    return _shared(mask, _added_by_sdpa, dtype), bias


def _shared(mask: Tensor, make: Callable[[Tensor, torch.dtype], Tensor], dtype: torch.dtype) -> Tensor:
    """``make(mask, dtype)``, one for all layers."""
    if mask.is_inference() or torch.is_inference_mode_enabled() or torch.compiler.is_compiling():
        return make(mask, dtype)
    key = make, dtype, mask._version
    known, made = getattr(mask, "petl_added", (None, None))  # on the mask, so that it goes when the mask goes
    if known == key:
        return made
    made = make(mask, dtype)
    if made is not mask:
        mask.petl_added = key, made
    return made


def _added_by_eager(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.float16:
        return mask.float().masked_fill(mask == torch.finfo(mask.dtype).min, torch.finfo(torch.float32).min)
    return mask.to(dtype) if mask.dtype == torch.bool else mask


def _added_by_sdpa(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _project_and_add(block: AttentionBlock, o: Tensor, x: Tensor) -> Tensor:
    return ops.dropout_add(block.out.forward(o), x, block.residual_dropout)


def _adapt_and_add(block: AttentionBlock, piece: Piece | None, read: Tensor, x: Tensor) -> Tensor:
    y = read if piece is None else piece.after(block.out, (), read)
    return ops.dropout_add(y, x, block.residual_dropout)


def _activate(block: FeedForwardBlock, z: Tensor, *gate: Tensor) -> Tensor:
    activation = ops.gated_activation if gate else ops.activation
    a = activation(z, *gate, block.activation, block.dropout)
    # T5 keeps its last projection in fp32 beside 16-bit ones
    weight = getattr(block.out, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or torch.is_autocast_enabled(a.device.type):
        return a
    return a.to(weight.dtype)


def _frozen_ffn(block: FeedForwardBlock, u: Tensor, tier: int) -> Tensor:
    first, out = block.inputs[0], block.out
    gate = block.inputs[1].weight if len(block.inputs) > 1 else None
    adapter = _current(out)
    y = ops.frozen_ffn(u, first.weight, first.bias, out.weight, out.bias, gate, block.activation, _again(block, tier))
    return y if adapter is None else adapter(u, residual=y)


def _again(block: FeedForwardBlock, tier: int) -> bool:
    return tier >= PRODUCTS and (block.activation != "relu" or len(block.inputs) > 1)  # a ReLU's bits are cheap


def _parallel_ffn(block: FeedForwardBlock, u: Tensor, tier: int) -> Tensor:
    """The adapter as more hidden units of the network."""
    adapter = _current(block.out)
    down, up = adapter.down, adapter.up
    trained = down.weight, down.bias, up.weight, up.bias
    frozen = block.wide.w1, block.wide.c1, block.wide.w2, block.out.bias
    return ops.parallel_ffn(u, *frozen, *trained, block.activation, adapter.scale, _again(block, tier))


def is_wide(block: FeedForwardBlock) -> bool:
    """Whether the network runs with its adapter inside; not in compiled graphs, which cannot ask where weights are."""
    if block.wide is None or torch.compiler.is_compiling():
        return False
    adapter = _current(block.out)
    return block.wide.serves(block.inputs[0], block.out, adapter) and not hooks_on(adapter)


def _is_frozen_ffn(block: FeedForwardBlock) -> bool:
    linears = (*block.inputs, block.out)
    return block.dropout == 0 and all(
        type(module) in (nn.Linear, FrozenLinear)
        and _is_plain(module)
        and _is_parallel_or_nothing(_current(module))
        and not module.weight.requires_grad
        and module.weight.dtype == linears[0].weight.dtype
        and (module.bias is None or len(block.inputs) == 1)
        for module in linears
    )


def _is_parallel_or_nothing(piece: Piece | None) -> bool:
    return piece is None or isinstance(piece, (ParallelAdapter, ReadInput))


# ---- linear layers with what adapters put on them -------------------------------------------------------------------


def linear(module: nn.Module, x: Tensor, again: bool = False) -> Tensor:
    """``module(x)``; ``again``: made again in backward."""
    if not _is_plain(module):
        return module(x)
    return _after(module, maybe(again, module.forward, _before(module, x), reads=(module,)), again)


def linears(modules: Sequence[nn.Module], x: Tensor, again: bool) -> list[Tensor]:
    """Several that read the same x; those with LoRA read it once for all."""
    grouped = [module for module in modules if _has_lora(module)]
    if len(grouped) < 2 or len({_lora_dropout(module) for module in grouped}) > 1:
        return [linear(module, x, again) for module in modules]
    ys = maybe(again, partial(_grouped_lora, grouped), x, reads=tuple(grouped))
    found = dict(zip(grouped, ys, strict=True))
    return [_after(module, found[module], again) if module in found else linear(module, x, again) for module in modules]


def _grouped_lora(modules: list[LoRALinear], x: Tensor) -> tuple[Tensor, ...]:
    pieces = [module.lora.current() for module in modules]
    ys = ops.lora_linear_grouped(
        x,
        [module.weight for module in modules],
        [module.bias for module in modules],
        [piece.A for piece in pieces],
        [piece.B for piece in pieces],
        [piece.scale for piece in pieces],
        _lora_dropout(modules[0]),
    )
    return tuple(ys)


def _has_lora(module: nn.Module) -> bool:
    return (
        type(module) is LoRALinear
        and module.lora.current() is not None
        and _is_plain(module)
        and not hasattr(module, "petl")
        and not module.weight.requires_grad
    )


def _lora_dropout(module: LoRALinear) -> float:
    return module.lora.current().dropout if module.training else 0.0


def _before(module: nn.Module, x: Tensor) -> Tensor:
    piece = _current(module)
    changed = None if piece is None else piece.before(module, (x,))
    return x if changed is None else changed[0]


def _after(module: nn.Module, y: Tensor, again: bool) -> Tensor:
    piece = _changes_output(module)
    return y if piece is None else maybe(again, partial(piece.after, module, ()), y, reads=_pieces(module))


def _current(module: nn.Module) -> Piece | None:
    return module.petl.current() if hasattr(module, "petl") else None


def _pieces(module: nn.Module) -> tuple[nn.Module, ...]:
    return (module.petl,) if hasattr(module, "petl") else ()


def _changes_output(module: nn.Module) -> Piece | None:
    piece = _current(module)
    return None if piece is None or type(piece).after is Piece.after else piece


def _is_plain(module: nn.Module) -> bool:
    """A linear of ours or of PyTorch, with no hooks but ours: its ``forward`` depends on its input alone."""
    own = 1 if hasattr(module, "petl") else 0
    return (
        type(module) in (nn.Linear, LoRALinear, FrozenLinear)
        and len(module._forward_hooks) == own
        and len(module._forward_pre_hooks) == own
    )


def _forward(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return module.forward if _is_plain(module) else module
