"""(IA)³ (arXiv 2205.05638): k = l_k ⊙ W_k x, v = l_v ⊙ W_v x and ffn = W_2 (l ⊙ act(W_1 x)), every l from 1.

l multiplies the outputs of the targets (the bias too, as in PEFT) and the inputs of those that are feed-forward.
Merging scales the rows or the columns of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from petl_kernels.methods.base import Method, setting
from petl_kernels.methods.pieces import Piece, attach, piece_dtype
from petl_kernels.methods.targets import find_targets
from petl_kernels.methods.values import wide_copy
from petl_kernels.models.structure import describe


class Scale(Piece):
    """The vector l of one linear layer: (out, 1), or (1, in) when it multiplies the input."""

    what = "(IA)³"
    decays = False  # l is a vector in the shape of PEFT's files, and means nothing at 0

    def __init__(self, linear: nn.Linear, feedforward: bool):
        super().__init__()
        shape = (1, linear.in_features) if feedforward else (linear.out_features, 1)
        self.feedforward = feedforward
        self.scale = nn.Parameter(torch.ones(shape, dtype=piece_dtype(linear.weight), device=linear.weight.device))

    def before(self, host: nn.Module, args: tuple) -> tuple | None:
        return (self._times(args[0]), *args[1:]) if self.feedforward else None

    def after(self, host: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output if self.feedforward else self._times(output)

    def _times(self, x: Tensor) -> Tensor:
        return x * self.scale.flatten().to(x.dtype)

    def state(self) -> dict[str, Tensor]:
        return {"ia3_l": self.scale}


@dataclass(frozen=True)
class IA3(Method):
    """Scaling of what linear layers return or read.

    targets: names of linear layers, or a regular expression for whole paths; None is k and v of every attention and
    the feed-forward blocks' last linear. feedforward: those of the targets whose input is scaled; None is the
    feed-forward blocks' last linear.
    """

    targets: tuple[str, ...] | str | None = setting(
        None, "names of modules, or a regular expression for paths; null: those above"
    )
    feedforward: tuple[str, ...] | str | None = setting(
        None, "targets whose input is scaled; null: the last linear of a block"
    )

    method: ClassVar[str] = "ia3"
    trains: ClassVar[str] = "a factor on keys, values and the feed-forward blocks' hidden units"
    learning_rate: ClassVar[float] = 3e-3
    peft_type: ClassVar[str] = "IA3"

    def places(self, model: nn.Module) -> dict[str, bool]:
        """Returns path -> whether its input is scaled (else its output), for every target."""
        if self.targets is None:
            structure = describe(model)
            outputs = {path: False for attention in structure.attentions for path in (attention.k, attention.v)}
            return {**outputs, **{layer.ffn.out: True for layer in structure.layers if layer.ffn.inputs}}
        inputs = set()
        if self.feedforward is None:
            inputs = {layer.ffn.out for layer in describe(model).layers}
        elif self.feedforward:
            inputs = set(find_targets(model, self.feedforward, (nn.Linear,), "ia3"))
        return {path: path in inputs for path in find_targets(model, self.targets, (nn.Linear,), "ia3")}

    def inject(self, model: nn.Module, name: str) -> None:
        for path, feedforward in self.places(model).items():
            linear: Any = model.get_submodule(path)
            attach(linear, name, Scale(linear, feedforward))

    def count(self, model: nn.Module) -> int:
        total = 0
        for path, feedforward in self.places(model).items():
            linear: Any = model.get_submodule(path)
            total += linear.in_features if feedforward else linear.out_features
        return total

    def computes(self, model: nn.Module) -> dict[str, object]:
        return {f"input scaled of {path!r}": value for path, value in self.places(model).items()}

    def merged_weights(self, model: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
        for path, feedforward in self.places(model).items():
            linear: Any = model.get_submodule(path)
            scale = linear.petl[name].scale.detach()
            yield f"{path}.weight", wide_copy(linear.weight).mul_(scale)
            if linear.bias is not None and not feedforward:
                yield f"{path}.bias", wide_copy(linear.bias).mul_(scale.flatten())
