"""Refuses arguments that ``attention`` does not take."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from petl_kernels.errors import InputError
from petl_kernels.ops import philox
from petl_kernels.ops.attention_reference import mask_columns
from petl_kernels.ops.checks import autocasts, check_device, check_floating, shape


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
) -> None:
    op = "attention"
    check_heads(op, q, k, v)
    batch, heads, queries, features = q.shape
    keys = k.shape[2]
    for name, tensor in (("k", k), ("v", v)):
        if tuple(tensor.shape) != (batch, heads, keys, features):
            raise InputError(f"{op}: {name} has shape {shape(tensor)}: expected {(batch, heads, keys, features)}")
    if features == 0:
        raise InputError(f"{op}: q has shape {shape(q)}: expected one feature or more")
    if mask is not None:
        _check_broadcast("mask", mask, ((batch, 1), (heads, 1), (queries, 1), (keys,)), q)
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise InputError(f"{op}: mask has dtype {mask.dtype}: expected torch.bool or a floating-point dtype")
        if mask.requires_grad:
            raise InputError(f"{op}: mask requires grad: expected a constant (a trained bias goes into bias)")
    if bias is not None:
        _check_broadcast("bias", bias, ((batch, 1), (heads,), (queries,), (keys,)), q)
        check_floating(op, "bias", bias)
    prefix = check_prefix(op, prefix_k, prefix_v, q, heads)
    philox.check_rate(op, dropout)
    probabilities = batch * heads * queries * mask_columns(prefix, keys)[1]
    if dropout and probabilities >= philox.MAX_ELEMENTS:
        raise InputError(f"{op}: there are {probabilities} probabilities: expected fewer than 2^32 with dropout")
    philox.check_seed(op, seed, q)


def _check_broadcast(name: str, tensor: Tensor, allowed: tuple[tuple[int, ...], ...], q: Tensor) -> None:
    fits = tensor.dim() == 4 and all(size in sizes for size, sizes in zip(tensor.shape, allowed, strict=True))
    if not fits:
        expected = ", ".join(" or ".join(str(size) for size in sizes) for sizes in allowed)
        raise InputError(f"attention: {name} has shape {shape(tensor)}: expected ({expected})")
    check_device("attention", name, tensor, q)


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuses q, k and v that are not of four dimensions, one floating-point dtype and one device."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise InputError(f"{op}: {name} has shape {shape(tensor)}: expected (batch, heads, length, features)")
        check_floating(op, name, tensor)
        if tensor.dtype != q.dtype and not autocasts(q):
            raise InputError(f"{op}: {name} has dtype {tensor.dtype}: expected that of q, {q.dtype}")
        check_device(op, name, tensor, q)


def check_prefix(op: str, prefix_k: Tensor | None, prefix_v: Tensor | None, q: Tensor, heads: int) -> int:
    """Refuses prefixes that do not fit q and ``heads`` heads of keys, and returns their length."""
    if prefix_k is None or prefix_v is None:
        if prefix_k is not prefix_v:
            missing = "prefix_k" if prefix_k is None else "prefix_v"
            raise InputError(f"{op}: {missing} is None and the other half is not: expected both or none")
        return 0
    features = q.shape[3]
    for name, tensor in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if tensor.dim() != 3 or tuple(tensor.shape) != (prefix_k.shape[0], heads, features):
            length = prefix_k.shape[0] if name == "prefix_v" else "prefix"
            raise InputError(f"{op}: {name} has shape {shape(tensor)}: expected ({length}, {heads}, {features})")
        check_floating(op, name, tensor)
        check_device(op, name, tensor, q)
    return prefix_k.shape[0]


def check_packed(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> None:
    op = "attention"
    if cu_seqlens_q is None or cu_seqlens_k is None:
        if cu_seqlens_q is not cu_seqlens_k:
            missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
            raise InputError(f"{op}: {missing} is None and the other one is not: expected both or none")
        return
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu.dtype != torch.int32:
            raise InputError(f"{op}: {name} has dtype {cu.dtype}: expected torch.int32")
        if cu.dim() != 1 or cu.shape[0] < 2:
            raise InputError(f"{op}: {name} has shape {shape(cu)}: expected (sentences + 1,) for one sentence or more")
        check_device(op, name, cu, q)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        expected = f"that of cu_seqlens_q, {shape(cu_seqlens_q)}"
        raise InputError(f"{op}: cu_seqlens_k has shape {shape(cu_seqlens_k)}: expected {expected}")
    if q.shape[0] != 1:
        raise InputError(f"{op}: q has shape {shape(q)}: expected a batch of 1 with cu_seqlens_q")
    for name, tensor in (("mask", mask), ("bias", bias)):
        if tensor is not None:
            raise InputError(f"{op}: {name} is given with cu_seqlens_q: expected None (sentences see only themselves)")


def check_boundaries(name: str, cu: Tensor, tokens: int) -> None:
    values: list[int] = cu.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if values[0] != 0 or values[-1] != tokens:
        raise InputError(f"attention: {name} goes from {values[0]} to {values[-1]}: expected 0 to {tokens}, the tokens")
    for sentence, (start, stop) in enumerate(itertools.pairwise(values)):
        if stop < start:
            raise InputError(f"attention: {name} has {start}, {stop} at {sentence}: expected numbers that do not fall")


def check_distance_bias(distance_bias: Tensor | None, q: Tensor) -> None:
    if distance_bias is None:
        return
    name, heads = "distance_bias", q.shape[1]
    if distance_bias.dim() != 2 or distance_bias.shape[0] != heads or distance_bias.shape[1] % 2 == 0:
        expected = f"({heads}, 2R + 1), an odd number of distances"
        raise InputError(f"attention: {name} has shape {shape(distance_bias)}: expected {expected}")
    check_floating("attention", name, distance_bias)
    check_device("attention", name, distance_bias, q)
