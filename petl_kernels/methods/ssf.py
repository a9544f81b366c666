"""SSF (arXiv 2210.08823): y = γ ⊙ f(x) + β behind every norm and every linear of the layers, γ from 1 and β from 0.

γ and β have the width of f's output. Not behind the output projection, which is tied to the embeddings. With
``noise`` they start at N(1, noise²) and N(0, noise²), as in the paper (0.02), and the first step is not the parent's.
Merging gives W' = diag(γ) W and b' = γ ⊙ b + β; a norm's weight and bias in the same way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from petl_kernels.errors import InputError, shown
from petl_kernels.methods.base import Method, setting
from petl_kernels.methods.pieces import Piece, attach, piece_dtype
from petl_kernels.methods.values import wide_copy
from petl_kernels.models.structure import describe, norms


class ScaleShift(Piece):
    """γ and β (features,) behind one norm or one linear layer. shift: None where the method leaves β out."""

    what = "SSF"

    def __init__(self, host: Any, config: SSF):
        super().__init__()
        features = host.weight.shape[0]
        like = {"dtype": piece_dtype(host.weight), "device": host.weight.device}
        self.scale = nn.Parameter(torch.ones(features, **like))
        self.shift = nn.Parameter(torch.zeros(features, **like)) if config.shift else None
        if config.noise > 0:
            with torch.no_grad():
                for own in self.parameters():
                    own.add_(torch.randn_like(own), alpha=config.noise)

    def after(self, host: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return self.of(output)

    def of(self, y: Tensor) -> Tensor:
        """Returns γ ⊙ y + β in the dtype of y."""
        scaled = y * self.scale.to(y.dtype)
        return scaled if self.shift is None else scaled + self.shift.to(y.dtype)

    def state(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {"ssf_scale": self.scale}
        return found if self.shift is None else found | {"ssf_shift": self.shift}


@dataclass(frozen=True)
class SSF(Method):
    """Scaling and shifting of what norms and linear layers return."""

    shift: bool = setting(True, "β is trained beside γ; without it models that have no biases can be merged")
    noise: float = setting(0.0, "the standard deviation of γ and β at the start; the paper's is 0.02")

    method: ClassVar[str] = "ssf"
    trains: ClassVar[str] = "a factor and a shift behind every norm and every linear layer"
    learning_rate: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        if not isinstance(self.shift, bool):
            raise InputError(f"ssf shift {shown(self.shift)}: expected True or False")
        if isinstance(self.noise, bool) or not isinstance(self.noise, (int, float)) or not 0 <= self.noise < 1:
            raise InputError(f"ssf noise {shown(self.noise)}: expected a number from 0 to below 1")

    def places(self, model: nn.Module) -> list[str]:
        """Returns the paths of the norms and the linear layers that have γ and β."""
        return [*norms(model), *describe(model).linears]

    def inject(self, model: nn.Module, name: str) -> None:
        for path in self.places(model):
            host: Any = model.get_submodule(path)
            attach(host, name, ScaleShift(host, self))

    def count(self, model: nn.Module) -> int:
        hosts: list[Any] = [model.get_submodule(path) for path in self.places(model)]
        return (1 + self.shift) * sum(host.weight.shape[0] for host in hosts)

    def computes(self, model: nn.Module) -> dict[str, object]:
        return {"method": self.label}

    def merged_weights(self, model: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
        hosts: dict[str, Any] = {path: model.get_submodule(path) for path in self.places(model)}
        without = [path for path, host in hosts.items() if getattr(host, "bias", None) is None]
        if self.shift and without:
            kind = type(model).__name__
            raise InputError(
                f"adapter {name!r}: {kind} has no bias at {without[0]} that could hold SSF's shift; "
                "expected one trained with shift false"
            )
        return self._merged(hosts, name)

    def _merged(self, hosts: dict[str, Any], name: str) -> Iterator[tuple[str, Tensor]]:
        for path, host in hosts.items():
            piece = host.petl[name]
            scale = piece.scale.detach()
            weight = wide_copy(host.weight)
            if weight.dim() == 1 and _adds_one(host):
                yield f"{path}.weight", weight.add_(1).mul_(scale).sub_(1)
            else:
                yield f"{path}.weight", weight.mul_(scale if weight.dim() == 1 else scale[:, None])
            if getattr(host, "bias", None) is not None:
                bias = wide_copy(host.bias).mul_(scale)
                yield f"{path}.bias", bias if piece.shift is None else bias.add_(piece.shift.detach())


def _adds_one(norm: Any) -> bool:
    """Returns whether ``norm`` multiplies by 1 + its weight, as Gemma's do."""
    if getattr(norm, "bias", None) is not None:
        return False
    other = copy.deepcopy(norm)
    with torch.no_grad():
        other.weight.zero_()
        return bool(other.forward(torch.ones_like(other.weight)[None]).any())
