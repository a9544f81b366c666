"""Frozen weights in 8 or 4 bits, and the products with them.

A weight W (N, K) is held as *parts*, a list of plain tensors whose number and dtypes say what they are:

    dense   [W]                                     floating point
    int8    [data, scale]                           Ŵ_nk = data_nk · scale_n
            data int8 (N, K), scale fp32 (N,)       scale = max_k |W_nk| / 127, or 1; data = W / scale, rounded to even
    nf4     [data, absmax, absmax_scale, absmax_offset]
            over the flattened W in blocks of 64    Ŵ_i = code[nibble_i] · a_b,  b = i // 64
            data uint8 (⌈NK / 2⌉,)                  value 2i in the high half of byte i, value 2i + 1 in the low one
            absmax uint8 (blocks,)                  a_b = map[absmax_b] · absmax_scale_(b // 256) + absmax_offset
            absmax_scale fp32 (⌈blocks / 256⌉,)     max over 256 blocks of |a - offset|
            absmax_offset fp32 (1,)                 the mean of all a = max |W| of a block

The nibble is the code of value / a that is nearest, by the thresholds of bitsandbytes; the codes are the quantiles of a
normal distribution that QLoRA publishes. ``map`` is its signed dynamic map of 256 entries. All of this is fp32, and Ŵ
is rounded to the dtype of the product it enters, which is that of the other factor (bf16, fp16, fp32, fp64).

    project         y  = x Ŵᵀ + c           x (tokens, K), c (N,) or None
    project_back    dx = dy Ŵ               dy (tokens, N); sums over parts of N are fp32
    embedding       y  = Ŵ[ids]             only the rows that are asked for are made

Ŵ exists in tiles of at most 1 MiB, or 32 MiB on CUDA. A frozen weight has no gradient, so nothing here saves anything.

Saves: nothing beside the parts, which live anyway.
Source: LLM.int8(), arXiv 2208.07339 (one scale a row, no outliers); QLoRA, arXiv 2305.14314 (NF4, double quantization);
8-bit optimizers, arXiv 2110.02861 (the dynamic map).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from petl_kernels.dispatch import active, dispatch, register
from petl_kernels.errors import InputError
from petl_kernels.ops.common import accumulate_dtype, define
from petl_kernels.ops.quantized.code_book import dynamic_map, table

STORAGES = ("int8", "nf4")
TILE_BYTES = 1 << 20
CUDA_TILE_BYTES = 32 << 20  # of what Triton's kernels dequantize ahead of the library's product
BLOCK = 64  # values that share an absmax
SUPERBLOCK = 256  # absmaxes that share a scale

NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# A value above NF4_THRESHOLDS[i] has a code above i.
NF4_THRESHOLDS = (
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544,
    -0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767,
    0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683,
    0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
)  # fmt: skip

# Storage -> the names of its parts, which are attributes of the tensor.
_PARTS = {"int8": ("packed", "scale"), "nf4": ("packed", "absmax", "absmax_scale", "absmax_offset")}

# The dtype of a first part -> how many parts there are; 1 for the others.
_PART_COUNTS = {torch.int8: 2, torch.uint8: 4}


class QuantizedTensor(torch.Tensor):
    """A frozen weight (N, K) in int8 or NF4, in the place of a dense one.

    ``shape``, ``dtype`` and ``device`` are those of the weight that it stands for; ``storage`` is "int8" or "nf4". It
    goes where a weight goes: into ``F.linear`` and ``F.embedding``, as the parameter of a module, to another device,
    into a copy or a file. ``to`` with a dtype changes the dtype of ``dequantize`` and of embeddings, and no value.
    Anything else is refused: see ``dequantize``.
    """

    @staticmethod
    def __new__(cls, parts: list[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> QuantizedTensor:
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=parts[0].device)
        self.storage = STORAGES[len(parts) == len(_PARTS["nf4"])]
        for name, part in zip(_PARTS[self.storage], parts, strict=True):
            setattr(self, name, part)
        return self

    def parts(self) -> list[Tensor]:
        if self.storage == "int8":
            return [self.packed, self.scale]
        return [self.packed, self.absmax, self.absmax_scale, self.absmax_offset]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight that this one stands for."""
        rows, columns = self.shape
        return dequantize(self.parts(), 0, rows, columns, dtype or self.dtype)

    dequantise = dequantize  # the spelling of earlier versions

    def __tensor_flatten__(self):
        return list(_PARTS[self.storage]), (self.storage, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        storage, dtype = context
        return QuantizedTensor([inner[name] for name in _PARTS[storage]], size, dtype)

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"QuantizedTensor({tuple(self.shape)}, {self.storage}, {self.dtype}, device={str(self.device)!r})"

    def __reduce_ex__(self, protocol):
        return _rebuild, (self.parts(), tuple(self.shape), self.dtype, getattr(self, "_is_param", False))

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            parts = [part.clone() for part in self.parts()]
            memo[id(self)] = _rebuild(parts, tuple(self.shape), self.dtype, getattr(self, "_is_param", False))
        return memo[id(self)]

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.linear:
            return _linear(*args, **kwargs)
        if function is F.embedding:
            return _embedding(*args, **kwargs)
        if (function is Tensor.requires_grad_ and _wants_grad(*args, **kwargs)) or (
            function == Tensor.requires_grad.__set__ and args[1]
        ):
            raise InputError(f"{args[0]!r} requires grad: a quantized weight is frozen, expected a dense one to train")
        if function == Tensor.data.__set__:
            return _set_data(*args)
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        serve = _DISPATCHED.get(function)
        if serve is not None and isinstance(args[0], QuantizedTensor):
            return serve(*args, **(kwargs or {}))
        if serve is None:  # below autograd and in inference mode `to` comes here whole, elsewhere as _to_copy
            result = function.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        name = f"{function._schema.name.replace('::', '.')}"
        raise InputError(f"{name} of a quantized weight: expected F.linear, F.embedding, or its dequantize() first")


def _rebuild(parts: list[Tensor], shape: tuple[int, int], dtype: torch.dtype, is_parameter: bool) -> Tensor:
    weight = QuantizedTensor(parts, shape, dtype)
    return torch.nn.Parameter(weight, requires_grad=False) if is_parameter else weight


def _wants_grad(weight: Tensor, requires_grad: bool = True) -> bool:
    return requires_grad


def _set_data(weight: QuantizedTensor, other: Tensor) -> None:
    if not isinstance(other, QuantizedTensor) or weight.device != other.device:
        raise InputError("data of a quantized weight: expected another quantized weight on the same device")
    with torch._C.DisableTorchFunctionSubclass():
        weight.data = other  # the shape and the dtype
    weight.storage = other.storage
    for name, part in zip(_PARTS[other.storage], other.parts(), strict=True):
        setattr(weight, name, part)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    from petl_kernels.ops.frozen_linear import frozen_linear  # it imports this file

    return frozen_linear(input, weight, bias)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None:
        raise InputError(f"embedding: max_norm is {max_norm}: expected None for a quantized weight, which is frozen")
    return quantized_embedding(input, weight)


# ---- what PyTorch may do with one -----------------------------------------------------------------------------------


def _same(weight: QuantizedTensor) -> QuantizedTensor:
    return QuantizedTensor(weight.parts(), weight.shape, weight.dtype)


def _clone(weight: QuantizedTensor, *, memory_format=None) -> QuantizedTensor:
    return QuantizedTensor([part.clone() for part in weight.parts()], weight.shape, weight.dtype)


def _to_copy(weight: QuantizedTensor, *, dtype=None, device=None, non_blocking=False, **_) -> QuantizedTensor:
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


_DISPATCHED = {
    torch.ops.aten.detach.default: _same,
    torch.ops.aten.alias.default: _same,
    torch.ops.aten.clone.default: _clone,
    torch.ops.aten._to_copy.default: _to_copy,
    torch.ops.aten.copy_.default: _copy,
}


# ---- making one -----------------------------------------------------------------------------------------------------


def quantize(weight: Tensor, storage: str) -> QuantizedTensor:
    """``weight`` (N, K) in ``storage``, "int8" or "nf4"; its dtype and device stay those of the result.

    Raises InputError: another storage, a weight that is not a floating-point matrix, that is trained, that holds inf or
    nan; for NF4 an odd number of values in one row or column, whose length no one could tell from the bytes.
    """
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        found = f"{weight.dtype} of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else repr(weight)
        raise InputError(f"quantize: weight is {found}: expected a floating-point matrix")
    if isinstance(weight, QuantizedTensor):
        raise InputError(f"quantize: weight is {weight.storage} already: expected a dense one")
    if weight.requires_grad:
        raise InputError("quantize: weight requires grad: expected a frozen weight")
    _check_layout(tuple(weight.shape), storage)
    if weight.is_meta or isinstance(weight, FakeTensor):
        parts = [weight.new_empty(size, dtype=kind) for size, kind in _part_shapes(*weight.shape, storage)]
        return QuantizedTensor(parts, tuple(weight.shape), weight.dtype)
    parts = list(dispatch(f"quantize_{storage}", weight.device, active(), weight.dtype)(weight.detach()))
    # int8's scales, or the mean of NF4's absmaxes: neither is finite where a value of the weight is not.
    if not math.isfinite(float(parts[-1].amax())):
        raise InputError("quantize: weight holds inf or nan: expected finite values")
    return QuantizedTensor(parts, tuple(weight.shape), weight.dtype)


def quantize_like(weight: QuantizedTensor, values: Tensor) -> tuple[QuantizedTensor, float]:
    """``values`` (N, K) in the storage and with the dtype of ``weight``, and ‖Ŵ - W‖ / ‖W‖, the error of it."""
    parts = quantize(values, weight.storage).parts()
    rows, columns = values.shape
    apart, size = torch.zeros(2, dtype=torch.float64, device=values.device)
    for part in tiles(rows, columns, values.dtype):
        rounded = dequantize(parts, part.start, part.stop - part.start, columns, values.dtype)
        apart += torch.linalg.vector_norm(rounded.sub_(values[part]), dtype=torch.float64).square()
        size += torch.linalg.vector_norm(values[part], dtype=torch.float64).square()
    return QuantizedTensor(parts, tuple(values.shape), weight.dtype), float((apart / size.clamp(min=1e-300)).sqrt())


def storage_bytes(shape: tuple[int, int], storage: str | None, dtype: torch.dtype) -> int:
    """The bytes of a weight of ``shape`` in ``storage``; None is dense, in ``dtype``."""
    if storage is None:
        return math.prod(shape) * dtype.itemsize
    _check_layout(tuple(shape), storage)
    return sum(math.prod(size) * kind.itemsize for size, kind in _part_shapes(*shape, storage))


def _part_shapes(rows: int, columns: int, storage: str) -> list[tuple[tuple[int, ...], torch.dtype]]:
    if storage == "int8":
        return [((rows, columns), torch.int8), ((rows,), torch.float32)]
    blocks = -(-rows * columns // BLOCK)
    return [
        ((-(-rows * columns // 2),), torch.uint8),
        ((blocks,), torch.uint8),
        ((-(-blocks // SUPERBLOCK),), torch.float32),
        ((1,), torch.float32),
    ]


def _check_layout(shape: tuple[int, ...], storage: str) -> None:
    if storage not in STORAGES:
        raise InputError(f"quantize: storage is {storage!r}: expected {' or '.join(STORAGES)}")
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"quantize: shape is {shape}: expected (rows, columns) of at least 1")
    if storage == "nf4" and 1 in shape and math.prod(shape) % 2:
        raise InputError(f"quantize: shape is {shape}: expected an even number of values for nf4 in one row or column")


# ---- parts ----------------------------------------------------------------------------------------------------------


def parts_of(weight: Tensor) -> list[Tensor]:
    """The plain tensors that hold ``weight``: itself, for a dense one."""
    return weight.parts() if isinstance(weight, QuantizedTensor) else [weight]


def is_quantized(parts: list[Tensor]) -> bool:
    return len(parts) > 1


def split_parts(flat: list[Tensor]) -> list[list[Tensor]]:
    """The parts of several weights, one after the other in ``flat``, by weight."""
    groups, first = [], 0
    while first < len(flat):
        size = _PART_COUNTS.get(flat[first].dtype, 1)
        groups.append(flat[first : first + size])
        first += size
    return groups


def parts_in(flat: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """``flat`` with dense weights cast to ``dtype``; quantized ones are cast tile by tile."""
    if all(part.dtype == dtype for part in flat):
        return flat
    return [part.to(dtype) if len(parts) == 1 else part for parts in split_parts(flat) for part in parts]


def out_features(parts: list[Tensor], columns: int) -> int:
    """N of a weight (N, ``columns``)."""
    return parts[0].shape[0] if parts[0].dim() == 2 else 2 * parts[0].shape[0] // columns


def in_features(parts: list[Tensor], rows: int) -> int:
    """K of a weight (``rows``, K)."""
    return parts[0].shape[1] if parts[0].dim() == 2 else 2 * parts[0].shape[0] // rows


def row_blocks(parts: list[Tensor], rows: int, columns: int, most: int) -> Iterator[slice]:
    """The rows of a quantized weight (rows, columns) in blocks of about ``most``, cut where ``part_rows`` can cut."""
    step = 1 if len(parts) == 2 else BLOCK * SUPERBLOCK // math.gcd(BLOCK * SUPERBLOCK, columns)
    # In NF4 the length of a single odd row is not known from its bytes: odd ones stay together.
    size = rows if len(parts) > 2 and columns % 2 else max(step, most // step * step)
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


def part_rows(parts: list[Tensor], rows: slice, columns: int) -> list[Tensor]:
    """The parts of one of the blocks that ``row_blocks`` gives: views."""
    if len(parts) == 2:
        return [part[rows] for part in parts]
    first, last = rows.start * columns, rows.stop * columns
    values = (2, BLOCK, BLOCK * SUPERBLOCK)  # of the weight, in one element of each part
    return [*(part[first // n : -(-last // n)] for part, n in zip(parts[:3], values, strict=True)), parts[3]]


# ---- products -------------------------------------------------------------------------------------------------------


def project(rows: Tensor, parts: list[Tensor], bias: Tensor | None = None, backend: str = "") -> Tensor:
    """rows (tokens, K) Wᵀ + bias (N,), for W in any storage; a dense W and the bias have the dtype of rows."""
    if not is_quantized(parts):
        return F.linear(rows, parts[0], bias)
    return dispatch("quantized_project", rows.device, backend, rows.dtype)(rows.contiguous(), parts, bias)


def project_back(rows: Tensor, parts: list[Tensor], backend: str = "") -> Tensor:
    """rows (tokens, N) W, for W in any storage; a dense W has the dtype of rows."""
    if not is_quantized(parts):
        return rows @ parts[0]
    return dispatch("quantized_project_back", rows.device, backend, rows.dtype)(rows.contiguous(), parts)


def dequantize(parts: list[Tensor], first_row: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows ``first_row`` and on, (rows, columns), of a quantized weight with ``columns`` columns."""
    return dispatch("dequantize", parts[0].device, active(), dtype)(parts, first_row, rows, columns, dtype)


def quantized_embedding(ids: Tensor, weight: QuantizedTensor) -> Tensor:
    """The rows ``ids`` (...) of ``weight`` (N, K): (..., K) in the weight's dtype.

    Raises InputError: ids that are no integers, another device, a weight that is not quantized. IndexError on the CPU
    for an id that is no row.
    """
    if not isinstance(weight, QuantizedTensor):
        raise InputError("quantized_embedding: weight is dense: expected a quantized one (or use F.embedding)")
    if ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"quantized_embedding: ids has dtype {ids.dtype}: expected torch.int64 or torch.int32")
    if ids.device != weight.device:
        raise InputError(f"quantized_embedding: ids is on {ids.device}: expected the device of weight, {weight.device}")
    return torch.ops.petl.quantized_embedding(ids, weight.parts(), weight.shape[1], weight.dtype, active())


def tiles(rows: int, columns: int, dtype: torch.dtype) -> Iterator[slice]:
    """The rows of a (rows, columns) weight in tiles of at most TILE_BYTES in ``dtype``, but one row at least."""
    size = max(1, TILE_BYTES // (columns * dtype.itemsize))
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


# ---- the reference --------------------------------------------------------------------------------------------------


@register("quantize_int8", "reference")
def reference_quantize_int8(weight: Tensor) -> list[Tensor]:
    data = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for part in tiles(*weight.shape, torch.float32):
        values = weight[part].float()
        largest = values.abs().amax(1)
        scale[part] = torch.where(largest == 0, 1.0, largest / 127)
        data[part] = (values / scale[part, None]).round()
    return [data, scale]


@register("quantize_nf4", "reference")
def reference_quantize_nf4(weight: Tensor) -> list[Tensor]:
    flat = weight.reshape(-1)
    data = torch.empty(-(-flat.shape[0] // 2), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-flat.shape[0] // BLOCK), dtype=torch.float32, device=flat.device)
    thresholds = table(NF4_THRESHOLDS, flat.device)
    for part in tiles(absmax.shape[0], BLOCK, torch.float32):
        blocks = _in_blocks(flat[part.start * BLOCK : part.stop * BLOCK], BLOCK)
        absmax[part] = blocks.abs().amax(1)
        nibbles = torch.bucketize(_over(blocks, absmax[part]), thresholds, out_int32=True).view(-1, 2)
        packed = (nibbles[:, 0] << 4 | nibbles[:, 1]).to(torch.uint8)
        data[part.start * BLOCK // 2 : part.stop * BLOCK // 2] = packed[: data.shape[0] - part.start * BLOCK // 2]
    return [data, *_quantize_absmax(absmax)]


def _quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # fp64, so that the order of the sum is nobody's business
    offset = absmax.mean(0, keepdim=True, dtype=torch.float64).float()
    blocks = _in_blocks(absmax - offset, SUPERBLOCK)
    scale = blocks.abs().amax(1)
    entries = dynamic_map(absmax.device)
    middles = (entries[:-1] + entries[1:]) / 2
    indices = torch.bucketize(_over(blocks, scale), middles, out_int32=True)
    return indices.view(-1)[: absmax.shape[0]].to(torch.uint8), scale, offset


def _in_blocks(flat: Tensor, size: int) -> Tensor:
    """(blocks, size) in fp32, with zeros after the end."""
    return F.pad(flat.float(), (0, -flat.shape[0] % size)).view(-1, size)


def _over(blocks: Tensor, largest: Tensor) -> Tensor:
    """blocks / largest, and 0 where a block is all zeros."""
    return blocks / torch.where(largest == 0, 1.0, largest).unsqueeze(1)


@register("dequantize", "reference")
def reference_dequantize(parts: list[Tensor], first_row: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    last_row = first_row + rows
    if len(parts) == 2:
        data, scale = (part[first_row:last_row] for part in parts)
        return (data.float() * scale.unsqueeze(1)).to(dtype)
    index = torch.arange(first_row * columns, last_row * columns, device=parts[0].device)
    return _nf4_values(parts, index).view(rows, columns).to(dtype)


def _nf4_values(parts: list[Tensor], index: Tensor) -> Tensor:
    """The values at ``index`` of the flattened weight, in fp32."""
    data, absmax, scale, offset = parts
    code = table(NF4_CODE, data.device)
    byte = data[index // 2]
    nibble = torch.where(index % 2 == 0, byte >> 4, byte & 15).int()
    block = index // BLOCK
    largest = dynamic_map(data.device)[absmax[block].int()] * scale[block // SUPERBLOCK] + offset
    return code[nibble] * largest


@register("quantized_project", "reference")
def reference_project(rows: Tensor, parts: list[Tensor], bias: Tensor | None) -> Tensor:
    columns = rows.shape[1]
    words = out_features(parts, columns)
    y = rows.new_empty(rows.shape[0], words)
    for part in tiles(words, columns, rows.dtype):
        tile = reference_dequantize(parts, part.start, part.stop - part.start, columns, rows.dtype)
        if bias is None:
            torch.mm(rows, tile.T, out=y[:, part])
        else:
            torch.addmm(bias[part], rows, tile.T, out=y[:, part])
    return y


@register("quantized_project_back", "reference")
def reference_project_back(rows: Tensor, parts: list[Tensor]) -> Tensor:
    words = rows.shape[1]
    columns = in_features(parts, words)
    total = rows.new_zeros(rows.shape[0], columns, dtype=accumulate_dtype(rows.dtype))
    for part in tiles(words, columns, rows.dtype):
        total += rows[:, part] @ reference_dequantize(parts, part.start, part.stop - part.start, columns, rows.dtype)
    return total.to(rows.dtype)


@register("quantized_embedding", "reference")
def reference_embedding(ids: Tensor, parts: list[Tensor], columns: int, dtype: torch.dtype) -> Tensor:
    ids = ids.reshape(-1).long()
    if not ids.is_cuda and ids.numel() and not 0 <= ids.min() <= ids.max() < out_features(parts, columns):
        raise IndexError("index out of range in self")  # as F.embedding says it
    y = torch.empty(ids.shape[0], columns, dtype=dtype, device=ids.device)
    for part in tiles(ids.shape[0], columns, torch.int64):
        if len(parts) == 2:
            data, scale = parts
            y[part] = data[ids[part]].float() * scale[ids[part], None]
        else:
            y[part] = _nf4_values(parts, ids[part, None] * columns + torch.arange(columns, device=ids.device))
    return y


def _embedding_kernel(ids, weight, columns, dtype, backend):
    y = dispatch("quantized_embedding", ids.device, backend, dtype)(ids, weight, columns, dtype)
    return y.view(*ids.shape, columns)


def _embedding_fake(ids, weight, columns, dtype, backend):
    return weight[0].new_empty(*ids.shape, columns, dtype=dtype)


define(
    "quantized_embedding",
    "(Tensor ids, Tensor[] weight, int columns, ScalarType dtype, str backend) -> Tensor",
    _embedding_kernel,
    _embedding_fake,
)
