"""A recorder of CUDA graphs that needs no card, for the bookkeeping around them."""

from __future__ import annotations

import torch


class Recorder:
    """Captures as CUDA does: nothing is computed, inputs and results stay in their places, and replaying computes.

    The first ``failures`` captures raise ``error``.
    """

    def __init__(self, failures: int = 0, error: type[Exception] = RuntimeError):
        self.failures, self.error = failures, error
        self.device, self.reason, self.users = torch.device("cpu"), "", []
        self.captures = self.replays = self.releases = 0

    def capture(self, run):
        if self.failures:
            self.failures -= 1
            raise self.error("operation not permitted when stream is capturing\nmore")
        self.captures += 1
        result = torch.zeros(())

        def replay():
            self.replays += 1
            result.copy_(run())

        return replay, result

    def release(self):
        self.releases += 1
        for user in self.users:
            user.forget()

    def give_up(self, reason):
        self.reason = reason
        self.release()
