"""The form of a run's batches: packed or padded, and captured as CUDA graphs or not."""

from __future__ import annotations

import torch
from torch import nn

from petl_kernels.errors import InputError
from petl_kernels.layers.loss.lean_loss import packing_obstacle
from petl_kernels.planning.plan import Plan

from ..config import UNCAPTURED, TrainConfig
from ..runs import RunFolder
from ..runs.log import RunLog
from .budget import wants_graphs
from .progress import Progress
from .text import TokenisedText


def choose_packing(
    model: nn.Module, config: TrainConfig, run: RunFolder, progress: Progress, text: TokenisedText, log: RunLog
) -> int | None:
    """Decides once a run whether its batches are packed rows, which is so where the model reads them.

    A run that is resumed goes on as it began, since its dropout depends on it. Returns the id that decoder inputs of
    packed rows begin with, None for padded batches. Raises InputError where the run began packed and the model reads no
    packed rows now, and where CUDA graphs are wanted for padded batches.
    """
    reason, began = packing_obstacle(model), progress.packed
    if began and reason:
        raise InputError(f"out {run.path}: the run began with packed rows, which cannot go on ({reason})")
    if began is None:
        progress.packed = not reason
    if not progress.packed and config.cuda_graphs:
        reason = reason or "the run began with padded ones"
        raise InputError(f"cuda_graphs: they take packed rows, and {reason}; expected a run without --cuda-graphs")
    if progress.packed:
        log.say("batches are packed rows, without padding")
        return text.start
    log.say(f"batches are padded: {reason or 'the run began so'}")
    return None


def longest_captured(
    config: TrainConfig, plan: Plan | None, progress: Progress, device: torch.device, text: TokenisedText, log: RunLog
) -> int | None:
    """Returns the tokens of the longest sentence where steps are captured as CUDA graphs, else None.

    The sentences are those of training and validation text and of the plan's largest batch. Logs what is done, and why
    steps on a CUDA device are not captured.
    """
    reason = ""
    if config.cuda_graphs is False:
        reason = "cuda_graphs is false"
    elif config.tier in UNCAPTURED:
        reason = UNCAPTURED[config.tier]
    elif not progress.packed:
        reason = "they take packed rows"
    elif plan is not None and not plan.cuda_graphs:
        reason = "the plan is one without: they have no room, or it is faster by what they cannot hold"
    if wants_graphs(config, device) and not reason:
        log.say("steps are captured as CUDA graphs, one for each shape of rows")
        lengths = [int(corpus.lengths.max()) for corpus in (text.train, text.valid) if corpus is not None]
        return max(lengths + [plan.longest] if plan else lengths)
    if device.type == "cuda" or config.cuda_graphs:
        log.say(f"steps run without CUDA graphs: {reason}")
    return None
