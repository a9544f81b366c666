"""Our side of a trial: planned, loaded by the plan, and updated by the trainer's own loop."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from types import SimpleNamespace

import torch
from petl_mt.config import TrainConfig
from petl_mt.data import PackedBatch
from petl_mt.train import update
from torch import Tensor, nn

import petl_kernels as pk
from bench.step.sentences import PAD, START
from bench.step.task import RANK, SMOOTHING, TARGETS, Trial
from petl_kernels.planning.load import load_planned
from petl_kernels.planning.plan import Plan
from petl_kernels.units import format_size


def make_plan(model: nn.Module, trial: Trial, device: torch.device) -> tuple[Plan, nn.Module]:
    """(plan, the model on the meta device as it will be trained)"""
    like = our_adapted(copy.deepcopy(model))
    data = trial.data
    given = {"max_length": data.longest, "allow": trial.allow, "device": device, "packed": True}
    return pk.plan(like, trial.memory, data.batch_tokens, **given), like


def our_adapted(model: nn.Module) -> nn.Module:
    """bf16 throughout, as PEFT's side has it, but for the adapters, which are in fp32."""
    return pk.adapt(model.to(torch.bfloat16), pk.LoRA(rank=RANK, alpha=2.0 * RANK, targets=TARGETS))


def our_model(
    model: nn.Module, trial: Trial, plan: Plan, like: nn.Module, folder: Path, device: torch.device
) -> nn.Module:
    checkpoint = Path(trial.checkpoint)
    model = our_adapted(load_planned(checkpoint, model, like, plan, folder))
    plan.apply(model, folder, sorted(folder.glob("*.safetensors")))
    return model.to(device).train()


class OurUpdate:
    """An update as the plan has it, by the trainer's own loop: in smaller parts where a step finds no room.

    The optimiser's step is PEFT's: the trainer's clips gradients first, which is no part of what is compared.
    """

    def __init__(self, model: nn.Module, plan: Plan, device: torch.device):
        self.model = model
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
        plain = SimpleNamespace(device=device, autocast=contextlib.nullcontext, backward=Tensor.backward, scaler=None)
        config = TrainConfig(label_smoothing=SMOOTHING)
        self.trainer = update.Update(model, self.optimizer, plain, config, plan, START, PAD, say=lambda line: None)

    @property
    def plan(self) -> Plan:
        """Tightened, maybe."""
        assert self.trainer.plan is not None
        return self.trainer.plan

    def __call__(self, batch: PackedBatch) -> float:
        total = self.trainer.gradients([batch], batch.target_tokens)
        self.optimizer.step()
        self.trainer.zero_gradients()
        return total.item()


def plan_line(plan: Plan) -> str:
    words = [f"{plan.storage} base"] + ([f"{plan.tables} tables"] if plan.tables != plan.storage else [])
    words += [f"tiers {min(plan.tiers)} to {max(plan.tiers)}"]
    words += [f"{plan.streamed} layers streamed"] if plan.streamed else []
    return ", ".join(words + [f"loss in {format_size(plan.chunk_bytes)}"])
