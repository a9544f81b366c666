"""The types of a count: an op's work and its launches; products and passes of the library's."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace

FP32 = 4
PROCESSORS = 132  # multiprocessors of the cards of sm_90 that predictions are for
# Instructions that a thread spends on an element of a dropout mask, counted for sm_90 (bench/NOTES.md).
MASK = 12


@dataclass(frozen=True)
class Launch:
    """Describes a launch by its operations, bytes of device memory, and instructions of all threads."""

    name: str
    flops: int = 0
    bytes: int = 0
    instructions: float = 0.0
    cached: int = 0  # bytes of logits among them, which only travel where a chunk of them does not fit the L2 cache
    working_set: int = 0  # bytes of that chunk
    library: bool = False


@dataclass(frozen=True)
class Counts:
    """Holds flops and bytes that cannot be avoided, and the launches of ours; None where ours has no GPU kernel."""

    flops: int
    bytes: int
    kernels: tuple[Launch, ...] | None = None

    @property
    def launches(self) -> int | None:
        """Number of launches of our own kernels, forward and backward."""
        return None if self.kernels is None else sum(not kernel.library for kernel in self.kernels)

    def launched(self) -> tuple[Launch, ...]:
        """Returns the launches of what has them."""
        assert self.kernels is not None, "ours has no GPU kernel"
        return self.kernels

    def __add__(self, other: Counts) -> Counts:
        both = None if self.kernels is None or other.kernels is None else self.kernels + other.kernels
        return Counts(self.flops + other.flops, self.bytes + other.bytes, both)


def total(counted: Iterable[Counts]) -> Counts:
    return functools.reduce(operator.add, counted)


def product(name: str, rows: int, cols: int, inner: int, size: int, **other) -> Launch:
    """A dense product: both operands and the result once."""
    return Launch(name, 2 * rows * cols * inner, size * (rows * inner + cols * inner + rows * cols), **other)


def library_product(rows: int, cols: int, inner: int, size: int) -> Launch:
    return product("library product", rows, cols, inner, size, library=True)


def streams(count: int, elements: int, size: int) -> Counts:
    """Counts one pass of the library's that reads and writes ``count`` arrays of as many elements: a copy has two."""
    moved = count * elements * size
    return Counts(0, moved, (Launch("library pass", bytes=moved, library=True),))


def added_product(rows: int, cols: int, inner: int, size: int) -> Launch:
    """A product of the library's that is added to what is there."""
    product = library_product(rows, cols, inner, size)
    return replace(product, bytes=product.bytes + rows * cols * size)
