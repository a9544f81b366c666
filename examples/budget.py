"""Sizes an adapter by a budget of parameters, and plans training by a budget of bytes."""

from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM

import petl_kernels as pk

PARENT = Path(__file__).resolve().parents[1] / "python/petl_mt/demo/parent"  # ships with the package

model = AutoModelForSeq2SeqLM.from_pretrained(PARENT, dtype=torch.float32)
total = sum(parameter.numel() for parameter in model.parameters())

# Parameters: "5%" of the model's; 0.05 or "300k" would do as well. The size that comes nearest from below.
adapter = pk.Adapter.for_budget(model, "5%")
pk.adapt(model, adapter, name="small")
trained = sum(parameter.numel() for parameter in pk.trainable_parameters(model))
print(f"bottleneck {adapter.bottleneck}: {trained:,} of {total:,} parameters, {trained / total:.2%}")

# Bytes: the fastest way to make an update of 2,048 tokens a side inside of 192 MiB, in all that training takes.
plan = pk.plan(model, memory="192MiB", batch_tokens=2048, max_length=128, device="cpu")
print(plan)
plan.apply(model)  # puts tiers and the loss' chunk on the model; micro-batches are the loop's own
print(f"micro-batches of an update: {plan.micro_batches}, each of at most {plan.micro_tokens:,} tokens a side")
