"""A family's class as a type checker sees it: a mixin of modules that have ``LeanLayer`` as well."""

from __future__ import annotations

from typing import TYPE_CHECKING

from petl_kernels.layers.mixed_in import Mixin

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, ClassVar, Protocol

    from torch import Tensor, nn

    from petl_kernels.layers.blocks import AttentionBlock, FeedForwardBlock
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
        known: ClassVar[frozenset[str]]
        functions: ClassVar[tuple[str, ...]]

        # What a family has.
        def blocks(self, crosses: bool) -> tuple[list[AttentionBlock], FeedForwardBlock]: ...
        def after_block(self, x: Tensor) -> Tensor: ...
        def finished(self, x: Tensor) -> Tensor: ...
        def layer_index(self) -> int: ...
        @staticmethod
        def parts(layer: Any) -> Iterator[tuple[str, nn.Module, frozenset[str]]]: ...
        @staticmethod
        def rates(layer: Any) -> list[float]: ...
        @staticmethod
        def uncovered(layer: Any) -> str: ...

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

else:

    class Family(Mixin):
        # Those whose masks the lean attention reads, also with a prefix.
        functions = ("eager", "sdpa", "petl_prefix_eager", "petl_prefix_sdpa")
