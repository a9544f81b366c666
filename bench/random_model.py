"""Models of a shape with random weights, values of bf16: in memory on a device, or as a checkpoint's folder."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from petl_kernels.interop.hf import skeleton

# Drawn once, and repeated: drawing billions of numbers takes a CPU minutes. A prime, so that no two rows are alike.
DRAWN = 1_000_003


def random_weights(config, device: str) -> dict[str, Tensor]:
    """Makes a value for each parameter of the model of ``config``, tied ones once, made on ``device``."""
    noise = _noise(device)
    return {name: _values(name, parameter.shape, noise) for name, parameter in skeleton(config).named_parameters()}


def frozen_model(config, weights: dict[str, Tensor]) -> nn.Module:
    """Returns a frozen model of ``config`` in the dtype of ``weights``, shared with all that are made from them."""
    model = skeleton(config)
    made = {id(p): nn.Parameter(weights[name], requires_grad=False) for name, p in model.named_parameters()}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, made[id(parameter)])
    like = next(iter(weights.values()))
    return model.to(like.device, like.dtype)  # buffers, too: positions in fp32 would make all that follows fp32


def write_checkpoint(config, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes such weights to ``folder`` in ``dtype`` with their config, a file for each layer: no machine holds them
    all."""
    noise = _noise(device)
    files: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in skeleton(config).named_parameters():
        files.setdefault(".".join(name.split(".")[:4]) if ".layers." in name else "rest", {})[name] = parameter
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    for part, parameters in files.items():
        tensors = {name: _values(name, parameter.shape, noise).to(dtype) for name, parameter in parameters.items()}
        safetensors.torch.save_file(tensors, folder / f"{part}.safetensors", metadata={"format": "pt"})
    places = {name: f"{part}.safetensors" for part, parameters in files.items() for name in parameters}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _noise(device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.empty(DRAWN, dtype=torch.bfloat16, device=device).normal_(std=0.02, generator=generator)


def _values(name: str, shape: torch.Size, noise: Tensor) -> Tensor:
    if len(shape) == 1:
        return noise.new_full(shape, 1.0 if name.endswith("norm.weight") else 0.0)
    flat = noise.new_empty(shape.numel())
    for part in flat.split(len(noise)):
        part.copy_(noise[: len(part)])
    return flat.view(shape)
