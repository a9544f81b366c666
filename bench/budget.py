"""A model of a published shape, random weights, trained for a few updates inside a budget of bytes.

    python -m bench.budget nllb-3.3b 4GiB --allow quantized

Writes the checkpoint (bf16) into a temporary folder, plans from its config, loads it by the plan under a cap that
the allocator enforces, trains, and adds a line to results/<device>/budget.json: the plan, the peak that the allocator
saw, and seconds an update. On the CPU the cap counts every tensor; pages of streamed layers are counted beside it.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path

import torch
from petl_mt.models.adapt import cast_frozen_matrices

import petl_kernels as pk
from bench.random_model import write_checkpoint
from bench.shapes import MODELS, m2m_config
from bench.where import commit, results_of
from petl_kernels.device import resolve
from petl_kernels.files import atomic_write
from petl_kernels.interop.hf import skeleton
from petl_kernels.planning.load import load_planned
from petl_kernels.step import cap
from petl_kernels.units import format_size, parse_size


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shape", choices=MODELS)
    parser.add_argument("memory")
    parser.add_argument("--allow", default="")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--updates", type=int, default=2)
    arguments = parser.parse_args()
    device = resolve()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        line = run(Path(folder), arguments, device)
    print(json.dumps(line, indent=1))
    record(line, device)


def run(folder: Path, arguments: argparse.Namespace, device: torch.device) -> dict:
    config = m2m_config(*MODELS[arguments.shape])
    write_checkpoint(config, folder / "model", device.type)
    model = skeleton(config)
    like = adapted(copy.deepcopy(model))
    began = time.perf_counter()
    plan = pk.plan(
        like,
        arguments.memory,
        arguments.batch_tokens,
        max_length=arguments.length,
        allow=arguments.allow.split(",") if arguments.allow else (),
        device=device,
        autocast=torch.bfloat16,
    )
    planned = time.perf_counter() - began
    print(plan, flush=True)
    with cap.capped(parse_size(arguments.memory), device):
        cap.reset_peak(device)
        before = cap.peak(device)
        began = time.perf_counter()
        model = adapted(load_planned(folder / "model", model, like, plan, folder))
        plan.apply(model, folder, sorted(folder.glob("*.safetensors")))
        model.to(device).train()
        loaded, loading_peak = time.perf_counter() - began, cap.peak(device) - before
        cap.reset_peak(device)
        seconds, losses = updates(model, plan, arguments, device)
        peak = cap.peak(device) - before
        pages = model.petl.streamed.resident_bytes() if plan.streamed and device.type == "cpu" else 0
    return {
        "command": f"python -m bench.budget {arguments.shape} {arguments.memory} --allow {arguments.allow!r} "
        f"--batch-tokens {arguments.batch_tokens} --length {arguments.length}",
        "commit": commit(),
        "torch": torch.__version__,
        "planned_peak": plan.peak,
        "measured_peak": peak + pages,
        "of_which_pages": pages,
        "loading_peak": loading_peak,
        "peak": format_size(peak + pages),
        "seconds_to_plan": round(planned, 1),
        "seconds_to_load": round(loaded, 1),
        "seconds_an_update": [round(value, 2) for value in seconds],
        "planned_seconds_an_update": round(plan.seconds, 2),
        "losses": losses,
        "plan": plan.to_dict(),
    }


def adapted(model):
    model = pk.adapt(model, pk.LoRA(rank=16))
    cast_frozen_matrices(model, torch.bfloat16)
    return model


def updates(model, plan, arguments: argparse.Namespace, device: torch.device) -> tuple[list[float], list[float]]:
    optimizer = torch.optim.AdamW(pk.trainable_parameters(model), lr=1e-4, fused=True)
    seconds, losses = [], []
    for _ in range(arguments.updates):
        began, total = time.perf_counter(), 0.0
        for _ in range(plan.micro_batches):
            ids = torch.randint(5, model.config.vocab_size, (plan.rows, plan.longest), device=device)
            with torch.autocast(device.type, torch.bfloat16):
                options = {"label_smoothing": 0.1, "reduction": "sum"}
                loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, **options).loss
            (loss / plan.batch_tokens).backward()
            total += loss.item() / plan.batch_tokens
        if plan.gradients == "bfloat16":
            model.petl_gradients.step(optimizer)
            model.petl_gradients.zero()
        else:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        seconds.append(time.perf_counter() - began)
        losses.append(round(total, 3))
    return seconds, losses


def record(line: dict, device: torch.device) -> None:
    path = results_of(device.type) / "budget.json"
    lines = json.loads(path.read_text()) if path.exists() else []
    with atomic_write(path) as file:
        json.dump([old for old in lines if old["command"] != line["command"]] + [line], file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
