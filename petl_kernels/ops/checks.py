"""Refuses arguments that no op takes: each check raises InputError with the op's and the argument's name."""

from __future__ import annotations

import torch
from torch import Tensor

from petl_kernels.errors import InputError
from petl_kernels.ops.define import AUTOCAST_KEYS
from petl_kernels.ops.quantized.tensor import QuantizedTensor


def check_activation(op: str, x: Tensor, name: str = "x") -> None:
    if x.dim() == 0:
        raise InputError(f"{op}: {name} has rank 0: expected (..., features)")
    if not x.is_floating_point():
        raise InputError(f"{op}: {name} has dtype {x.dtype}: expected a floating-point tensor")


def check_weight(op: str, name: str, weight: Tensor, x: Tensor) -> None:
    """Refuses a weight that is not (N, K) for x (..., K), or that ``check_frozen`` refuses."""
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise InputError(
            f"{op}: {name} has shape {shape(weight)}: expected (out, {x.shape[-1]}) for x of shape {shape(x)}"
        )
    check_frozen(op, name, weight, x)


def check_frozen(op: str, name: str, weight: Tensor, x: Tensor) -> None:
    """Refuses a weight that is trained, on another device than x or, where it is dense, of another dtype."""
    check_device(op, name, weight, x)
    if weight.dtype != x.dtype and not isinstance(weight, QuantizedTensor) and not autocasts(x):
        raise InputError(f"{op}: {name} has dtype {weight.dtype}: expected that of x, {x.dtype}")
    if weight.requires_grad:
        raise InputError(f"{op}: {name} requires grad: expected a frozen weight (or use torch.nn.Linear)")


def check_parameter(op: str, name: str, parameter: Tensor, expected: tuple[int, ...], x: Tensor) -> None:
    """Refuses a parameter of another shape than ``expected``, on another device than x, or of an integer dtype."""
    if tuple(parameter.shape) != expected:
        raise InputError(f"{op}: {name} has shape {shape(parameter)}: expected {expected}")
    if not parameter.is_floating_point():
        raise InputError(f"{op}: {name} has dtype {parameter.dtype}: expected a floating-point tensor")
    check_device(op, name, parameter, x)


def check_device(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise InputError(f"{op}: {name} is on {tensor.device}: expected the device of x, {x.device}")


def autocasts(x: Tensor) -> bool:
    return x.device.type in AUTOCAST_KEYS and torch.is_autocast_enabled(x.device.type)


def shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
