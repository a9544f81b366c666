"""Gradients of trained parameters that wait for the update in 16 bits, where autograd leaves them in fp32.

    after a backward    s ← bf16(s + g)        sum in fp32, rounded to nearest; g is freed
    clip, step          the optimiser gets c · s in fp32, c = min(1, largest / (‖s‖ + 1e-6)), a group at a time;
                        c · s / f with n = ‖s‖ / f in the place of ‖s‖ where losses are scaled by f, as in fp16

With one micro-batch s is bf16(g). After n of them |s - Σ g_i| ≤ ((1 + 2⁻⁸)ⁿ - 1) Σ |g_i|, the bound of a sum that is
rounded n times (Higham, Accuracy and Stability of Numerical Algorithms, 4.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

GROUP_BYTES = 16 * 2**20  # of fp32 gradients that the optimiser gets at a time; a larger parameter stands alone
PIECE = 2**18  # values that are widened at a time beside a gradient


class RoundedGradients:
    """Holds the gradient of each of ``parameters`` (fp32, trained) in bf16: 2 bytes a value instead of 4.

    Its hooks, which ``close`` removes, take each ``p.grad`` that a backward makes. ``clip`` and ``step`` take the place
    of a loop's clipping of gradients and of the optimiser's step, and ``zero`` that of ``zero_grad``. Only parameters
    that have had a gradient are counted and moved, as in a plain loop.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = list(parameters)
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._factor: Tensor | float = 1.0  # of clipping
        self._hooks = [p.register_post_accumulate_grad_hook(self._add) for p in self.parameters]

    def sum_of(self, parameter: nn.Parameter) -> Tensor:
        """Returns the gradient of ``parameter`` so far, bf16 in its shape; zeros before the first backward."""
        if parameter not in self._sums:
            self._sums[parameter] = torch.zeros_like(parameter, dtype=torch.bfloat16, requires_grad=False)
        return self._sums[parameter]

    @torch.no_grad()
    def clip(self, largest: float, scale: Tensor | float = 1.0) -> Tensor:
        """Makes ``step`` scale the gradients to a 2-norm of at most ``largest``; returns the norm, a scalar in fp32.

        scale: the factor of the losses that the gradients are of, which norm and ``step`` take out. Norm and factor are
        those of ``nn.utils.clip_grad_norm_`` for the bf16 values.
        """
        norms = [_norm([_norm([piece.float()]) for piece in _pieces(self._sums[p])]) for p in self._moved()]
        norm = _norm(norms) if norms else torch.zeros((), device=self.parameters[0].device)
        norm = norm / scale
        self._factor = torch.clamp(largest / (norm + 1e-6), max=1.0) / scale
        return norm

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Runs ``optimizer.step()`` on the clipped gradients, for one group of parameters after the other."""
        for group in groups(self._moved()):
            for parameter in group:
                parameter.grad = self._sums[parameter].float().mul_(self._factor)
            optimizer.step()  # it leaves parameters without a gradient as they are
            for parameter in group:
                parameter.grad = None

    def _moved(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters if parameter in self._sums]

    def zero(self) -> None:
        """Sets all gradients to zero, and drops those of a backward that was broken off; no memory is freed."""
        self._factor = 1.0
        for parameter in self.parameters:
            parameter.grad = None
        for total in self._sums.values():
            total.zero_()

    def close(self) -> None:
        """Removes the hooks and frees the gradients."""
        for hook in self._hooks:
            hook.remove()
        self._sums.clear()

    @torch.no_grad()
    def _add(self, parameter: nn.Parameter) -> None:
        made: Any = parameter.grad  # there is one when the hook runs
        for new, total in zip(_pieces(made), _pieces(self.sum_of(parameter)), strict=True):
            total.copy_(new.add_(total.float()))
        parameter.grad = None


def groups(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yields ``parameters`` in order, in groups whose fp32 gradients take at most ``GROUP_BYTES``, or of one alone."""
    group: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if group and size + 4 * parameter.numel() > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(parameter)
        size += 4 * parameter.numel()
    if group:
        yield group


def _pieces(values: Tensor) -> tuple[Tensor, ...]:
    return values.view(-1).split(PIECE)


def _norm(values: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(values[0] if len(values) == 1 else torch.stack(values))
