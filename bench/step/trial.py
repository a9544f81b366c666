"""One trial: a model under a cap of memory is trained for a few updates, in a process of its own.

A trial that runs out of memory, crashes or takes too long is a result with a reason. Both sides train LoRA (r = 16 on
q and v) on the same checkpoint of random weights and the same ragged sentences, ours packed as the trainer packs them,
and an update is the same sum: forward and backward of all its micro-batches, label smoothing 0.1, dropout as the
checkpoints have it, one step of AdamW.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from peft_settings import Setting
from petl_mt import update
from petl_mt.config import TrainConfig
from petl_mt.data import IGNORE, Batch, PackedBatch
from petl_mt.loss import shift_right
from sentences import PAD, START, Data, batches, packed, packed_batches, worst_batch
from shapes import m2m_config
from torch import Tensor, nn

import petl_kernels as pk
from petl_kernels import versions
from petl_kernels.interop.hf import load_weights, skeleton
from petl_kernels.planning.load import load_planned
from petl_kernels.planning.plan import Plan
from petl_kernels.step import cap
from petl_kernels.units import format_size

RANK = 16
TARGETS = ("q_proj", "v_proj")
SMOOTHING = 0.1


@dataclass(frozen=True)
class Trial:
    """shape: layers of each side, width, feed-forward width, heads, words. memory: bytes of the cap.

    setting, micro_tokens: of PEFT, whose micro-batches have at most that many padded tokens; None are ours, which plan
    with the approximations in ``allow``. taken: bytes of the card that other processes hold.
    """

    shape: tuple[int, int, int, int, int]
    checkpoint: str
    memory: int
    device: str
    data: Data
    rounds: int
    setting: Setting | None = None
    micro_tokens: int = 0
    allow: tuple[str, ...] = ()
    taken: int = 0


@dataclass
class Result:
    """seconds: of each round, which is all updates once. least, most: the bytes needed lie between them.

    failure: why there are no seconds, in one line; out_of_memory and late tell two reasons from the others.
    """

    failure: str = ""
    out_of_memory: bool = False
    late: bool = False
    seconds: list[float] = field(default_factory=list)
    least: int = 0
    most: int = 0
    source_tokens: int = 0
    target_tokens: int = 0
    loss: float = math.nan
    setting: str = ""
    plan: dict | None = None


# ---- processes


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


# ---- the two sides


def micro_batches(batch: Batch, micro_tokens: int, device: torch.device) -> Iterator[Batch]:
    rows = max(1, micro_tokens // max(batch.source.shape[1], batch.labels.shape[1]))
    for i in range(0, len(batch.source), rows):
        yield batch.part(slice(i, i + rows), PAD).to(device)


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
            model = peft_model(model, trial, device)
            step = Update(model, functools.partial(peft_loss, model), trial.micro_tokens, device)
        else:
            step = OurUpdate(our_model(model, trial, plan, like, folder, device), plan, device)
            updates, worst = packed_batches(trial.data, words), packed(worst)
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
        least, most = _needed(step.model, before, trial, device)
    return Result(
        seconds=seconds,
        least=least,
        most=most,
        source_tokens=sum(int((batch.source != PAD).sum()) for batch in updates),
        target_tokens=sum(batch.target_tokens for batch in updates),
        loss=loss,
        setting=str(trial.setting) if plan is None else plan_line(step.plan),
        plan=None if plan is None else step.plan.to_dict(),
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _needed(model: nn.Module, before: int, trial: Trial, device: torch.device) -> tuple[int, int]:
    """On CUDA the allocator's peak and what it had reserved for it, both with the context; on the CPU one number."""
    if device.type == "cuda":
        context = max(0, cap.context_bytes(device) - trial.taken)
        return torch.cuda.max_memory_allocated(device) + context, torch.cuda.max_memory_reserved(device) + context
    streamed = getattr(model, "petl_streamed", None)
    peak = cap.peak(device) - before + (streamed.resident_bytes() if streamed else 0)
    return peak, peak


class Update:
    """PEFT's: gradients of all micro-batches, normalised by all target tokens, and a step of AdamW."""

    def __init__(self, model: nn.Module, loss: Callable[[Batch], Tensor], micro_tokens: int, device: torch.device):
        self.model, self.loss, self.micro_tokens, self.device = model, loss, micro_tokens, device
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def __call__(self, batch: Batch) -> float:
        total, tokens = torch.zeros((), device=self.device), batch.target_tokens
        for part in micro_batches(batch, self.micro_tokens, self.device):
            loss = self.loss(part) / tokens
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return total.item()


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
        plain = SimpleNamespace(device=device, autocast=contextlib.nullcontext, backward=Tensor.backward)
        config = TrainConfig(label_smoothing=SMOOTHING)
        self.trainer = update.Update(model, self.optimizer, plain, config, plan, START, PAD, say=lambda line: None)

    @property
    def plan(self) -> Plan:
        """Tightened, maybe."""
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


def peft_model(model: nn.Module, trial: Trial, device: torch.device) -> nn.Module:
    """bf16 throughout but for what the setting says, which is the leanest and fastest that PEFT can be given.

    Of what bitsandbytes rounds, no dense copy is in memory. Without ``prepare_model_for_kbit_training``, which would
    hold embeddings and norms in fp32.
    """
    versions.check("peft")
    import peft

    setting, model = trial.setting, model.to(torch.bfloat16)
    rounded = set()
    if setting.base != "bfloat16":
        head = model.get_output_embeddings()
        rounded = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}

    def place(name: str, tensor: Tensor) -> Tensor:
        return tensor if name in rounded else tensor.to(device, torch.bfloat16, copy=True)

    load_weights(trial.checkpoint, model, place)
    for name in rounded:
        path = name.removesuffix(".weight")
        owner, _, attribute = path.rpartition(".")
        linear = model.get_submodule(path)
        setattr(model.get_submodule(owner), attribute, _rounded_linear(linear, setting.base, device))
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = setting.base == "int8", setting.base == "nf4"
    model.to(device)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS))
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=setting.fp32_adapters).train()
    if setting.checkpointing:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    if setting.compiled:  # layers of a side share their code: compiled once and not for each
        for side in (model.base_model.model.model.encoder, model.base_model.model.model.decoder):
            for layer in side.layers:
                layer.compile(dynamic=True)
    return model


def _rounded_linear(linear: nn.Linear, base: str, device: torch.device) -> nn.Linear:
    import bitsandbytes as bnb

    size = linear.in_features, linear.out_features
    with torch.device("meta"):
        if base == "int8":
            made = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False, threshold=6.0)
        else:
            made = bnb.nn.Linear4bit(*size, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True)
    kind = type(made.weight)
    options = {"has_fp16_weights": False} if base == "int8" else {"quant_type": "nf4", "compress_statistics": True}
    made.weight = kind(linear.weight.data, requires_grad=False, **options)
    made.bias = linear.bias
    return made.to(device)


def peft_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Of the logits in their own dtype, as transformers has it; PyTorch's own label smoothing."""
    logits = model(
        input_ids=batch.source,
        attention_mask=(batch.source != PAD).long() if batch.padded else None,
        decoder_input_ids=shift_right(batch.labels, START, PAD),
        use_cache=False,
    ).logits
    options = {"ignore_index": IGNORE, "label_smoothing": SMOOTHING, "reduction": "sum"}
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), **options)
