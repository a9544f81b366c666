"""PEFT's side of a trial: the leanest and fastest that a setting makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from petl_mt.data import IGNORE, Batch
from petl_mt.loss import shift_right
from torch import Tensor, nn

from bench.run.peers import lora_by_peft
from bench.step.sentences import PAD, START
from bench.step.task import RANK, SMOOTHING, TARGETS, Trial
from petl_kernels import versions
from petl_kernels.interop.hf import load_weights


def micro_batches(batch: Batch, micro_tokens: int, device: torch.device) -> Iterator[Batch]:
    rows = max(1, micro_tokens // max(batch.source.shape[1], batch.labels.shape[1]))
    for i in range(0, len(batch.source), rows):
        yield batch.part(slice(i, i + rows), PAD).to(device)


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


def peft_model(model: Any, trial: Trial, device: torch.device) -> nn.Module:
    """Returns PEFT's model in bf16 but for what the setting changes, the leanest and fastest that PEFT can be given.

    Of what bitsandbytes rounds, no dense copy is in memory. Without ``prepare_model_for_kbit_training``, which would
    hold embeddings and norms in fp32.
    """
    versions.check("peft")
    setting, model = trial.setting, model.to(torch.bfloat16)
    assert setting is not None
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
    model = lora_by_peft(model, setting.fp32_adapters, RANK, TARGETS).train()
    if setting.checkpointing:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    if setting.compiled:  # layers of a side share their code: compiled once and not for each
        for side in (model.base_model.model.model.encoder, model.base_model.model.model.decoder):
            for layer in side.layers:
                layer.compile(dynamic=True)
    return model


def _rounded_linear(linear: nn.Linear, base: str, device: torch.device) -> nn.Linear:
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    size = linear.in_features, linear.out_features
    with torch.device("meta"):
        if base == "int8":
            made = Linear8bitLt(*size, has_fp16_weights=False, threshold=6.0)
        else:
            made = Linear4bit(*size, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True)
    kind = cast(Any, type(made.weight))
    options = {"has_fp16_weights": False} if base == "int8" else {"quant_type": "nf4", "compress_statistics": True}
    made.weight = kind(linear.weight.data, requires_grad=False, **options)
    made.bias = linear.bias
    return made.to(device)


def peft_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the loss of the logits in their own dtype, as transformers has it; PyTorch's own label smoothing."""
    logits = model(
        input_ids=batch.source,
        attention_mask=(batch.source != PAD).long() if batch.padded else None,
        decoder_input_ids=shift_right(batch.labels, START, PAD),
        use_cache=False,
    ).logits
    options = {"ignore_index": IGNORE, "label_smoothing": SMOOTHING, "reduction": "sum"}
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), **options)
