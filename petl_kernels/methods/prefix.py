"""Prefix-tuning (arXiv 2101.00190): trained keys and values in front of those of every attention.

    softmax(q [P_k; K]ᵀ · scale) [P_v; V],   P_k, P_v (length, heads · head_dim)

in encoder self-, decoder self- and cross-attention of every layer. While training, P = MLP(P') with
MLP(p) = W_2 tanh(W_1 p + b_1) + b_2, width d -> 512 -> d, one MLP for each of the three kinds of attention; ``fold``
puts its results in the place of P' and drops it. What is stored is folded, and ``count`` counts that.

The prefix is joined inside the attention function, after the key/value cache, so caches never hold it and beam search
reorders them as before. transformers finds attention functions in a registry by name; the functions registered here
wrap its "eager" and "sdpa" ones. Masks and T5's position bias are extended by zeros: every query sees the prefix.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petl_kernels import versions
from petl_kernels.errors import InputError
from petl_kernels.methods.base import Method, check_size, setting
from petl_kernels.methods.owner import find_record
from petl_kernels.methods.pieces import Named, Piece, attach, piece_dtype, pieces
from petl_kernels.models.structure import Attention, describe
from petl_kernels.models.transformers_names import (
    attention_function,
    attention_implementation,
    choose_attention,
    register_attention,
    runs_attention_functions,
)

HIDDEN = 512
_WRAPPED = ("eager", "sdpa")
_NAME = "petl_prefix_"


class Prefix(Piece):
    """The prefix of one attention: ``key`` and ``value`` (length, heads · head_dim).

    While there is an MLP they are its inputs, once it is folded the prefix itself.
    """

    what = "prefix"
    # The pieces that share the MLP, in a tuple as it is; none in models that were pickled early.
    kind: tuple[Prefix, ...] = ()

    def __init__(self, attention: Attention, length: int, mlp: nn.Module, weight: Tensor):
        super().__init__()
        shape = (length, attention.heads * attention.head_dim)
        self.heads, self.head_dim = attention.heads, attention.head_dim
        self.key = nn.Parameter(torch.randn(shape, dtype=piece_dtype(weight), device=weight.device))
        self.value = nn.Parameter(torch.randn(shape, dtype=piece_dtype(weight), device=weight.device))
        self.mlp = (mlp,)  # in a tuple: it is shared, and a submodule of the model's root

    def before(self, host: nn.Module, args: tuple) -> None:
        implementation = attention_implementation(host.config)
        if implementation is None or not implementation.startswith(_NAME):
            raise InputError(
                f"attention implementation {implementation!r}: it leaves the prefix out, "
                f"expected {_NAME}{implementation!s} (model.set_attn_implementation)"
            )

    def state(self) -> dict[str, Tensor]:
        key, value = self.folded()
        return {"prefix.key": key, "prefix.value": value}

    def training_state(self) -> dict[str, Tensor]:
        return {} if self.mlp is None else {"prefix.key": self.key, "prefix.value": self.value}

    def folded(self) -> tuple[Tensor, Tensor]:
        """Returns the prefix itself, (length, heads · head_dim) each.

        The MLP works in the dtype of its parameters, under autocast too, so that folding changes nothing there.
        """
        if self.mlp is None:
            return self.key, self.value
        (mlp,) = self.mlp
        device = self.key.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            return mlp(self.key), mlp(self.value)

    def fold(self) -> None:
        if self.mlp is None:
            return
        with torch.no_grad():
            key, value = self.folded()
            self.key.copy_(key)
            self.value.copy_(value)
        self.mlp = None

    def joined(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Returns key and value (batch, heads, tokens, head_dim) with the prefix in front of them."""
        own_key, own_value = (self._heads(own, key) for own in self.folded())
        return torch.cat([own_key, key], dim=2), torch.cat([own_value, value], dim=2)

    def _heads(self, own: Tensor, like: Tensor) -> Tensor:
        own = own.to(like.dtype).view(-1, self.heads, self.head_dim).transpose(0, 1)
        return own.expand(like.shape[0], -1, -1, -1)


class PrefixMLPs(Piece):
    """The MLPs of one adapter, by kind of attention; empty once folded."""

    what = "MLPs of the prefix"

    def __init__(self, widths: dict[str, int], weight: Tensor):
        super().__init__()
        place = {"dtype": piece_dtype(weight), "device": weight.device}
        self.by_kind = nn.ModuleDict(
            {
                kind: nn.Sequential(nn.Linear(width, HIDDEN, **place), nn.Tanh(), nn.Linear(HIDDEN, width, **place))
                for kind, width in widths.items()
            }
        )

    def training_state(self) -> dict[str, Tensor]:
        return {f"prefix.{name}": parameter for name, parameter in self.named_parameters()}

    def fold(self) -> None:
        self.by_kind = nn.ModuleDict()


@dataclass(frozen=True)
class PrefixTuning(Method):
    """``length`` trained keys and values in every attention."""

    length: int = setting(20, "keys and values that stand before an attention's own")

    method: ClassVar[str] = "prefix"
    trains: ClassVar[str] = "keys and values before those of every attention"
    learning_rate: ClassVar[float] = 1e-3
    cannot_merge: ClassVar[str] = "a prefix is not part of any weight, so it cannot be merged"
    size_field: ClassVar[str] = "length"

    def __post_init__(self):
        check_size("prefix", "length", self.length)

    def inject(self, model: nn.Module, name: str) -> None:
        attentions = describe(model).attentions
        for attention in attentions:
            check_attention(attention.path, model.get_submodule(attention.path))
        use_prefix_attention(model)
        weight = model.get_parameter(f"{attentions[0].q}.weight")
        mlps = PrefixMLPs({attention.kind: attention.heads * attention.head_dim for attention in attentions}, weight)
        kinds: dict[str, list[Prefix]] = {}
        for attention in attentions:
            piece = Prefix(attention, self.length, mlps.by_kind[attention.kind], weight)
            attach(model.get_submodule(attention.path), name, piece)
            kinds.setdefault(attention.kind, []).append(piece)
        for own in kinds.values():
            for piece in own:
                piece.kind = tuple(own)
        # after the attentions: folding visits the places in order, and they need the MLPs
        if not hasattr(model, "petl_prefix_mlps"):
            model.petl_prefix_mlps = Named()
        root: Any = model
        root.petl_prefix_mlps[name] = mlps

    def count(self, model: nn.Module) -> int:
        return sum(2 * self.length * attention.heads * attention.head_dim for attention in describe(model).attentions)


def fold(model: nn.Module, name: str) -> None:
    """Replaces the MLP of the prefix ``name`` by its results: the same outputs, fewer parameters, less work.

    The folded prefix is trained directly from then on; an optimiser of the MLP has to be made anew.
    """
    if not isinstance(find_record(model, name).config, PrefixTuning):
        raise InputError(f"adapter {name!r}: not a prefix, there is nothing to fold")
    for _, piece in list(pieces(model, name)):
        piece.fold()


def check_attention(path: str, attention: nn.Module) -> None:
    """Raises InputError for an attention that would pass over a prefix, which would be trained without an effect."""
    if not runs_attention_functions(attention):
        raise InputError(
            f"prefix: {path!r} is a {type(attention).__name__}, which calls none of transformers' attention functions, "
            "so that a prefix has no way in: expected another method"
        )


def use_prefix_attention(model: nn.Module) -> None:
    """Lets the model's attentions go through ``attend``. Raises InputError for others than eager and sdpa."""
    versions.check("transformers")
    original = attention_implementation(model.config)
    if original is not None and original.startswith(_NAME):
        return
    if original not in _WRAPPED:
        raise InputError(f"prefix: attention implementation {original!r}, expected {' or '.join(map(repr, _WRAPPED))}")
    register_attention(_NAME + original, partial(attend, original), like=original)
    choose_attention(model, original, _NAME + original)


def attend(
    original: str, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, Tensor | None]:
    """Runs transformers' attention ``original`` with the prefix of ``module``'s active adapter, if it has one.

    query (batch, heads, queries, head_dim), key and value (batch, heads, keys, head_dim), attention_mask
    (batch or 1, 1, queries, keys), boolean or additive, or None.
    """
    function = attention_function(original, module)
    piece = module.petl.current() if hasattr(module, "petl") else None
    if not isinstance(piece, Prefix):
        return function(module, query, key, value, attention_mask, **kwargs)
    n_prefix, n_queries, n_keys = piece.key.shape[0], query.shape[2], key.shape[2]
    key, value = piece.joined(key, value)
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask, (n_prefix, 0), value=attention_mask.dtype == torch.bool)
    elif original == "sdpa" and n_queries > 1 and _is_causal(module, kwargs):
        # sdpa would apply its own causal mask, which starts at the first key; the prefix comes before that
        allowed = torch.ones(n_queries, n_prefix + n_keys, dtype=torch.bool, device=query.device)
        attention_mask = allowed.tril(n_prefix)[None, None]
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = F.pad(kwargs["position_bias"], (n_prefix, 0))
    output, weights = function(module, query, key, value, attention_mask, **kwargs)
    return output, None if weights is None else weights[..., n_prefix:]


def _is_causal(module: nn.Module, kwargs: dict) -> bool:
    given = kwargs.get("is_causal")
    return getattr(module, "is_causal", True) if given is None else given
