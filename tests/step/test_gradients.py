"""Gradients that wait in bf16: their values, the updates made from them, and the bytes beside them."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from layers.lean_cases import ragged
from methods.models import build
from torch import nn

import petl_kernels as pk
from petl_kernels.step import gradients
from petl_kernels.step.gradients import RoundedGradients, groups

UNIT = 2.0**-8  # the relative rounding of bf16


def made(method=None) -> nn.Module:
    torch.manual_seed(0)
    return pk.adapt(build("m2m100"), method or pk.LoRA(rank=4, targets="all-linear"))


def backward(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    model(**ragged(model)).loss.backward()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return pk.trainable_parameters(model)


def adamw(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=True)


def adamw8bit(parameters) -> torch.optim.Optimizer:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra 8bit)")
    return bitsandbytes.optim.AdamW8bit(parameters, lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("largest", [float("inf"), 1e-3])
@pytest.mark.parametrize("make_optimizer", [adamw, adamw8bit])
def test_an_update_is_that_of_rounded_gradients(make_optimizer, largest, monkeypatch):
    """Two updates of one micro-batch are the same bit for bit; the optimiser gets some parameters at a time."""
    monkeypatch.setattr(gradients, "GROUP_BYTES", 2000)
    model, plain = made(), made()
    rounded, optimizers = RoundedGradients(trained(model)), [make_optimizer(trained(m)) for m in (model, plain)]
    assert 3 < len(list(groups(trained(model)))) < len(trained(model))
    for seed in range(2):
        for each in (model, plain):
            backward(each, seed)
        assert all(p.grad is None for p in model.parameters())
        for parameter in trained(plain):
            parameter.grad.copy_(parameter.grad.bfloat16())
        assert torch.equal(rounded.clip(largest), nn.utils.clip_grad_norm_(trained(plain), largest))
        rounded.step(optimizers[0])
        optimizers[1].step()
        rounded.zero()
        optimizers[1].zero_grad()
        assert all(map(torch.equal, trained(model), trained(plain)))


def test_sums_of_several_micro_batches_stay_within_the_bound():
    model, count = made(), 6
    exact = [torch.zeros_like(p, dtype=torch.float64) for p in trained(model)]
    sizes = [torch.zeros_like(p, dtype=torch.float64) for p in trained(model)]
    for seed in range(count):
        backward(model, seed)
        for total, size, parameter in zip(exact, sizes, trained(model), strict=True):
            total += parameter.grad
            size += parameter.grad.abs()
            parameter.grad = None
    rounded = RoundedGradients(trained(model))
    for seed in range(count):
        backward(model, seed)
    off = 0.0
    for total, size, parameter in zip(exact, sizes, trained(model), strict=True):
        error = (rounded.sum_of(parameter).double() - total).abs()
        assert (error <= ((1 + UNIT) ** count - 1) * size + 1e-30).all()
        off = max(off, float(error.max()))
    assert off > 0


def test_a_parameter_of_several_pieces(monkeypatch):
    monkeypatch.setattr(gradients, "PIECE", 7)
    parameter = nn.Parameter(torch.randn(5, 9))
    rounded, values = RoundedGradients([parameter]), torch.randn(5, 9)
    for _ in range(2):
        (parameter * values).sum().backward()
    kept = values.bfloat16()
    assert torch.equal(rounded.sum_of(parameter), (values + kept).bfloat16())
    torch.testing.assert_close(rounded.clip(1.0), rounded.sum_of(parameter).float().norm())


def test_a_parameter_without_a_gradient_stays(monkeypatch):
    used, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    rounded, optimizer = RoundedGradients([used, idle]), adamw([used, idle])
    (2 * used).sum().backward()
    rounded.step(optimizer)
    assert torch.equal(idle, torch.ones(3)) and not torch.equal(used, torch.ones(3))


def test_what_was_broken_off_is_forgotten():
    model = made()
    rounded = RoundedGradients(trained(model))
    backward(model, 0)
    first = [rounded.sum_of(p).clone() for p in trained(model)]
    trained(model)[0].grad = torch.ones_like(trained(model)[0])  # a backward that stopped before the hook
    rounded.clip(1e-6)
    rounded.zero()
    assert all(p.grad is None and not rounded.sum_of(p).any() for p in trained(model))
    backward(model, 0)
    assert all(torch.equal(a, rounded.sum_of(p)) for a, p in zip(first, trained(model), strict=True))


def test_closed_it_leaves_gradients_as_they_are():
    model = made()
    other = copy.deepcopy(model)
    RoundedGradients(trained(model)).close()
    backward(model, 0)
    backward(other, 0)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(trained(model), trained(other), strict=True))


def test_one_wide_gradient_lives_at_a_time():
    """Bytes of a stack of equal layers are counted at the end of a backward, and while the optimiser steps."""
    from petl_kernels import _C

    _C.install_cpu_allocator()
    layers, size = 16, 256 * 256
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(layers)))
    rounded = RoundedGradients(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(1, 256)
    for parameter in model.parameters():
        rounded.sum_of(parameter)
    before = _C.cpu_bytes()
    _C.reset_cpu_peak()
    model(x).sum().backward()
    assert _C.cpu_peak() - before < 3 * 4 * size  # one, what is added to it, some rows
    del x
    _C.reset_cpu_peak()
    before = _C.cpu_bytes()
    rounded.step(optimizer)
    assert _C.cpu_peak() - before < 1.1 * gradients.GROUP_BYTES


@pytest.mark.slow
def test_a_plan_takes_the_place_of_an_earlier_one():
    model = made()
    plan = pk.plan(model, "64MiB", 128, max_length=32, device="cpu")
    rounding = dataclasses.replace(plan, gradients="bfloat16")
    for _ in range(2):
        rounding.apply(model)
    backward(model, 0)
    assert all(p.grad is None for p in trained(model)) and model.petl_gradients.clip(1.0) > 0
    plan.apply(model)
    backward(model, 0)
    assert model.petl_gradients is None and all(p.grad is not None for p in trained(model))
