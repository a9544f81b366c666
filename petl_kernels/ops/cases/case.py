"""The form of a case: inputs of an op, how its kernels run on them, and the sums behind its values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from petl_kernels.dispatch import Kernel
from petl_kernels.ops.quantized.tensor import parts_of

Values = dict[str, Tensor]
# The arguments of one case by name: tensors, lists of them, and options.
Given = dict[str, Any]
# Returns the kernel of a name, of the backend that is compared.
Kernels = Callable[[str], Kernel]


def over_axes(value: str, given: Given) -> int:
    """Returns the most additions behind one element of ``value``, nested sums together.

    Sums run over features and, in gradients of parameters, over tokens: the last axis of a tensor and the others, taken
    as one. A value of one token has no sums over tokens.
    """
    axes: set[int] = set()
    found = [tensor for tensor in tensors(given) if tensor.dim()]
    for tensor in found:
        *leading, last = tensor.shape
        axes.add(last)
        if leading:
            axes.add(math.prod(leading))
    if not value.startswith("d") or value in OF_TOKENS:
        axes.discard(math.prod(found[0].shape[:-1]))  # the activation comes first
    return sum(axes)


OF_TOKENS = ("dx", "dy", "dresidual", "dhidden")  # gradients of activations


def no_additions(value: str, given: Given) -> int:
    """Returns 0, for an op whose values are no sums."""
    return 0


@dataclass(frozen=True)
class OpCases:
    """How the kernels of one op are held to its reference.

    ``inputs``: functions of (device, dtype), each of which returns the arguments of one case by name, small and of odd
    sizes, the activation first. ``run(kernel, given)`` returns all outputs and gradients by name, where
    ``kernel(name)`` is the kernel ``name`` of the backend that is compared. ``additions(value, given)`` returns the
    most additions behind one element of the value of that name, 0 where there are none.
    """

    inputs: tuple[Callable[[torch.device, torch.dtype], Given], ...]
    run: Callable[[Kernels, Given], Values]
    additions: Callable[[str, Given], int] = over_axes


class Source:
    """Draws normal values that are the same in each run, and leaves PyTorch's own generators alone."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = normal(self.generator, *shape) * std
        return values.to(self.device, dtype or self.dtype)

    def seed(self) -> Tensor:
        """Returns a seed of a dropout mask, int64 (1,)."""
        return torch.randint(0, 2**63 - 1, (1,), generator=self.generator).to(self.device)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Returns normal values in fp32, whatever the process's default dtype is."""
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def tensors(value: Any) -> Iterator[Tensor]:
    """Yields every tensor in nested dictionaries and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list)):
        nested: dict[str, Any] | list[Any] = value  # pyright: ignore[reportUnknownVariableType]
        for member in nested.values() if isinstance(nested, dict) else nested:
            yield from tensors(member)


def in_float64(value: Any) -> Any:
    """Returns ``value`` with every floating-point tensor in it, in nested dictionaries and lists, in fp64."""
    if isinstance(value, dict):
        named: dict[str, Any] = value  # pyright: ignore[reportUnknownVariableType]
        return {name: in_float64(member) for name, member in named.items()}
    if isinstance(value, list):
        listed: list[Any] = value  # pyright: ignore[reportUnknownVariableType]
        return [in_float64(member) for member in listed]
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value


def held(weight: Tensor | None) -> list[Tensor]:
    """Returns the tensors that hold ``weight``, none for None."""
    return [] if weight is None else parts_of(weight)


def sum_dtype(dbias: Tensor) -> Tensor:
    """Returns a kernel's gradient of a bias in the dtype of sums, which is that of the op's own result."""
    return dbias if dbias.dtype == torch.float64 else dbias.float()
