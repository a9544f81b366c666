"""Checks of values and gradients before anything is timed.

On fresh random inputs, against the formula in float64: an error may be at most twice the one that the formula itself
makes in the inputs' dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.run.work import Case, Inputs, Prepare, Work, differentiated, outputs_of

CHECKED_ROWS = 64  # rows of a CPU's inputs, whose products in float64 would take longer than all that is timed


def check(prepare: Prepare, formula: Callable, inputs: Inputs) -> None:
    """Raises AssertionError where ``prepare`` is further from float64 than twice ``formula`` in the inputs' dtype."""
    found = outcome(prepare(*copied(inputs)))
    reference = outcome(differentiated(formula)(*copied(inputs)))
    exact = outcome(differentiated(formula)(*copied(inputs, torch.float64)))
    reference, exact = reference[: len(found)], exact[: len(found)]  # forward alone has no gradients
    for index, (ours, theirs, true) in enumerate(zip(found, reference, exact, strict=True)):
        assert close(ours, theirs, true), f"output or gradient {index} differs: {error(ours, true):.2e} relative"


def outcome(work: Work) -> list[Tensor]:
    """Returns outputs, then gradients for ones that are random but the same each time."""
    outputs = outputs_of(work.forward())
    if not work.leaves:
        return outputs
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    gradients = [torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype) for y in outputs]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, work.leaves, gradients))


def copied(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """Returns the same values in tensors of their own, floating-point ones in ``dtype``."""
    return tuple(tensor if tensor is None else _copied(tensor, dtype) for tensor in inputs)


def _copied(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    fresh = tensor.detach().clone()
    if dtype is not None and fresh.is_floating_point():
        fresh = fresh.to(dtype)
    return fresh.requires_grad_(tensor.requires_grad)


def close(ours: Tensor, reference: Tensor, exact: Tensor) -> bool:
    """Returns whether our error against float64 is at most twice the reference's own (and a floor)."""
    return error(ours, exact) <= 2 * error(reference, exact) + 1e-6


def error(found: Tensor, exact: Tensor) -> float:
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm().clamp_min(1e-30))


def checked_tokens(case: Case, implementation: str) -> int:
    whole = case.device == "cuda" or implementation == "torch.compile"  # which would compile anew for fewer
    return case.tokens if whole else min(case.tokens, CHECKED_ROWS)
