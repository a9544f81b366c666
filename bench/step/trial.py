"""One trial: a model under a cap of memory is trained for a few updates, in a process of its own.

A trial that runs out of memory, crashes or takes too long is a result with a reason. Both sides train LoRA (r = 16 on
q and v) on the same checkpoint of random weights and the same ragged sentences, ours packed as the trainer packs them,
and an update is the same sum: forward and backward of all its micro-batches, label smoothing 0.1, dropout as the
checkpoints have it, one step of AdamW.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from bench.shapes import m2m_config
from bench.step.ours import OurUpdate, make_plan, our_model, plan_line
from bench.step.peft_side import Update, peft_loss, peft_model
from bench.step.sentences import PAD, batches, packed, packed_batches, worst_batch
from bench.step.task import Result, Trial
from petl_kernels.interop.hf import skeleton
from petl_kernels.methods.owner import owner
from petl_kernels.step import cap


def run(trial: Trial, limit: float) -> Result:
    """The result of ``trial`` in a fresh process, which is ended after ``limit`` seconds."""
    receiver, sender = _context().Pipe(duplex=False)
    process = _context().Process(target=_child, args=(trial, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            return Result(f"not done after {limit:.0f} s", late=True)
        return receiver.recv()
    except EOFError:
        process.join()
        return Result(f"the process ended with code {process.exitcode}")
    finally:
        receiver.close()
        process.kill()
        process.join()


@functools.cache
def _context():
    """Processes fork from one that has imported what is slow to import, and has not touched CUDA (PEFT would)."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # or asking for a card would initialise CUDA there
    context = multiprocessing.get_context("forkserver")
    slow = ["transformers.models.m2m_100.modeling_m2m_100", "accelerate", "petl_kernels.planning.load"]
    context.set_forkserver_preload(slow if torch.cuda.is_available() else [*slow, "peft"])
    return context


def _child(trial: Trial, sender) -> None:
    with open(os.devnull, "w") as nowhere:  # warnings of libraries, many times over
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        result = measure(trial)
    except Exception as error:
        result = failed(error)
    sender.send(result)
    sender.close()


def failed(error: BaseException) -> Result:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < 9:
        chain.append(cause)
    lines = [f"{type(e).__name__}: {next(iter(str(e).splitlines()), '')}" for e in chain]
    for line in lines:
        if any(sign in line for sign in ("OutOfMemoryError", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")):
            return Result("out of memory", out_of_memory=True)
    return Result(lines[0][:300])


B = TypeVar("B")


def measure(trial: Trial) -> Result:
    device = torch.device(trial.device)
    cap.expand_segments()
    torch.manual_seed(0)
    words = trial.shape[-1]
    updates, worst = batches(trial.data, words), worst_batch(trial.data, words)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        plan, model = None, skeleton(m2m_config(*trial.shape))
        if trial.setting is None:
            plan, like = make_plan(model, trial, device)
            if trial.allow and not plan.approximations:
                return Result("the plan approximates nothing")
        # what other processes hold counts as this one's context to the cap, and is none of its budget
        stack.enter_context(cap.capped(trial.memory + trial.taken, device))
        cap.reset_peak(device)
        before = cap.peak(device)
        if plan is None:
            model, ours = peft_model(model, trial, device), None
            step = Update(model, functools.partial(peft_loss, model), trial.micro_tokens, device)
            loss, seconds = _timed(step, updates, worst, trial, device)
        else:
            step = ours = OurUpdate(our_model(model, trial, plan, like, folder, device), plan, device)
            updates, worst = packed_batches(trial.data, words), packed(worst)
            loss, seconds = _timed(step, updates, worst, trial, device)
        least, most = _needed(step.model, before, trial, device)
    return Result(
        seconds=seconds,
        least=least,
        most=most,
        source_tokens=sum(int((batch.source != PAD).sum()) for batch in updates),
        target_tokens=sum(batch.target_tokens for batch in updates),
        loss=loss,
        setting=str(trial.setting) if ours is None else plan_line(ours.plan),
        plan=None if ours is None else ours.plan.to_dict(),
    )


def _timed(
    step: Callable[[B], float], updates: Sequence[B], worst: B, trial: Trial, device: torch.device
) -> tuple[float, list[float]]:
    """Returns the loss of the largest batch, which comes first, and the seconds of each round of ``updates``."""
    loss = step(worst)
    if device.type == "cuda" or (trial.setting is not None and trial.setting.compiled):
        for batch in updates:  # kernels that a shape needs are there afterwards
            step(batch)
    seconds = []
    for _ in range(trial.rounds):
        _wait(device)
        began = time.perf_counter()
        for batch in updates:
            step(batch)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return loss, seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _needed(model: nn.Module, before: int, trial: Trial, device: torch.device) -> tuple[int, int]:
    """On CUDA the allocator's peak and what it had reserved for it, both with the context; on the CPU one number."""
    if device.type == "cuda":
        context = max(0, cap.context_bytes(device) - trial.taken)
        return torch.cuda.max_memory_allocated(device) + context, torch.cuda.max_memory_reserved(device) + context
    streamed = owner(model).streamed
    peak = cap.peak(device) - before + (streamed.resident_bytes() if streamed else 0)
    return peak, peak
