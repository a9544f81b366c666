"""The bytes that a forward pass keeps for the backward pass, measured once a run."""

from __future__ import annotations

import torch

import petl_kernels as pk
from petl_kernels.accounting.saved import saved_bytes

from ..data import Batch, PackedBatch
from .setup import Setup


def measure_saved_bytes(run: Setup) -> None:
    """Puts the bytes a token into the run's progress: as it trains, and with the model's own layers and loss."""
    plan = run.update.plan  # perhaps tightened since the run began
    rows = min(4, plan.rows) if plan else 4
    indices = run.batches.epoch_indices(run.progress.epoch)[run.progress.batch][:rows]
    tiers = list(plan.tiers) if plan else 1 if run.config.tier is None else run.config.tier
    plain = _bytes_per_token(run, 0, run.batches.of(indices, padded=True).to(run.device))
    lean = _bytes_per_token(run, tiers, run.batches.of(indices).to(run.device))
    run.progress.plain_saved_bytes_per_token, run.progress.saved_bytes_per_token = plain, lean
    if tiers and lean is not None:
        theirs = "do not fit" if plain is None else f"would keep {plain:,.0f}"
        run.log.say(
            f"{lean:,.0f} bytes a token are kept for the backward pass; the model's own layers and loss {theirs}"
        )


def _bytes_per_token(run: Setup, tiers: int | list[int], batch: Batch | PackedBatch) -> float | None:
    """Returns None where a budget of memory has no room for it. Leaves the model's layers at ``tiers``."""
    pk.lean(run.model, tiers)
    given = batch.row.values() if isinstance(batch, PackedBatch) else (batch.source, batch.labels)
    living = [*run.model.parameters(), *run.model.buffers(), *(x for x in given if isinstance(x, torch.Tensor))]
    try:
        with torch.random.fork_rng(), saved_bytes(exclude=living) as saved:
            run.update.loss(batch, 1)
    except torch.OutOfMemoryError:
        return None
    return saved.bytes / (batch.source.numel() + batch.labels.numel())
