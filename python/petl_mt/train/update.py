"""One update of the trained parameters: gradients of its batches, micro-batch by micro-batch, clipping, the step.

A plan has the size of micro-batches. Where its memory does not suffice, the same gradients are computed once more under
the next tighter plan: the tokens, their order and the mathematics of an update stay the same.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import petl_kernels as pk
from petl_kernels.device import resolve
from petl_kernels.layers.loss.lean_loss import set_chunk_bytes
from petl_kernels.planning.plan import Plan
from petl_kernels.step.gradients import RoundedGradients
from petl_kernels.step.graphs import CudaGraphs
from petl_kernels.units import format_size

from ..config import TrainConfig
from ..data import Batch, PackedBatch
from ..loss import sequence_loss
from ..memory_meter import MemoryMeter
from .loss_scale import LossScale
from .step_graphs import StepGraphs


class Update:
    """The updates of one run.

    plan: None without a budget of memory. start, pad: the ids that decoder inputs begin with and that padding has. say:
    prints a line. longest: tokens of the longest sentence, where steps on packed rows are captured as CUDA graphs;
    gradients are then allocated from the beginning, so that AdamW's moments and decay also move a parameter that no
    loss has read.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer,
        accelerator,
        config: TrainConfig,
        plan: Plan | None,
        start: int,
        pad: int,
        say: Callable[[str], None],
        longest: int | None = None,
    ) -> None:
        self.model, self.optimizer, self.accelerator, self.config = model, optimizer, accelerator, config
        self.plan, self.start, self.pad, self.say = plan, start, pad, say
        self.device = resolve(accelerator.device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.rounded: RoundedGradients | None = getattr(
            model, "petl_gradients", None
        )  # where the plan keeps gradients in bf16
        self.loss_scale = LossScale(accelerator)
        self.micro_tokens = plan.micro_tokens if plan else None
        self.positions = 0  # source and target positions of the last update, those without a token too
        self.graphs: StepGraphs | None = None
        if longest is not None:
            step = self._move if _made_capturable(optimizer) else None
            given = CudaGraphs(self.device), self._add_gradients, step, self._validation_loss, longest
            self.graphs = StepGraphs(*given, lambda line: self.say(line))
            for parameter in self.parameters:  # where graphs will add to
                parameter.grad = torch.zeros_like(parameter)

    def gradients(self, batches: Sequence[Batch | PackedBatch], tokens: int) -> Tensor:
        """Adds up the gradients of the mean loss of ``batches`` over all their target ``tokens``; returns that loss."""
        return self._until_it_fits(lambda: self._gradients(batches, tokens))

    def step(self, lr: float) -> Tensor:
        """Clips the gradients, moves the parameters, clears the gradients; returns the norm before clipping.

        In fp16 the norm is of the gradients without their scale, and parameters stay where one has overflowed.
        """
        if self.graphs is None or not self.graphs.captures_step:
            return self._move(lr)
        norm = self.graphs.step(lr)
        self._set_rate(lr)  # a number again, which checkpoints and logs read
        return norm

    def _move(self, lr: float | Tensor) -> Tensor:
        largest, scale = self.config.clip if self.config.clip > 0 else math.inf, self.loss_scale.now()
        self._set_rate(lr)
        norm = self._step(largest) if self.rounded is None else self._rounded_step(self.rounded, largest, scale)
        self.loss_scale.note(scale)
        self.zero_gradients()
        return norm

    def _step(self, largest: float) -> Tensor:
        self.loss_scale.unscale(self.optimizer)  # whose step then skips an update that has overflowed
        norm = self.clip(largest)
        self.optimizer.step()
        return norm

    def _rounded_step(self, rounded: RoundedGradients, largest: float, scale: Tensor) -> Tensor:
        norm = self.clip(largest, scale)
        if not self.loss_scale.is_on:
            rounded.step(self.optimizer)
        elif self.loss_scale.judge(norm * scale):
            rounded.step(self.optimizer.optimizer)  # accelerate's would judge each group of parameters alone
        return norm

    def _set_rate(self, lr: float | Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def clip(self, largest: float, scale: Tensor | float = 1.0) -> Tensor:
        """Scales the gradients to a norm of at most ``largest``; returns the norm before.

        scale: that of gradients in 16 bits, which is taken out of both.
        """
        if self.rounded is not None:
            return self.rounded.clip(largest, scale)
        return nn.utils.clip_grad_norm_(self.parameters, largest)

    def zero_gradients(self) -> None:
        """Clears the gradients, which stay allocated under a budget, as in its plan, and for graphs."""
        if self.rounded is not None:
            self.rounded.zero()
            return
        self.optimizer.zero_grad(set_to_none=self.plan is None and self.graphs is None)

    def loss(self, batch: Batch | PackedBatch, tokens: int | Tensor) -> Tensor:
        """Returns the share of ``batch`` in the mean loss over ``tokens``."""
        return self._sum_of_losses(batch) / tokens

    def try_worst_batch(self, token: int, meter: MemoryMeter, packed: bool = False) -> None:
        """Computes the gradients of the largest micro-batch, so that a wrong plan shows before the first update.

        token: the id that it is made of. meter: is restarted. packed: as a packed row. Prints the planned memory and
        the memory that was taken.
        """
        assert self.plan is not None
        rows, longest = self.plan.rows, self.plan.longest
        self.model.train()
        meter.restart()
        ids = torch.full((rows, longest), token)
        batch = Batch.of(ids, ids.clone(), np.arange(rows), self.pad)
        if packed:
            batch = PackedBatch.of([(row, row) for row in ids.numpy()], batch.indices, self.start)
        with torch.random.fork_rng():
            self._until_it_fits(lambda: self._gradients([batch], rows * longest))
        self.zero_gradients()
        self.say(
            f"memory {self.config.memory}: planned {format_size(self.plan.peak)}, "
            f"the largest micro-batch took {format_size(meter.since_restart() or 0)}"
        )

    def release(self) -> None:
        """Frees the memory of graphs for an evaluation inside the budget."""
        if self.graphs is not None and self.plan is not None:
            self.graphs.release()

    def drop_graphs(self) -> None:
        """Frees the memory of graphs for good."""
        if self.graphs is not None:
            self.graphs.release()
            self.graphs = None

    def tighten(self, plan: Plan) -> None:
        """Goes on under ``plan``, which takes less memory; prints what changes."""
        assert self.plan is not None
        if plan.tiers != self.plan.tiers or plan.chunk_bytes != self.plan.chunk_bytes:
            pk.lean(self.model, list(plan.tiers))
            set_chunk_bytes(self.model, plan.chunk_bytes)
        self.plan, self.micro_tokens = plan, plan.micro_tokens
        self.release()
        if self.graphs is not None and not plan.cuda_graphs:
            self.graphs = None
            self.say("cuda_graphs: steps run as they are from here on, which takes less memory")
        self.say(
            f"memory {self.config.memory} was not enough for a step; it goes on in {plan.micro_batches} micro-batches "
            f"of {plan.micro_tokens:,} tokens, tiers {min(plan.tiers)} to {max(plan.tiers)}: the same update"
        )

    def _gradients(self, batches: Sequence[Batch | PackedBatch], tokens: int) -> Tensor:
        loss, self.positions = torch.zeros((), device=self.device), 0
        for batch in batches:
            for part in self._micro_batches(batch):
                self.positions += part.source.numel() + part.labels.numel()
                loss += self._backward(part, tokens)
        return loss

    def _micro_batches(self, batch: Batch | PackedBatch) -> Iterator[Batch | PackedBatch]:
        """Yields parts of at most the plan's tokens a side, padding included; for graphs filled up to few shapes."""
        tokens = self.micro_tokens or self.config.batch_tokens
        if isinstance(batch, PackedBatch):
            yield from (part if self.graphs is None else part.filled(tokens) for part in batch.parts(tokens))
            return
        rows = max(1, tokens // max(batch.source.shape[1], batch.labels.shape[1]))
        for i in range(0, len(batch.source), rows):
            yield batch.part(slice(i, i + rows), self.pad)

    def _backward(self, batch: Batch | PackedBatch, tokens: int) -> Tensor:
        """Adds the gradient of the share of ``batch`` in the mean loss over ``tokens``; returns that share."""
        if self.graphs is not None:
            return self.graphs.gradients(batch, tokens)  # pyright: ignore[reportArgumentType]  packed, where graphs are
        return self._add_gradients(batch.to(self.device), tokens)

    def _add_gradients(self, batch: Batch | PackedBatch, tokens: int | Tensor) -> Tensor:
        loss = self.loss(batch, tokens)
        self.accelerator.backward(loss)
        return loss.detach()

    @torch.no_grad()
    def _validation_loss(self, batch: PackedBatch) -> Tensor:
        with self.accelerator.autocast():
            return sequence_loss(self.model, batch, self.start, self.pad)

    def _sum_of_losses(self, batch: Batch | PackedBatch) -> Tensor:
        with self.accelerator.autocast():
            return sequence_loss(self.model, batch, self.start, self.pad, self.config.label_smoothing)

    def _until_it_fits(self, run: Callable[[], Any]) -> Any:
        """Returns ``run()``, repeated under tighter plans while memory does not suffice, with the same generators."""
        while True:
            generators = torch.get_rng_state(), torch.cuda.get_rng_state() if self.device.type == "cuda" else None
            try:
                return run()
            except torch.OutOfMemoryError:
                plan = self.plan and self.plan.tighter()
                if not plan:
                    raise
            # outside of the handler, whose exception holds the tensors of the step
            self.zero_gradients()
            torch.set_rng_state(generators[0])
            if generators[1] is not None:
                torch.cuda.set_rng_state(generators[1])
                torch.cuda.empty_cache()
            self.tighten(plan)


def _made_capturable(optimizer) -> bool:
    """Lets steps of ``optimizer`` be captured; returns whether they can be, as those of PyTorch's own optimisers."""
    if not all("capturable" in group for group in optimizer.param_groups):
        return False
    for group in optimizer.param_groups:
        group["capturable"] = True
    # PyTorch would warn of the first step, which is not captured
    warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
    return True
