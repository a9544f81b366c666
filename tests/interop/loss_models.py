"""Small models of every class whose loss is known, and the batches that they read."""

from __future__ import annotations

import torch
from layers.every_model import WORDS, build, classes
from torch import Tensor, nn


def tiny(name: str, cls: type | None = None) -> nn.Module:
    """A model of the class ``name`` of transformers, or of ``cls``, a subclass of it, in float64; seeded."""
    model_type = next(model_type for model_type, its_class in classes().items() if its_class == name)
    model = build(model_type, cls)
    with torch.no_grad():  # a bias of the logits is one
        for tensor in model.buffers():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def labelled(rows: int = 2) -> dict[str, Tensor]:
    """Sources with padding and labels that are ignored in part."""
    generator = torch.Generator().manual_seed(5)
    source = torch.randint(3, WORDS, (rows, 6), generator=generator)
    labels = torch.randint(3, WORDS, (rows, 4), generator=generator)
    mask = torch.ones_like(source)
    mask[1, 4:] = 0
    labels[1, 2:] = -100
    return {"input_ids": source, "attention_mask": mask, "labels": labels}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Where one has none, the other's is zero; 1e-9 of the largest are allowed."""
    largest = max(value.abs().max() for value in expected.values())
    for name in found.keys() | expected.keys():
        one, other = found.get(name), expected.get(name)
        zero = torch.zeros_like(one if other is None else other)
        one, other = zero if one is None else one, zero if other is None else other
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9 * largest, msg=name)
