from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from petl_kernels.planning.peak import Ledger


def peak_bytes(work: Callable[[], object], living: Iterable[Tensor]) -> int:
    """Returns the peak bytes of tensors while ``work`` runs: ``living``, and outputs of operations by storage."""
    ledger = Ledger(living)
    with ledger:
        work()
    return ledger.peak
