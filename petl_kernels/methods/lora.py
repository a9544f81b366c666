"""LoRA (arXiv 2106.09685): y = x Wᵀ + c + scale · drop(x) Aᵀ Bᵀ with A (r, in), B (out, r) and scale = alpha / r.

A starts from kaiming_uniform(a=√5) and B from 0, so training starts from the base model. On an embedding table E the
rows get E[i] + scale · B A[:, i], with A (r, vocabulary) from 0 and B (dim, r) from N(0, 1), as in loralib.

Merging puts W + scale · B A into the base. Where the weight is tied (the output projection with the embeddings), the
tie is first dissolved: only the module that carries the LoRA changes.

DoRA (arXiv 2402.09353) trains the length of each row of W + scale · B A as well:

    y = g ⊙ (x Wᵀ + scale · x Aᵀ Bᵀ) + c        g = m / ‖W + scale · B A‖, by rows, of which backward takes the norm
                                                 as a constant

m (out,) starts at ‖W‖, so training starts from the base model; m of an adapter that has not been trained follows where
the base is quantized or cast (``with_lengths_that_follow``).
g is in fp32 or wider, whatever the dtype of x: 16 bits have no number between 1 and 1.004. Merging gives g ⊙ (W +
scale · B A).
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from petl_kernels import ops
from petl_kernels.errors import InputError, shown
from petl_kernels.methods.base import Method, check_size, setting
from petl_kernels.methods.pieces import Named, Piece, attach, piece_dtype
from petl_kernels.methods.targets import find_targets
from petl_kernels.methods.values import stored_as, wide_copy
from petl_kernels.models.structure import describe
from petl_kernels.ops.philox import RATES, has_mask
from petl_kernels.ops.quantized import tiles


class LowRank(Piece):
    """A and B of one linear layer. A (r, in), B (out, r). magnitude: m (out,) of DoRA; None for LoRA."""

    what = "LoRA"

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout: float, magnitude: Tensor | None = None):
        super().__init__()
        place = {"device": linear.weight.device, "dtype": piece_dtype(linear.weight)}
        self.stored_scale, self.stored_dropout = scale, dropout
        self.A = nn.Parameter(torch.empty(rank, linear.in_features, **place))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, **place))
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    # Ops take rates below 1. A rate of 1 drops all of x in training, which a scale of 0 gives without dividing by 0.

    @property
    def scale(self) -> float:
        return 0.0 if self.training and self.stored_dropout == 1 else self.stored_scale

    @property
    def dropout(self) -> float:
        return 0.0 if self.stored_dropout == 1 else self.stored_dropout

    @dropout.setter
    def dropout(self, rate: float) -> None:
        if self.magnitude is not None:
            _check_dora_dropout(rate)
        self.stored_dropout = rate

    def state(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {"lora_A": self.A, "lora_B": self.B}
        return found if self.magnitude is None else {**found, "lora_magnitude_vector": self.magnitude}

    def factor(self, weight: Tensor) -> Tensor | None:
        """Returns g (out,) of DoRA, in fp32 or wider; None for LoRA."""
        if self.magnitude is None:
            return None
        return self.magnitude / ops.lora_norm(weight, self.A, self.B, self.stored_scale)

    def delta(self, rows: slice = slice(None)) -> Tensor:
        """Returns ``rows`` of scale · B A, (out, in)."""
        return self.stored_scale * (self.B[rows] @ self.A)

    def extra_repr(self) -> str:
        return f"rank={self.A.shape[0]}, scale={self.stored_scale}, dropout={self.stored_dropout}"


class LoRALinear(nn.Linear):
    """A linear layer with LoRA adapters by name, one of them active.

    ``weight`` and ``bias`` are the base's own parameters under their own names; the weight is frozen.
    """

    lora: Named
    _original: tuple[str, list[Tensor]] | None  # the merged adapter and the weight without it

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, rank: int = 16, alpha: float | None = None, dropout: float = 0.0, name: str = "default"
    ) -> LoRALinear:
        """Returns ``linear``, frozen, with one active adapter; alpha is 2 · rank when not given."""
        layer = cls.wrap(linear)
        layer.requires_grad_(False)
        layer.add(name, rank, (2 * rank if alpha is None else alpha) / rank, dropout)
        layer.lora.active = name
        return layer

    @classmethod
    def wrap(cls, linear: nn.Linear) -> LoRALinear:
        """Returns a layer with the parameters, hooks and submodules of ``linear``, ready for ``add``."""
        layer = cls.__new__(cls)
        layer.__dict__.update(linear.__dict__)
        for own in ("_parameters", "_buffers", "_modules"):
            layer.__dict__[own] = copy.copy(linear.__dict__[own])
        layer.lora = Named()
        layer._original = None
        return layer

    def add(self, name: str, rank: int, scale: float, dropout: float = 0.0, magnitude: Tensor | None = None) -> None:
        """Adds an adapter, not yet active; with ``magnitude`` (out,) it is DoRA.

        Raises InputError for a rank that is no size or larger than the layer.
        """
        check_rank(f"{self.out_features} x {self.in_features} linear", rank, self.in_features, self.out_features)
        self.lora[name] = LowRank(self, rank, scale, dropout, magnitude).train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        piece: Any = self.lora.current()
        if piece is None:  # the plain layer; its weight is trained where another adapter of the model trains the base
            plain = F.linear if self.weight.requires_grad else ops.frozen_linear
            return plain(x, self.weight, self.bias)
        return lora_linears([self], x, piece.dropout if self.training else 0.0)[0]

    def merge(self) -> float | None:
        """Puts the active adapter into the weight. The original is kept, so ``unmerge`` restores it bit for bit.

        A quantized weight is quantized again: returns the error ‖Ŵ - W‖ / ‖W‖ of that, None for a dense one.
        """
        if self._original is not None or self.lora.active is None:
            raise InputError("LoRALinear.merge: expected an active adapter that is not merged yet")
        piece: Any = self.lora.current()
        merged, error = stored_as(self.weight, _merged(self.weight, piece))
        self._original = (self.lora.active, [self.weight])  # in a list: not a parameter of this module
        self.weight = nn.Parameter(merged, requires_grad=False)
        self.lora.active = None
        return error

    def unmerge(self) -> None:
        if self._original is None:
            raise InputError("LoRALinear.unmerge: no adapter is merged")
        self.lora.active, (self.weight,) = self._original
        self._original = None


def lora_linears(linears: Sequence[Any], x: Tensor, dropout: float) -> list[Tensor]:
    """Returns the output of each ``LoRALinear`` with its active adapter, as one op that reads x once."""
    pieces = [linear.lora.current() for linear in linears]
    ys = ops.lora_linear_grouped(
        x,
        [linear.weight for linear in linears],
        [linear.bias for linear in linears],
        [piece.A for piece in pieces],
        [piece.B for piece in pieces],
        [piece.scale for piece in pieces],
        dropout,
    )
    return [_rescaled(y, linear, piece) for y, linear, piece in zip(ys, linears, pieces, strict=True)]


def _rescaled(y: Tensor, linear: LoRALinear, piece: LowRank) -> Tensor:
    """Returns g ⊙ y + (1 - g) ⊙ c of DoRA, rounded once to the dtype of y, for y with the bias c; y itself for LoRA."""
    factor = piece.factor(linear.weight)
    if factor is None:
        return y
    changed = y * factor
    return (changed if linear.bias is None else changed + (1 - factor) * linear.bias).to(y.dtype)


class GroupedLoRALinear(nn.Module):
    """LoRA linears that share their input, such as q, k and v: x is read once and dropped once.

    x (..., in) -> [(..., out_g) for each]. Equal to the linears one by one.
    """

    linears: Iterable[Any]

    def __init__(self, linears: list[LoRALinear]):
        super().__init__()
        self.linears = nn.ModuleList(linears)

    @classmethod
    def from_linears(
        cls, linears: list[nn.Linear], rank: int = 16, alpha: float | None = None, dropout: float = 0.0
    ) -> GroupedLoRALinear:
        """Returns ``linears``, frozen, each with an adapter of ``rank``; alpha is 2 · rank when not given."""
        if not linears:
            raise InputError("GroupedLoRALinear: expected at least one linear layer")
        return cls([LoRALinear.from_linear(linear, rank, alpha, dropout) for linear in linears])

    def forward(self, x: Tensor) -> list[Tensor]:
        linears = list(self.linears)
        return lora_linears(linears, x, linears[0].lora.current().dropout if self.training else 0.0)


class EmbeddingLowRank(Piece):
    """A and B of one embedding table. A (r, vocabulary), B (dim, r)."""

    what = "LoRA"

    def __init__(self, embedding: nn.Embedding, rank: int, scale: float):
        super().__init__()
        place = {"device": embedding.weight.device, "dtype": piece_dtype(embedding.weight)}
        self.scale = scale
        self.A = nn.Parameter(torch.zeros(rank, embedding.num_embeddings, **place))
        self.B = nn.Parameter(torch.randn(embedding.embedding_dim, rank, **place))

    def after(self, host: nn.Embedding, args: tuple, output: Tensor) -> Tensor:
        # some tables (M2M-100, mBART) multiply what they return
        scale = self.scale * getattr(host, "embed_scale", 1.0)
        return output + (scale * (F.embedding(args[0], self.A.T) @ self.B.T)).to(output.dtype)

    def state(self) -> dict[str, Tensor]:
        return {"lora_embedding_A": self.A, "lora_embedding_B": self.B}

    def delta(self, rows: slice = slice(None)) -> Tensor:
        """Returns ``rows`` of scale · Aᵀ Bᵀ, (vocabulary, dim)."""
        return self.scale * (self.B @ self.A[:, rows]).T


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adapters on the linear layers (or token embeddings) that ``targets`` names.

    targets: module names, or a regular expression for whole paths, or "all-linear"; None is q and v of every attention.
    rank_pattern, alpha_pattern: other ranks and alphas for some modules, by a regular expression for the path's end.
    rslora: scale = alpha / √rank (arXiv 2312.03732) in place of alpha / rank.
    bias: "none", or "lora_only": the targets' own biases are trained as well.
    dora: the length of each row is trained beside its direction; on linear layers, without dropout.
    """

    rank: int = setting(16, "rank of the change")
    alpha: float = setting(32.0, "the change counts alpha / rank")
    dropout: float = setting(0.0, "share of the adapter's inputs that is dropped")
    targets: tuple[str, ...] | str | None = setting(
        None, "names of modules, a regular expression for paths, or all-linear; null: those above"
    )
    rank_pattern: dict[str, int] = setting(dict, "other ranks, by a regular expression for the path's end")
    alpha_pattern: dict[str, float] = setting(dict, "other alphas, the same way")
    rslora: bool = setting(False, "the change counts alpha / square root of rank")
    bias: str = setting("none", "none, or lora_only: the targets' biases are trained, too")
    dora: bool = setting(False, "the length of each of the weight's rows is trained, too; without dropout")

    method: ClassVar[str] = "lora"
    trains: ClassVar[str] = "a low-rank change of linear layers: q and v of every attention"
    peft_type: ClassVar[str] = "LORA"
    size_field: ClassVar[str] = "rank"
    ops: ClassVar[tuple[str, ...]] = ("lora_linear",)
    variants: ClassVar[dict[str, tuple[dict[str, Any], str]]] = {
        "dora": ({"dora": True}, "a low-rank change of the same layers, and the length of each of their rows")
    }

    def __post_init__(self):
        check_size("lora", "rank", self.rank)
        if not 0 <= self.dropout <= 1:
            raise InputError(f"lora dropout {self.dropout!r}: expected a number from 0 to 1")
        if self.dropout < 1 and not has_mask(self.dropout):
            raise InputError(f"lora dropout {self.dropout!r}: expected 1, {RATES}")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if not alpha > 0:
                raise InputError(f"lora alpha {alpha!r}: expected a number above 0")
        if self.bias not in ("none", "lora_only"):
            raise InputError(f"lora bias {self.bias!r}: expected 'none' or 'lora_only'")
        if not isinstance(self.dora, bool):
            raise InputError(f"lora dora {shown(self.dora)}: expected True or False")
        if self.dora:
            _check_dora_dropout(self.dropout)
        if isinstance(self.targets, (list, tuple)):
            object.__setattr__(self, "targets", tuple(self.targets))
            if not self.targets:
                raise InputError("lora targets (): expected at least one module name")

    def inject(self, model: nn.Module, name: str) -> None:
        targets = self.resolve(model)
        lengths = {path: _directed_lengths(path, _target(model, path)) for path in targets} if self.dora else {}
        for path, (rank, scale) in targets.items():
            module: Any = model.get_submodule(path)
            if isinstance(module, nn.Embedding):
                attach(module, name, EmbeddingLowRank(module, rank, scale))
                continue
            if not isinstance(module, LoRALinear):
                parent, _, child = path.rpartition(".")
                module = LoRALinear.wrap(module)
                setattr(model.get_submodule(parent), child, module)
            module.add(name, rank, scale, self.dropout, lengths.get(path))

    def resolve(self, model: nn.Module) -> dict[str, tuple[int, float]]:
        """Returns path -> (rank, scale) of every target."""
        found = {}
        for path in self.target_paths(model):
            rank = self.rank_of(path)
            alpha = _by_pattern(self.alpha_pattern, path, self.alpha)
            target = _target(model, path)
            _check_plain(path, target)
            if self.dora and isinstance(target, nn.Embedding):
                raise InputError(f"lora target {path!r} with dora: an embedding, expected linear layers")
            check_rank(repr(path), rank, *_shape(target))
            found[path] = (rank, alpha / (math.sqrt(rank) if self.rslora else rank))
        return found

    def rank_of(self, path: str) -> int:
        return _by_pattern(self.rank_pattern, path, self.rank)

    def target_paths(self, model: nn.Module) -> list[str]:
        if self.targets is None:
            return [path for attention in describe(model).attentions for path in (attention.q, attention.v)]
        paths = find_targets(model, self.targets, (nn.Linear, nn.Embedding), "lora")
        for path in paths:
            _check_embedding(model, path)
        return paths

    def base_tensors(self, model: nn.Module) -> list[str]:
        if self.bias == "none":
            return []
        paths = self.target_paths(model)
        return [f"{path}.bias" for path in paths if getattr(model.get_submodule(path), "bias", None) is not None]

    def count(self, model: nn.Module) -> int:
        targets = {path: (rank, *_shape(_target(model, path))) for path, (rank, _) in self.resolve(model).items()}
        own = sum(rank * (inputs + outputs) + self.dora * outputs for rank, inputs, outputs in targets.values())
        return own + super().count(model)

    def computes(self, model: nn.Module) -> dict[str, object]:
        targets = {f"(rank, scale) of {path!r}": values for path, values in self.resolve(model).items()}
        return {**targets, "bias": self.bias}

    def merged_weights(self, model: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
        for path in self.target_paths(model):
            module: Any = model.get_submodule(path)
            piece: Any = module.lora[name] if isinstance(module, LoRALinear) else module.petl[name]
            yield f"{path}.weight", _merged(module.weight, piece)

    @classmethod
    def sized(cls, size: int, **fixed) -> LoRA:
        return cls(**{"rank": size, "alpha": 2.0 * size, **fixed})

    @classmethod
    def largest_size(cls, model: nn.Module, **fixed) -> int:
        paths = cls(**{"rank": 1, **fixed}).target_paths(model)
        return min(largest_rank(_target(model, path)) for path in paths)


def _target(model: nn.Module, path: str) -> Any:
    """Returns the linear layer or the embedding at ``path``."""
    return model.get_submodule(path)


def largest_rank(module: nn.Linear | nn.Embedding) -> int:
    return min(_shape(module))


def check_rank(what: str, rank: int, n_in: int, n_out: int) -> None:
    check_size("lora", "rank", rank)
    if rank > min(n_in, n_out):
        raise InputError(f"lora rank {rank}: larger than {what} allows, expected at most {min(n_in, n_out)}")


@torch.no_grad()
def _merged(weight: Tensor, piece: LowRank | EmbeddingLowRank) -> Tensor:
    """Returns W + scale · B A, summed in fp32 or wider, the second term in tiles; with DoRA g ⊙ that."""
    total = wide_copy(weight)
    factor = piece.factor(weight) if isinstance(piece, LowRank) else None
    for rows in tiles(total.shape[0], total.shape[1], total.dtype):
        total[rows] += piece.delta(rows)
        if factor is not None:
            total[rows] *= factor[rows, None]
    return total


@contextmanager
def with_lengths_that_follow(model: nn.Module) -> Iterator[None]:
    """Lets DoRA that has not been trained yet start at the norms of the weights that this block leaves."""
    linears: list[Any] = [module for module in model.modules() if isinstance(module, LoRALinear)]
    places = [(linear, piece) for linear in linears for piece in linear.lora.values()]
    at_start = [(linear, piece.magnitude) for linear, piece in places if _is_at_start(linear, piece)]
    yield
    with torch.no_grad():
        for linear, magnitude in at_start:
            magnitude.copy_(_row_lengths(linear))


def _is_at_start(linear: LoRALinear, piece: Any) -> bool:
    if piece.magnitude is None or not _has_values(piece.magnitude) or piece.B.any():
        return False
    return torch.equal(piece.magnitude, _row_lengths(linear))


def _has_values(tensor: Tensor) -> bool:
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def _directed_lengths(path: str, linear: nn.Linear) -> Tensor:
    """Returns ‖W‖ by rows (out,). Raises InputError for a row of zeros."""
    lengths = _row_lengths(linear)
    if _has_values(lengths) and not lengths.all():
        row = int((lengths == 0).nonzero()[0])
        raise InputError(
            f"lora target {path!r} with dora: row {row} is zeros and has no direction, expected LoRA there"
        )
    return lengths


@torch.no_grad()
def _row_lengths(linear: nn.Linear) -> Tensor:
    """Returns ‖W‖ by rows (out,), bit for bit as a forward pass finds it where B is 0."""
    weight, dtype = linear.weight, piece_dtype(linear.weight)
    a, b = (
        torch.zeros(size, dtype=dtype, device=weight.device) for size in ((1, weight.shape[1]), (weight.shape[0], 1))
    )
    return ops.lora_norm(weight, a, b, 1.0)


def _check_dora_dropout(rate: float) -> None:
    if rate != 0:
        raise InputError(f"lora dropout {rate!r} with dora: it would take W twice, for x and for drop(x); expected 0")


def _shape(module: nn.Linear | nn.Embedding) -> tuple[int, int]:
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return module.in_features, module.out_features


def _check_plain(path: str, module: nn.Linear | nn.Embedding) -> None:
    """Raises InputError for a module that holds its weight packed."""
    size = tuple(reversed(_shape(module))) if isinstance(module, nn.Linear) else _shape(module)
    if tuple(module.weight.shape) != size or not module.weight.is_floating_point():
        raise InputError(f"lora target {path!r}: a {type(module).__name__} with packed weights, expected plain ones")


def _by_pattern(patterns: dict, path: str, default):
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _check_embedding(model: nn.Module, path: str) -> None:
    """Raises InputError for an embedding that is no table of tokens, or one that the forward pass does not read."""
    module = model.get_submodule(path)
    if not isinstance(module, nn.Embedding):
        return
    name = path.rpartition(".")[2]
    if name == "shared":
        raise InputError(f"lora target {path!r}: the model holds it but reads embed_tokens, expected 'embed_tokens'")
    if name != "embed_tokens":
        raise InputError(f"lora target {path!r}: not a table of token embeddings, expected 'embed_tokens'")
