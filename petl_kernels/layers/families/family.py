"""A family's class as a type checker sees it: a mixin of modules that have ``LeanLayer`` as well."""

from __future__ import annotations

from typing import TYPE_CHECKING

from petl_kernels.layers.mixed_in import Mixin

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, ClassVar, Protocol

    from torch import Tensor, nn

    from petl_kernels.layers.blocks import AttentionBlock, ExpertsBlock, FeedForwardBlock
    from petl_kernels.layers.border import Border
    from petl_kernels.layers.rotary import Rotary
    from petl_kernels.layers.wide_ffn import WideFFN

    class State(Protocol):
        """Describes what a family reads of the state of a lean layer (``lean_layer.Lean``)."""

        @property
        def pre_norm(self) -> bool: ...
        @property
        def borders(self) -> dict[str, Border] | None: ...
        @property
        def wide(self) -> WideFFN | None: ...


class Family(Mixin):
    """The base of a family's class."""

    @classmethod
    def called(cls, layer: Any) -> tuple[nn.Module, ...]:
        """Returns the modules of ``layer`` that the lean forward calls, as the layer's own does."""
        return ()

    # Attention functions of transformers whose masks the lean attention reads, also with a prefix.
    functions: ClassVar[tuple[str, ...]] = ("eager", "sdpa", "petl_prefix_eager", "petl_prefix_sdpa")

    if TYPE_CHECKING:
        known: ClassVar[frozenset[str]]

        # What a family has.
        def blocks(self, crosses: bool) -> tuple[list[AttentionBlock], FeedForwardBlock | ExpertsBlock]: ...
        def after_block(self, x: Tensor) -> Tensor: ...
        def finished(self, x: Tensor) -> Tensor: ...
        def layer_index(self) -> int: ...
        @classmethod
        def parts(cls, layer: Any) -> Iterator[tuple[str, nn.Module, frozenset[str]]]: ...
        @classmethod
        def rates(cls, layer: Any) -> list[float]: ...
        @classmethod
        def uncovered(cls, layer: Any) -> str: ...

        # What it has of ``LeanLayer``.
        @property
        def petl_lean(self) -> State: ...
        def steps_aside(self, kwargs: dict[str, Any]) -> bool: ...
        def refuse_packed(self, mask: Tensor | None, kwargs: dict[str, Any]) -> None: ...
        def run(
            self,
            kwargs: dict[str, Any],
            x: Tensor,
            mask: Tensor | None,
            bias: Tensor | Rotary | None,
            source: Tensor | None,
            source_mask: Tensor | None,
        ) -> Tensor: ...


def rate(dropout: nn.Dropout) -> float:
    """Returns the rate of a dropout that is in effect."""
    return dropout.p if dropout.training else 0.0
