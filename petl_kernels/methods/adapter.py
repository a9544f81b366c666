"""Bottleneck adapters. With A(h) = U act(D h + d) + u, D (m, d_model) and U (d_model, m):

    after each layer        y = x + A(LN(x))              own LayerNorm; x the layer's output
                            Bapna and Firat, arXiv 1909.08478
    after each sub-layer    y = x + A(LN(x))              own LayerNorm; x the output of each attention's output
                            projection and of the feed-forward block, before the residual; Houlsby et al.,
                            arXiv 1902.00751
    Pfeiffer                y = LN_f(x + A(LN_f(x)))      LN_f the layer's own frozen final norm, x its input (the sum
                            of the feed-forward block and its residual); Pfeiffer et al., arXiv 2005.00247
    parallel                y = ffn(x) + s · A(x)         s = 4; x the feed-forward block's input; He et al.,
                            arXiv 2110.04366

Pfeiffer's formula is for post-norm layers (Marian, BART), where LN_f ends the layer. Pre-norm layers (M2M-100, mBART,
T5) pass the sum on without a norm, so there y = x + A(LN_f(x)): the same adapter, reading through the same frozen norm,
with the outer norm left out as the layer itself leaves it out.

U starts from N(0, 1e-5), so training starts from the base model.
"""

from __future__ import annotations

import math
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from petl_kernels import ops
from petl_kernels.errors import InputError
from petl_kernels.methods.base import Method, check_size, setting
from petl_kernels.methods.pieces import Piece, attach, piece_dtype
from petl_kernels.models.structure import Structure, describe

ACTIVATIONS = ("relu", "gelu", "silu")
PLACEMENTS = ("layer", "sublayer")


class BottleneckAdapter(Piece):
    """y = x + scale · (act(LN(x) Dᵀ + d) Uᵀ + u); x (..., d) -> (..., d), bottleneck m. See ``ops.bottleneck_adapter``.

    norm: with a LayerNorm of its own. activation: "relu", "gelu" (erf) or "silu".
    """

    what = "adapter"
    wide = False  # computes in the dtype of x, inside autocast, too: beside T5's sums, which leave the range of fp16

    def __init__(
        self,
        d: int,
        m: int,
        activation: str = "relu",
        norm: bool = True,
        scale: float = 1.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_size("adapter", "bottleneck", m)
        _check_choice("activation", activation, ACTIVATIONS)
        place = {"device": device, "dtype": dtype}
        self.activation, self.scale = activation, scale
        self.norm = nn.LayerNorm(d, **place) if norm else None
        self.down = nn.Linear(d, m, **place)
        self.up = nn.Linear(m, d, **place)
        nn.init.normal_(self.up.weight, std=1e-5)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Returns the adapter's result for x (..., d), added to ``residual`` (..., d), which is x itself when None."""
        with torch.autocast(x.device.type, enabled=False) if self.wide else nullcontext():
            return self._added(x, residual)

    def _added(self, x: Tensor, residual: Tensor | None) -> Tensor:
        ln_weight, ln_bias, eps = (None, None, 1e-5) if self.norm is None else (*self.norm.parameters(), self.norm.eps)
        return ops.bottleneck_adapter(
            x,
            self.down.weight,
            self.down.bias,
            self.up.weight,
            self.up.bias,
            ln_weight,
            ln_bias,
            eps,
            self.activation,
            self.scale,
            residual,
        )

    def after(self, host: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return self(output)

    def state(self) -> dict[str, Tensor]:
        return {f"adapter.{name}": parameter for name, parameter in self.named_parameters()}


class PreNormPfeiffer(BottleneckAdapter):
    """A piece on a pre-norm layer: y = x + A(LN_f(x)). ``norm_name``: LN_f's path inside the layer."""

    def __init__(self, norm_name: str, *args, **kwargs):
        super().__init__(*args, norm=False, **kwargs)
        self.norm_name = norm_name

    def after(self, host: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return self(_frozen_norm(host.get_submodule(self.norm_name), output), residual=output)


class PostNormPfeiffer(BottleneckAdapter):
    """A piece on the norm that ends a post-norm layer: y = LN_f(x + A(LN_f(x)))."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, norm=False, **kwargs)

    def after(self, host: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return host.forward(self(output, residual=args[0]))


def _frozen_norm(norm: nn.Module, x: Tensor) -> Tensor:
    return norm.forward(x).to(x.dtype)  # forward: the norm's hooks are for its own place in the layer


class ParallelAdapter(BottleneckAdapter):
    """A piece on the feed-forward block's last linear: adds scale · A(x), x the block's input, from ``ReadInput``."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, norm=False, **kwargs)

    def after(self, host: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return self(_handed.inputs.pop(self).to(output.dtype), residual=output)


class _Handed(threading.local):
    """The inputs of blocks that this thread has begun, by the adapter that will read them."""

    def __init__(self):
        self.inputs: WeakKeyDictionary[ParallelAdapter, Tensor] = WeakKeyDictionary()


_handed = _Handed()


def _drop_after(layer: nn.Module) -> None:
    """Lets a layer that fails between the two leave nothing behind."""
    if _drop not in layer._forward_hooks.values():
        layer.register_forward_hook(_drop, always_call=True)


def _drop(layer: nn.Module, args: tuple, output) -> None:
    _handed.inputs.clear()


class ReadInput(Piece):
    """A piece on the feed-forward block's first linear: hands its input to the block's parallel adapter."""

    def __init__(self, adapter: ParallelAdapter):
        super().__init__()
        self.adapter = (adapter,)  # in a tuple: the adapter is a submodule of its own place

    def before(self, host: nn.Module, args: tuple) -> None:
        _handed.inputs[self.adapter[0]] = args[0]


@dataclass(frozen=True)
class Adapter(Method):
    """Bottleneck adapters of size ``bottleneck`` in every layer.

    placement: "layer" or "sublayer"; parallel: beside the feed-forward block; pfeiffer: through the layer's own norm.
    scale: factor on the adapter's result; None is 4 for parallel ones, else 1.
    """

    bottleneck: int = setting(64, "units of the bottleneck")
    placement: str = setting("layer", "layer or sublayer: behind each layer, or each block in it")
    parallel: bool = setting(False, "beside the feed-forward block, not behind the layer")
    pfeiffer: bool = setting(False, "through the layer's own norm")
    activation: str = setting("relu", "relu, gelu or silu")
    scale: float | None = setting(None, "factor on the adapter's result; null: 4 for parallel, else 1")

    method: ClassVar[str] = "adapter"
    trains: ClassVar[str] = "a bottleneck (down, activation, up) behind each layer"
    variants: ClassVar[dict] = {
        "adapter-sublayer": (
            {"placement": "sublayer"},
            "a bottleneck behind each attention and each feed-forward block",
        ),
        "pfeiffer": ({"pfeiffer": True}, "a bottleneck behind each layer, through the layer's own last norm"),
        "parallel": ({"parallel": True}, "a bottleneck beside each feed-forward block"),
    }
    cannot_merge: ClassVar[str] = "a bottleneck adapter is not linear, so no weight can hold it"
    size_field: ClassVar[str] = "bottleneck"
    ops: ClassVar[tuple[str, ...]] = ("bottleneck_adapter",)

    def __post_init__(self):
        check_size("adapter", "bottleneck", self.bottleneck)
        _check_choice("placement", self.placement, PLACEMENTS)
        _check_choice("activation", self.activation, ACTIVATIONS)
        for name in ("parallel", "pfeiffer"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"adapter {name} {getattr(self, name)!r}: expected true or false")
        number = isinstance(self.scale, (int, float)) and not isinstance(self.scale, bool)
        if self.scale is not None and not (number and math.isfinite(self.scale)):
            raise InputError(f"adapter scale {self.scale!r}: expected a finite number")
        if self.parallel + self.pfeiffer + (self.placement == "sublayer") > 1:
            raise InputError("adapter: placement 'sublayer', parallel and pfeiffer exclude each other")

    def inject(self, model: nn.Module, name: str) -> None:
        structure = describe(model)
        experts = next((layer.ffn.out for layer in structure.layers if not layer.ffn.inputs), "")
        if self.parallel and experts:
            raise InputError(f"adapter parallel: {experts} is a network of experts; expected another placement")
        for path in self._places(structure):
            host = model.get_submodule(path)
            attach(host, name, self._piece(model, structure, path))
        if self.parallel:
            for layer in structure.layers:
                host: Any = model.get_submodule(layer.ffn.out)
                attach(model.get_submodule(layer.ffn.inputs[0]), name, ReadInput(host.petl[name]))
                _drop_after(model.get_submodule(layer.path))

    def count(self, model: nn.Module) -> int:
        structure = describe(model)
        d, m = structure.d_model, self.bottleneck
        own_norm = 0 if self.parallel or self.pfeiffer else 2 * d
        return len(self._places(structure)) * (2 * d * m + m + d + own_norm)

    def _places(self, structure: Structure) -> list[str]:
        if self.placement == "sublayer":
            return [
                path
                for layer in structure.layers
                for path in (*(attention.out for attention in layer.attentions), layer.ffn.out)
            ]
        if self.parallel:
            return [layer.ffn.out for layer in structure.layers]
        if self.pfeiffer and not structure.pre_norm:
            return [layer.ffn.norm for layer in structure.layers]
        return [layer.path for layer in structure.layers]

    def _piece(self, model: nn.Module, structure: Structure, path: str) -> BottleneckAdapter:
        weight = next(model.get_submodule(path).parameters())
        settings = {
            "activation": self.activation,
            "scale": self.scale if self.scale is not None else 4.0 if self.parallel else 1.0,
            "device": weight.device,
            "dtype": piece_dtype(weight),
        }
        size = (structure.d_model, self.bottleneck)
        if self.parallel:
            return ParallelAdapter(*size, **settings)
        if not self.pfeiffer:
            return BottleneckAdapter(*size, **settings)
        if not structure.pre_norm:
            return PostNormPfeiffer(*size, **settings)
        layer = next(layer for layer in structure.layers if layer.path == path)
        return PreNormPfeiffer(layer.ffn.norm.removeprefix(f"{path}."), *size, **settings)


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"adapter {what} {value!r}: expected {' or '.join(map(repr, choices))}")
