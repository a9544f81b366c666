"""Blocks as single ops, for layers that the rule does not cover and for compiled graphs.

    step                                        recomputed from tier    by
    LN(x), casts for autocast                   1                       one pass over x
    q, k, v                                     2                       three products
    pre-activation of GELU, SiLU, gated blocks  2                       one product (two when gated)
    x + drop(out(attention))                    3                       one product

Tier 0 saves what autograd saves. An adapter on an output projection changes the last line: the projection's output is
saved in the place of the sum, which follows from it without a product of the layer's size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from petl_kernels import ops
from petl_kernels.layers.blocks import AttentionBlock, CappedBlock, FeedForwardBlock
from petl_kernels.layers.boundaries import boundaries
from petl_kernels.layers.frozen_linear import FrozenLinear
from petl_kernels.layers.masks import as_added, is_causal
from petl_kernels.layers.pieces import active_piece, is_plain
from petl_kernels.layers.recompute import recomputed_by, recomputed_if
from petl_kernels.layers.rotary import Rotary, rotated
from petl_kernels.layers.source import cast_for_products
from petl_kernels.methods.adapter import ParallelAdapter, ReadInput
from petl_kernels.methods.lora import LoRALinear, lora_linears
from petl_kernels.methods.pieces import Piece
from petl_kernels.methods.prefix import Prefix
from petl_kernels.models.transformers_names import OFFSET_NORMS
from petl_kernels.ops.define import accumulate_dtype

# The first tier that recomputes each kind of step.
NORMS, PRODUCTS, SUMS = 1, 2, 3


@dataclass(frozen=True)
class Attended:
    """Holds what the queries of one attention attend to.

    source: (batch, source tokens, d), or None for self-attention. mask, bias, or a rotation: as the model gives them
    to its layers.
    """

    source: Tensor | None = None
    mask: Tensor | None = None
    bias: Tensor | Rotary | None = None


def attention_block(block: AttentionBlock, x: Tensor, attended: Attended, tier: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns h (batch, tokens, d), and k and v (batch, heads, tokens, head_dim) for a cache."""
    u = _input_of_products(block, x, tier)
    o, k, v = _attention(block, u, attended, tier)
    o = o if isinstance(block, CappedBlock) else _before(block.out, o)
    piece = _piece_after(block.out)
    if isinstance(block, CappedBlock):
        y = _norm_and_adapt(block.post, linear(block.out, o, tier >= SUMS), tier)
        h = ops.dropout_add(y, x, block.residual_dropout)
    elif piece is None and is_plain(block.out):
        h = recomputed_if(tier >= SUMS, partial(_project_and_add, block), o, x, reads=(block.out,))
    else:
        recomputes = tier >= SUMS and is_plain(block.out)
        projected = recomputed_if(recomputes, _forward(block.out), o, reads=(block.out,))
        add = partial(_adapt_and_add, block, piece)
        h = recomputed_if(tier >= PRODUCTS, add, projected, x, reads=_pieces(block.out))
    return h if block.pre_norm else _norm_and_adapt(block.norm, h, tier), k, v


def feed_forward_block(block: FeedForwardBlock, x: Tensor, tier: int) -> Tensor:
    """Returns h (batch, tokens, d) of x (batch, tokens, d)."""
    u = _input_of_products(block, x, tier)
    is_wide = block.is_wide()
    if not is_wide:
        block.release_unused()
    if _is_frozen(block):
        y = (_parallel_ffn if is_wide else _frozen_ffn)(block, u, tier)
    else:
        recomputes = tier >= PRODUCTS
        hidden = [linear(module, u, recomputes) for module in block.inputs]
        y = linear(block.out, recomputed_if(recomputes, partial(_activate, block), *hidden))
    y = y if block.post is None else _norm_and_adapt(block.post, y, tier)
    h = ops.dropout_add(y, x, block.residual_dropout)
    return h if block.pre_norm else _norm_and_adapt(block.norm, h, tier)


# ---- norms ----------------------------------------------------------------------------------------------------------


def _input_of_products(block: AttentionBlock | FeedForwardBlock, x: Tensor, tier: int) -> Tensor:
    """Returns what the products of a block read, in the dtype that autocast gives them."""
    if block.pre_norm:
        if active_piece(block.norm) is not None:
            return cast_for_products(_norm_and_adapt(block.norm, x, tier))
        return _norm(block.norm, x, tier, cast_for_products)
    return x if cast_for_products(x) is x else recomputed_if(tier >= NORMS, cast_for_products, x)


def _norm_and_adapt(norm: nn.Module, h: Tensor, tier: int) -> Tensor:
    """Returns the output of a norm with its piece, such as Pfeiffer's adapter."""
    y = _norm(norm, _before(norm, h), tier)
    piece = active_piece(norm)
    return y if piece is None else piece.after(norm, (h,), y)


def _norm(norm: Any, x: Tensor, tier: int, then: Callable[[Tensor], Tensor] = lambda y: y) -> Tensor:
    """Returns then(norm(x)), recomputed from x and the statistics that the norm's op saves.

    An RMSNorm of 16 bits returns 16 bits, also for a wider x.
    """
    if type(norm).__name__ in OFFSET_NORMS:
        weights = (1 + norm.weight.to(accumulate_dtype(norm.weight.dtype)),)
        y, *statistics = ops.rms_norm_with_statistics(x, weights[0], norm.eps)
        from_statistics, then = ops.rms_norm_from_statistics, partial(_narrowed, x.dtype, then)
    elif isinstance(norm, nn.LayerNorm):
        y, *statistics = ops.layer_norm_with_statistics(x, norm.weight, norm.bias, norm.eps)
        from_statistics, weights = ops.layer_norm_from_statistics, _present(norm.weight, norm.bias)
    else:
        y, *statistics = ops.rms_norm_with_statistics(x, norm.weight, norm.variance_epsilon)
        from_statistics, weights = ops.rms_norm_from_statistics, (norm.weight,)
        if norm.weight.dtype.itemsize == 2 and norm.weight.dtype != x.dtype:
            then = partial(_narrowed, norm.weight.dtype, then)
    if tier < NORMS:
        return then(y)
    return recomputed_by(lambda *tensors: then(from_statistics(*tensors)), then(y), x, *statistics, parameters=weights)


def _present(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in tensors if tensor is not None)


def _narrowed(dtype: torch.dtype, then: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    return then(y.to(dtype))


# ---- attention ------------------------------------------------------------------------------------------------------


def _attention(block: AttentionBlock, u: Tensor, attended: Attended, tier: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns o (batch, tokens, heads · head_dim), k and v (batch, heads, tokens, head_dim)."""
    if isinstance(block, CappedBlock):
        return _capped_attention(block, u, attended, tier)
    mask, bias = attended.mask, attended.bias
    assert not isinstance(bias, Rotary), "a block without a cap has no rotation"
    packed = boundaries(mask, attended.source is None)
    if packed is not None or is_causal(mask):
        mask = None  # the op has arguments for both
    q, k, v = (_heads(y, block.heads) for y in _projections(block, u, attended.source, tier))
    causal = block.causal and mask is None and q.shape[2] > 1
    if mask is not None:
        mask, bias = as_added(block, mask, bias, q.dtype)
    given = causal, block.scale, block.dropout, None, *_prefix(block, q, block.heads)
    if packed is None:
        o = ops.attention(q, k, v, mask, bias, *given)
    else:  # a packed row's position bias is one by distance
        o = ops.attention(q, k, v, None, None, *given, *packed, bias)
    return o.transpose(1, 2).reshape(*u.shape[:-1], -1), k, v


def _capped_attention(block: CappedBlock, u: Tensor, attended: Attended, tier: int) -> tuple[Tensor, Tensor, Tensor]:
    raw = _projections(block, u, attended.source, tier)
    q, k, v = (y.unflatten(-1, (-1, block.head_dim)).transpose(1, 2) for y in raw)
    if isinstance(attended.bias, Rotary):
        q, k = (recomputed_if(tier >= PRODUCTS, partial(_rotated, attended.bias), own) for own in (q, k))
    mask = None if attended.mask is None else as_added(block, attended.mask, None, q.dtype)[0]
    own = block.cap, block.scale, block.dropout, None, *_prefix(block, q, k.shape[1])
    o = ops.capped_attention(q, k, v, mask, *own)
    return o.transpose(1, 2).reshape(*u.shape[:-1], -1), k, v


def _rotated(rotary: Rotary, x: Tensor) -> Tensor:
    return rotated(x, rotary)


def _heads(y: Tensor, heads: int) -> Tensor:
    return y.view(*y.shape[:-1], heads, -1).transpose(1, 2)


def _prefix(block: AttentionBlock, q: Tensor, heads: int) -> tuple[Tensor | None, Tensor | None]:
    piece = active_piece(block.host)
    if not isinstance(piece, Prefix):
        return None, None
    k, v = (own.to(q.dtype).view(-1, heads, q.shape[-1]) for own in piece.folded())
    return k, v


def _projections(block: AttentionBlock, u: Tensor, source: Tensor | None, tier: int) -> list[Tensor]:
    recomputes = tier >= PRODUCTS
    if source is None:
        return linears((block.q, block.k, block.v), u, recomputes)
    return [linear(block.q, u, recomputes), *linears((block.k, block.v), source, recomputes)]


def _project_and_add(block: AttentionBlock, o: Tensor, x: Tensor) -> Tensor:
    return ops.dropout_add(block.out.forward(o), x, block.residual_dropout)


def _adapt_and_add(block: AttentionBlock, piece: Piece | None, projected: Tensor, x: Tensor) -> Tensor:
    y = projected if piece is None else piece.after(block.out, (), projected)
    return ops.dropout_add(y, x, block.residual_dropout)


# ---- feed-forward network -------------------------------------------------------------------------------------------


def _activate(block: FeedForwardBlock, z: Tensor, *gate: Tensor) -> Tensor:
    own = block.activation, block.dropout
    a = ops.gated_activation(z, gate[0], *own) if gate else ops.activation(z, *own)
    # T5 has its last projection in fp32 beside 16-bit ones
    weight = getattr(block.out, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or torch.is_autocast_enabled(a.device.type):
        return a
    return a.to(weight.dtype)


def _frozen_ffn(block: FeedForwardBlock, u: Tensor, tier: int) -> Tensor:
    first, out = block.inputs[0], block.out
    gate = block.inputs[1].weight if len(block.inputs) > 1 else None
    adapter, recomputes = active_piece(out), _recomputes_hidden(block, tier)
    y = ops.frozen_ffn(u, first.weight, first.bias, out.weight, out.bias, gate, block.activation, recomputes)
    return y if adapter is None else adapter(u, residual=y)


def _recomputes_hidden(block: FeedForwardBlock, tier: int) -> bool:
    return tier >= PRODUCTS and (block.activation != "relu" or len(block.inputs) > 1)  # a ReLU saves one bit a unit


def _parallel_ffn(block: FeedForwardBlock, u: Tensor, tier: int) -> Tensor:
    """Returns the network's output with that of the adapter, as one network with more hidden units."""
    wide = block.wide
    assert wide is not None, "the block is wide"
    adapter = wide.modules[2]
    down, up = adapter.down, adapter.up
    trained = down.weight, down.bias, up.weight, up.bias
    frozen = wide.w1, wide.c1, wide.w2, block.out.bias
    return ops.parallel_ffn(u, *frozen, *trained, block.activation, adapter.scale, _recomputes_hidden(block, tier))


def _is_frozen(block: FeedForwardBlock) -> bool:
    linears = (*block.inputs, block.out)
    return block.dropout == 0 and all(
        type(module) in (nn.Linear, FrozenLinear)
        and is_plain(module)
        and _is_parallel_or_nothing(active_piece(module))
        and not module.weight.requires_grad
        and module.weight.dtype == linears[0].weight.dtype
        and (module.bias is None or len(block.inputs) == 1)
        for module in linears
    )


def _is_parallel_or_nothing(piece: Piece | None) -> bool:
    return piece is None or isinstance(piece, (ParallelAdapter, ReadInput))


# ---- linear layers with their adapters ------------------------------------------------------------------------------


def linear(module: nn.Module, x: Tensor, recomputes: bool = False) -> Tensor:
    """Returns ``module(x)``."""
    if not is_plain(module):
        return module(x)
    y = recomputed_if(recomputes, module.forward, _before(module, x), reads=(module,))
    return _after(module, y, recomputes)


def linears(modules: Sequence[nn.Module], x: Tensor, recomputes: bool) -> list[Tensor]:
    """Returns the output of each module for the same x; those with LoRA at one rate of dropout are one op."""
    grouped: list[Any] = [module for module in modules if _has_lora(module)]
    if len(grouped) < 2 or len({_lora_dropout(module) for module in grouped}) > 1:
        return [linear(module, x, recomputes) for module in modules]
    ys = recomputed_if(recomputes, partial(_grouped_lora, grouped), x, reads=tuple(grouped))
    found = dict(zip(grouped, ys, strict=True))
    return [
        _after(module, found[module], recomputes) if module in found else linear(module, x, recomputes)
        for module in modules
    ]


def _grouped_lora(modules: list[Any], x: Tensor) -> tuple[Tensor, ...]:
    return tuple(lora_linears(modules, x, _lora_dropout(modules[0])))


def _has_lora(module: nn.Module) -> bool:
    if type(module) is not LoRALinear:
        return False
    own: Any = module.lora
    return (
        own.current() is not None
        and is_plain(module)
        and not hasattr(module, "petl")
        and not module.weight.requires_grad
    )


def _lora_dropout(module: Any) -> float:
    return module.lora.current().dropout if module.training else 0.0


def _before(module: nn.Module, x: Tensor) -> Tensor:
    piece = active_piece(module)
    changed = None if piece is None else piece.before(module, (x,))
    return x if changed is None else changed[0]


def _after(module: nn.Module, y: Tensor, recomputes: bool) -> Tensor:
    piece = _piece_after(module)
    return y if piece is None else recomputed_if(recomputes, partial(piece.after, module, ()), y, reads=_pieces(module))


def _pieces(module: Any) -> tuple[nn.Module, ...]:
    return (module.petl,) if hasattr(module, "petl") else ()


def _piece_after(module: nn.Module) -> Piece | None:
    """Returns the active piece on ``module`` where it changes the output."""
    piece = active_piece(module)
    return None if piece is None or type(piece).after is Piece.after else piece


def _forward(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return module.forward if is_plain(module) else module
