"""The loss scale of fp16: a factor that keeps small gradients from vanishing, and is lowered where they overflow.

A loss is multiplied by a power of two before its backward pass, and the gradients are divided by it before clipping.
Where one of them is infinite or no number, the update is skipped and the scale halved; after 2000 updates in a row that
were made, it is doubled. All of it is PyTorch's ``GradScaler``, whose tensors stay on the device: the host waits for
none of them, and a CUDA graph can hold an update.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LEAST = 2.0**-13  # below it nothing has overflowed by chance: the loss or the weights are no numbers


class LossScale:
    """The loss scale of ``accelerator``; without fp16 it is 1 for ever, and no update is skipped.

    skipped: 1.0 where the last update was skipped, else 0.0, a scalar in fp32 on the device.
    """

    def __init__(self, accelerator) -> None:
        self.scaler = accelerator.scaler
        self._one = torch.ones((), device=accelerator.device)
        self.skipped = torch.zeros_like(self._one)
        self.now()  # makes the scaler's tensors, which no graph may own

    @property
    def is_on(self) -> bool:
        """Returns whether losses are scaled."""
        return self.scaler is not None

    def now(self) -> Tensor:
        """Returns the scale, a scalar in fp32 on the device."""
        return self._one if self.scaler is None else self.scaler.scale(self._one)

    def unscale(self, optimizer) -> None:
        """Divides the gradients of ``optimizer``, one that accelerate has prepared, by the scale."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer.optimizer)

    def note(self, before: Tensor) -> None:
        """Sets ``skipped`` by the scale that the last update has left and the one ``before`` it."""
        if self.is_on:
            self.skipped.copy_(self.now() < before)

    def judge(self, norm: Tensor) -> bool:
        """Returns whether an update is made, by the ``norm`` of its gradients, still scaled; the scale follows.

        For gradients that are elsewhere than in ``grad``, where the scaler cannot look. The host waits for the norm.
        """
        assert self.scaler is not None
        stand_in = torch.nn.Parameter(torch.zeros_like(norm))
        stand_in.grad = norm.clone()
        optimizer = torch.optim.SGD([stand_in], lr=0.0)
        self.scaler.step(optimizer)
        self.scaler.update()
        return bool(norm.isfinite())

    def state(self) -> dict[str, Any] | None:
        """Returns what a checkpoint keeps: the scale, and how many updates have left it; None without one."""
        if self.scaler is None:
            return None
        values = self.scaler.state_dict()
        return {"scale": values["scale"], "updates": values["_growth_tracker"]}

    def load(self, state: dict[str, Any] | None) -> None:
        """Takes the ``state`` of a checkpoint."""
        if self.scaler is not None and state is not None:
            given = {"scale": state["scale"], "_growth_tracker": state["updates"]}
            self.scaler.load_state_dict({**self.scaler.state_dict(), **given})
