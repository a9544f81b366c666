"""The training that is planned for (``Request``), and the choices for it (``Levers``, ``Candidate``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from petl_kernels.ops.quantized import STORAGES as QUANTIZED

STORAGES = ("dense", *QUANTIZED)  # of frozen weights
CHUNKS = (32 * 2**20, 8 * 2**20, 2 * 2**20)  # bytes of the loss' logits that exist at a time, largest first
SHARES = 4  # layers are streamed by quarters of their number

Rounding = tuple[str, str, str]  # storage, tables and gradients, as ``Levers`` names them
EXACT: Rounding = ("dense", "dense", "float32")


@dataclass(frozen=True)
class Request:
    """The training that is planned for.

    batch_tokens: padded tokens of the longer side in one update. max_length: tokens of the longest sentence. allow: the
    approximations that may be used. autocast: the dtype of products under ``torch.autocast``. tier: of all layers, or
    None to choose one for each. beam: of the evaluation's search; 0 leaves the evaluation out. graphs: whether steps
    are captured as CUDA graphs. packed: whether micro-batches are packed rows, where the model reads such rows. host:
    bytes of host memory beside a CUDA device, or None for no limit. host_data: those of them that the caller's data
    take.
    """

    batch_tokens: int
    max_length: int
    optimizer: str = "adamw"
    allow: tuple[str, ...] = ()
    device: torch.device = torch.device("cpu")
    autocast: torch.dtype | None = None
    tier: int | None = None
    beam: int = 1
    graphs: bool = False
    packed: bool = False
    host: int | None = None
    host_data: int = 0

    @property
    def longest(self) -> int:
        """Tokens of a sentence of each pair."""
        return min(self.max_length, self.batch_tokens)

    @property
    def pairs(self) -> int:
        """Sentence pairs of a whole update."""
        return max(1, self.batch_tokens // self.longest)

    @property
    def tiers(self) -> Sequence[int]:
        """The tiers to choose from, the one with the least work first.

        Tier 5 moves activations to host memory: on a CPU they are there, and a CUDA graph cannot hold the copies.
        """
        if self.tier is not None:
            return (self.tier,)
        return range(1, 6 if self.device.type == "cuda" and not self.graphs else 5)


@dataclass(frozen=True)
class Levers:
    """The choices that hold for a whole plan, under the names of ``Plan``.

    streamed: how many layers, counted from the front. tables: as ``storage`` when not given.
    """

    storage: str
    optimizer: str
    streamed: int
    chunk_bytes: int
    tables: str = None  # pyright: ignore[reportAssignmentType]  # ``__post_init__`` puts a storage there
    gradients: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tables", self.tables or self.storage)

    @property
    def rounding(self) -> Rounding:
        """The levers on which the bytes of a step depend beside its batch, its chunk and its tiers."""
        return self.storage, self.tables, self.gradients


@dataclass(frozen=True)
class Candidate:
    """A way to compute an update of ``request.pairs`` sentence pairs. tiers: one a layer, encoder first."""

    levers: Levers
    micro_batches: int
    tiers: tuple[int, ...]


def streamed_layers(layers: int) -> list[int]:
    """Returns the numbers of streamed layers that are tried, from none to all."""
    return list(dict.fromkeys(layers * share // SHARES for share in range(SHARES + 1)))


def chunks_within(memory: int) -> Sequence[int]:
    """Returns the loss chunks that take at most a sixteenth of a budget, largest first; the smallest at least."""
    return [chunk for chunk in CHUNKS if chunk <= memory // 16] or CHUNKS[-1:]


def divisions(pairs: int) -> list[int]:
    """Returns the numbers of micro-batches that are worth trying for ``pairs``: one for each size of a micro-batch."""
    sizes = sorted({-(-pairs // n) for n in range(1, pairs + 1)}, reverse=True)
    return [-(-pairs // size) for size in sizes]
