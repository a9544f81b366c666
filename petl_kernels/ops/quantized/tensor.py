"""``QuantizedTensor``, a frozen weight in int8 or NF4 in the place of a dense one, and ``quantize``, which makes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from petl_kernels.dispatch import active, dispatch
from petl_kernels.errors import InputError
from petl_kernels.ops.quantized.products import dequantize
from petl_kernels.ops.quantized.storage import PARTS, check_layout, part_shapes, storage_of, tiles

# What a write of an attribute is to ``__torch_function__``.
_SET_REQUIRES_GRAD = cast(Any, Tensor.requires_grad).__set__
_SET_DATA = cast(Any, Tensor.data).__set__

_F = TypeVar("_F", bound=Callable[..., Any])

# A function of torch.nn.functional -> the one that serves it where an argument is a quantized weight.
_functions: dict[Callable[..., Any], Callable[..., Any]] = {}


def takes_quantized(function: Callable[..., Any]) -> Callable[[_F], _F]:
    """Returns a decorator that makes a callable serve ``function`` where one of its arguments is a quantized weight."""

    def add(serving: _F) -> _F:
        _functions[function] = serving
        return serving

    return add


class QuantizedTensor(torch.Tensor):
    """A frozen weight (N, K) in int8 or NF4, in the place of a dense one.

    ``shape``, ``dtype`` and ``device`` are those of the weight that it stands for; ``storage`` is "int8" or "nf4". It
    goes where a weight goes: into ``F.linear`` and ``F.embedding``, as the parameter of a module, to another device,
    into a copy or a file. ``to`` with a dtype changes the dtype of ``dequantize`` and of embeddings, and no value.
    Anything else is refused: see ``dequantize``.
    """

    storage: str  # pyright: ignore[reportIncompatibleMethodOverride]

    @staticmethod
    def __new__(
        cls: type[QuantizedTensor], parts: list[Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> QuantizedTensor:
        self: Any = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=parts[0].device)
        self.storage = storage_of(parts)
        for name, part in zip(PARTS[self.storage], parts, strict=True):
            setattr(self, name, part)
        return self

    def parts(self) -> list[Tensor]:
        """Returns the tensors that hold the weight, in the order of ``ops/quantized/storage.py``."""
        return [getattr(self, name) for name in PARTS[self.storage]]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the dense weight that this one stands for, in ``dtype`` or its own."""
        rows, columns = self.shape
        return dequantize(self.parts(), 0, rows, columns, dtype or self.dtype)

    dequantise = dequantize  # the spelling of earlier versions

    def __tensor_flatten__(self) -> tuple[list[str], tuple[str, torch.dtype]]:
        return list(PARTS[self.storage]), (self.storage, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], context: tuple[str, torch.dtype], size: Sequence[int], stride: Sequence[int]
    ) -> QuantizedTensor:
        storage, dtype = context
        return QuantizedTensor([inner[name] for name in PARTS[storage]], size, dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"QuantizedTensor({tuple(self.shape)}, {self.storage}, {self.dtype}, device={str(self.device)!r})"

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        return _rebuild, (self.parts(), tuple(self.shape), self.dtype, getattr(self, "_is_param", False))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            parts = [part.clone() for part in self.parts()]
            memo[id(self)] = _rebuild(parts, tuple(self.shape), self.dtype, getattr(self, "_is_param", False))
        return memo[id(self)]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _functions:
            return _functions[function](*args, **kwargs)
        if (function is Tensor.requires_grad_ and _wants_grad(*args, **kwargs)) or (
            function == _SET_REQUIRES_GRAD and args[1]
        ):
            raise InputError(f"{args[0]!r} requires grad: a quantized weight is frozen, expected a dense one to train")
        if function == _SET_DATA:
            return _set_data(*args)
        return super().__torch_function__(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            function, types, args, kwargs
        )

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        serve = _DISPATCHED.get(function)
        if serve is not None and isinstance(args[0], QuantizedTensor):
            return serve(*args, **(kwargs or {}))
        if serve is None:  # below autograd and in inference mode `to` comes here whole, elsewhere as _to_copy
            result = function.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        name = f"{function._schema.name.replace('::', '.')}"
        raise InputError(f"{name} of a quantized weight: expected F.linear, F.embedding, or its dequantize() first")


def _rebuild(parts: list[Tensor], shape: Sequence[int], dtype: torch.dtype, is_parameter: bool) -> Tensor:
    weight = QuantizedTensor(parts, shape, dtype)
    return torch.nn.Parameter(weight, requires_grad=False) if is_parameter else weight


def _wants_grad(weight: Tensor, requires_grad: bool = True) -> bool:
    return requires_grad


def _set_data(weight: QuantizedTensor, other: Tensor) -> None:
    if not isinstance(other, QuantizedTensor) or weight.device != other.device:
        raise InputError("data of a quantized weight: expected another quantized weight on the same device")
    with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
        weight.data = other  # the shape and the dtype
    weight.storage = other.storage
    for name, part in zip(PARTS[other.storage], other.parts(), strict=True):
        setattr(weight, name, part)


# ---- what PyTorch may do with one -----------------------------------------------------------------------------------


def _same(weight: QuantizedTensor) -> QuantizedTensor:
    return QuantizedTensor(weight.parts(), weight.shape, weight.dtype)


def _clone(weight: QuantizedTensor, *, memory_format: torch.memory_format | None = None) -> QuantizedTensor:
    return QuantizedTensor([part.clone() for part in weight.parts()], weight.shape, weight.dtype)


def _to_copy(
    weight: QuantizedTensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    non_blocking: bool = False,
    **_: Any,
) -> QuantizedTensor:
    dtype = weight.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise InputError(f"to {dtype} of a quantized weight: expected a floating-point dtype")
    parts = [torch.ops.aten._to_copy(part, device=device, non_blocking=non_blocking) for part in weight.parts()]
    return QuantizedTensor(parts, weight.shape, dtype)


def _copy(weight: QuantizedTensor, source: Tensor, non_blocking: bool = False) -> QuantizedTensor:
    if not isinstance(source, QuantizedTensor) or (source.storage, source.shape) != (weight.storage, weight.shape):
        found = source if isinstance(source, QuantizedTensor) else f"a dense {tuple(source.shape)}"
        raise InputError(f"copy of {found} into {weight!r}: expected the same storage and shape")
    for part, other in zip(weight.parts(), source.parts(), strict=True):
        part.copy_(other, non_blocking=non_blocking)
    return weight


_DISPATCHED: dict[Any, Callable[..., QuantizedTensor]] = {
    torch.ops.aten.detach.default: _same,
    torch.ops.aten.alias.default: _same,
    torch.ops.aten.clone.default: _clone,
    torch.ops.aten._to_copy.default: _to_copy,
    torch.ops.aten.copy_.default: _copy,
}


# ---- making one -----------------------------------------------------------------------------------------------------


def quantize(weight: Tensor, storage: str) -> QuantizedTensor:
    """Returns ``weight`` (N, K) in ``storage``, "int8" or "nf4", with its dtype and on its device.

    Raises InputError: another storage, a weight that is not a floating-point matrix, that is trained, that holds inf or
    nan; for NF4 an odd number of values in one row or column, whose length the bytes do not show.
    """
    given = cast(object, weight)
    if not isinstance(given, Tensor) or given.dim() != 2 or not given.is_floating_point():
        found = f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)
        raise InputError(f"quantize: weight is {found}: expected a floating-point matrix")
    if isinstance(weight, QuantizedTensor):
        raise InputError(f"quantize: weight is {weight.storage} already: expected a dense one")
    if weight.requires_grad:
        raise InputError("quantize: weight requires grad: expected a frozen weight")
    check_layout(tuple(weight.shape), storage)
    if weight.is_meta or isinstance(weight, FakeTensor):
        parts = [weight.new_empty(size, dtype=kind) for size, kind in part_shapes(tuple(weight.shape), storage)]
        return QuantizedTensor(parts, tuple(weight.shape), weight.dtype)
    parts = list(dispatch(f"quantize_{storage}", weight.device, active(), weight.dtype)(weight.detach()))
    # int8's scales, or the mean of NF4's absmaxes: neither is finite where a value of the weight is not.
    if not math.isfinite(float(parts[-1].amax())):
        raise InputError("quantize: weight holds inf or nan: expected finite values")
    return QuantizedTensor(parts, tuple(weight.shape), weight.dtype)


def quantize_like(weight: QuantizedTensor, values: Tensor) -> tuple[QuantizedTensor, float]:
    """Returns ``values`` (N, K) in the storage and with the dtype of ``weight``, and the error ‖Ŵ - W‖ / ‖W‖."""
    parts = quantize(values, weight.storage).parts()
    rows, columns = values.shape
    apart, size = torch.zeros(2, dtype=torch.float64, device=values.device)
    for part in tiles(rows, columns, values.dtype):
        rounded = dequantize(parts, part.start, part.stop - part.start, columns, values.dtype)
        apart += _sum_of_squares(rounded.sub_(values[part]))
        size += _sum_of_squares(values[part])
    return QuantizedTensor(parts, tuple(values.shape), weight.dtype), float((apart / size.clamp(min=1e-300)).sqrt())


def _sum_of_squares(values: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return cast(Tensor, norm(values, dtype=torch.float64)).square()


def parts_of(weight: Tensor) -> list[Tensor]:
    """Returns the plain tensors that hold ``weight``: itself, for a dense one."""
    return weight.parts() if isinstance(weight, QuantizedTensor) else [weight]
