"""The numbers of updates: read while the device is at the next update, checked, timed, and logged."""

from __future__ import annotations

import dataclasses
import math
import time

import torch
from torch import Tensor

from petl_kernels.dispatch import turned_down
from petl_kernels.errors import InputError

from ..config import TrainConfig
from ..memory_meter import MemoryMeter, process_bytes
from ..runs.checkpoint import Checkpoints
from ..runs.log import RunLog
from .delayed_reader import DelayedReader
from .loss_scale import LEAST, LossScale
from .progress import Progress

LOG_LINES = 200  # lines of training metrics over a whole run


class TrainingStopped(InputError):
    """The run cannot go on, since its loss is no number any more; the last good checkpoint is kept."""


class StepLog:
    """The numbers of the updates that this process makes.

    losses: of each update, in nats a target token, smoothing included. durations: of each update, in seconds.
    """

    def __init__(
        self,
        config: TrainConfig,
        progress: Progress,
        log: RunLog,
        checkpoints: Checkpoints,
        meter: MemoryMeter,
        device: torch.device,
    ) -> None:
        self.config, self.progress, self.log = config, progress, log
        self.checkpoints, self.meter = checkpoints, meter
        self.numbers = DelayedReader(device, self._log)
        self.losses: list[float] = []
        self.durations: list[float] = []
        self._turned_down = 0  # backends that a line has named

    def record(
        self, loss: Tensor, norm: Tensor, loss_scale: LossScale, lr: float, padding: float, began: float
    ) -> None:
        """Takes the numbers of the update that ``progress`` counts as the last one.

        loss, norm: scalars on the device. padding: the share of padding in its positions. began: the start of the
        update by ``time.perf_counter``. Raises TrainingStopped where the loss or the norm that is due is no number,
        unless the update was skipped for it; and where the loss scale has become too small for chance.
        """
        progress, before = self.progress, self.progress.seconds
        progress.seconds = before + time.perf_counter() - began
        numbers = torch.stack([loss.float(), norm.float(), loss_scale.skipped, loss_scale.now()])
        self.numbers.put(numbers, dataclasses.replace(progress), lr, padding, loss_scale.is_on)
        seconds = time.perf_counter() - began
        progress.seconds = before + seconds
        self.durations.append(seconds)

    def settle(self) -> None:
        """Waits for the last update: a loss that is no number stops the run before anything is kept of it."""
        began = time.perf_counter()
        self.numbers.settle()
        waited = time.perf_counter() - began
        self.progress.seconds += waited
        if self.durations:
            self.durations[-1] += waited

    def tell_turned_down(self) -> None:
        """Logs each backend once that has been found wrong on this card: what serves instead may be slow."""
        for backend in turned_down()[self._turned_down :]:
            self._turned_down += 1
            self.log.say(str(backend))
            self.log.metrics(self.progress.step, turned_down=str(backend))

    def _log(self, progress: Progress, lr: float, padding: float, scaled: bool, numbers: list[float]) -> None:
        """progress: as it was after the update whose loss, norm, whether it was skipped, and scale ``numbers`` are."""
        loss, norm, skipped, scale = numbers
        if skipped:
            self._count_overflow(progress.step, scale)
        else:
            self._check_finite(loss, norm, progress.step)
        self.losses.append(loss)
        every = max(1, self.config.steps // LOG_LINES)
        if progress.step % every and progress.step not in (1, self.config.steps):
            return
        recent = [loss for loss in self.losses[-every:] if math.isfinite(loss)]
        mean = sum(recent) / len(recent) if recent else None
        speed = progress.target_tokens / progress.seconds
        self.log.metrics(
            progress.step,
            **({} if mean is None else {"loss": round(mean, 6)}),
            **({} if skipped else {"grad_norm": round(norm, 6)}),
            lr=lr,
            target_tokens=progress.target_tokens,
            target_tokens_per_second=round(speed, 1),
            epoch=progress.epoch,
            padding=round(padding, 4),
            memory_bytes=self.meter.memory(),
            process_bytes=process_bytes(),
            seconds=round(progress.seconds, 3),
            **({"loss_scale": scale, "overflows": self.progress.overflows} if scaled else {}),
        )
        self.log.progress(progress.step, math.nan if mean is None else mean, speed, self.meter.text())

    def _count_overflow(self, step: int, scale: float) -> None:
        """Counts an update that was skipped, and says so; scale: the one that it has left."""
        self.progress.overflows += 1
        if scale < LEAST:
            what = f"gradients overflow at every loss scale, {scale:g} by now"
            raise TrainingStopped(f"training stopped at step {step}: {what} (fp16); {self._last_good()}")
        self.log.metrics(step, overflow=True, loss_scale=scale, overflows=self.progress.overflows)
        self.log.say(
            f"step {step}: a gradient overflowed in fp16; the update is skipped, loss scale {scale:g} from here on "
            f"(skipped so far: {self.progress.overflows})"
        )

    def _check_finite(self, loss: float, norm: float, step: int) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
        raise TrainingStopped(f"training stopped at step {step}: {what} (lr {self.config.lr:g}); {self._last_good()}")

    def _last_good(self) -> str:
        kept = self.checkpoints.path("latest")
        return f"the last good checkpoint is {kept}" if kept else "no checkpoint was written yet"
