"""The CUDA graphs of a run: of a micro-batch's gradients, of the optimiser's step, of the validation loss.

A replay takes the host some microseconds; launching a step's kernels one by one takes it longer than the card needs to
run them. Rows are packed and filled up to few shapes (``petl_kernels.step.graphs``), with tokens that have no labels
and are in no loss and no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from petl_kernels.step.graphs import MOST, CudaGraphs, Graphed

from ..data import PackedBatch

# Tensors of ``PackedBatch.row``, in the order in which graphs take them.
_ROW = ("input_ids", "labels", "decoder_input_ids", "cu_seqlens", "decoder_cu_seqlens")
_NO_INDICES = np.zeros(0, np.int64)  # a graph does not know of which sentences its row is


class StepGraphs:
    """Runs parts of an update as graphs, or as they are where they cannot be captured, of which ``say`` prints a line.

    gradients: takes a row and the tokens of the update, adds the row's gradient and returns its share of the mean loss.
    step: takes the learning rate, in fp32, and returns the norm of the gradients; None where the optimiser cannot be
    captured. loss: takes a row and returns the sum of its losses. longest: tokens of the longest sentence.
    """

    def __init__(
        self,
        recorder: CudaGraphs,
        gradients: Callable[[PackedBatch, Tensor], Tensor],
        step: Callable[[Tensor], Tensor] | None,
        loss: Callable[[PackedBatch], Tensor],
        longest: int,
        say: Callable[[str], None],
    ) -> None:
        self.recorder, self.longest, self.say = recorder, longest, say
        self._told = False  # a line on more shapes than graphs has been printed
        if step is None:
            say("cuda_graphs: this optimiser's step cannot be captured, and runs as it is")
        self._gradients = Graphed(lambda *given: gradients(self._batch(given[:-1]), given[-1]), recorder)
        self._step = None if step is None else Graphed(step, recorder)
        self._loss = Graphed(lambda *row: loss(self._batch(row)), recorder)

    @property
    def captures_step(self) -> bool:
        """Returns whether ``step`` can be called."""
        return self._step is not None

    def gradients(self, batch: PackedBatch, tokens: int) -> Tensor:
        """Adds the gradient of ``batch``, which is filled up; returns its share of the mean loss over ``tokens``."""
        return self._run(self._gradients, *_tensors(batch), torch.tensor(float(tokens)))

    def step(self, lr: float) -> Tensor:
        """Clips the gradients, moves the parameters, clears the gradients; returns the norm before clipping."""
        assert self._step is not None
        return self._run(self._step, torch.tensor(lr))

    def loss(self, batch: PackedBatch, most: int) -> Tensor:
        """Returns the sum of losses of ``batch``, a row of at most ``most`` tokens a side or of one sentence."""
        return self._run(self._loss, *_tensors(batch.filled(most)))

    def release(self) -> None:
        """Frees the memory of all graphs; shapes are captured anew when they come again."""
        self.recorder.release()

    def _run(self, graphed: Graphed, *inputs: Tensor) -> Tensor:
        before = self.recorder.reason
        if self.recorder.device.type == "cuda":
            inputs = tuple(tensor.pin_memory() for tensor in inputs)
        result = graphed(*inputs)
        if graphed.is_full and not self._told:
            self._told = True
            self.say(f"cuda_graphs: rows of {MOST} shapes are captured, those of others run as they are")
        if self.recorder.reason != before:
            self.say(f"cuda_graphs: a step could not be captured, and all run as they are ({self.recorder.reason})")
        return result

    def _batch(self, row: tuple[Tensor, ...]) -> PackedBatch:
        """Returns the batch of a row on the device, with all labels as those that count: the most that can."""
        return PackedBatch({**dict(zip(_ROW, row, strict=True)), "longest": self.longest}, _NO_INDICES, row[1].numel())


def _tensors(batch: PackedBatch) -> tuple[Tensor, ...]:
    return tuple(batch.row[name].as_subclass(Tensor) for name in _ROW)
