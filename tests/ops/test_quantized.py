from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F

from petl_kernels import dispatch, ops, parity
from petl_kernels.errors import InputError
from petl_kernels.ops import quantized as op
from petl_kernels.ops.quantized import QuantizedTensor, parts_of, quantize, storage_bytes

from . import contract

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SHAPES = [(2, 1), (1, 64), (3, 5), (17, 129), (40, 72), (129, 64), (300, 130)]
on_backends = pytest.mark.parametrize("backend", contract.BACKENDS)
held = pytest.mark.parametrize("backend", contract.HELD)
storages = pytest.mark.parametrize("storage", op.STORAGES)


def kernel(name: str, backend: str):
    return dispatch.kernel_of(name, backend) or dispatch.kernel_of(name, "reference")


def empty_quantized(shape: tuple[int, int], storage: str, dtype: torch.dtype, device: str = "cpu") -> QuantizedTensor:
    """A weight with memory and no values."""
    parts = [torch.empty(size, dtype=kind, device=device) for size, kind in op.part_shapes(shape, storage)]
    return QuantizedTensor(parts, shape, dtype)


def weight_of(shape=(40, 72), dtype=FP32, seed=0) -> torch.Tensor:
    return contract.source(dtype, seed)(*shape)


# ---- values ---------------------------------------------------------------------------------------------------------


@on_backends
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_off_by_half_a_step_at_most(backend, dtype, shape):
    weight = weight_of(shape, dtype)
    weight[0] = 0
    data, scale = kernel("quantize_int8", backend)(weight)
    assert data.dtype == torch.int8 and data.shape == shape and scale.dtype == FP32 and scale[0] == 1
    assert torch.equal(scale[1:], weight[1:].float().abs().amax(1) / 127)
    made = kernel("dequantize", backend)([data, scale], 0, *shape, FP32)
    assert ((made - weight.float()).abs() <= scale[:, None] * (0.5 + 1e-5)).all()
    assert not made[0].any()


def absmax_of(weight: torch.Tensor) -> torch.Tensor:
    return F.pad(weight.float().flatten(), (0, -weight.numel() % 64)).view(-1, 64).abs().amax(1)


@on_backends
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_is_off_by_half_a_gap_at_most(backend, dtype, shape):
    weight = weight_of(shape, dtype)
    weight.view(-1)[64:128] = 0
    data, absmax, scale, offset = parts = kernel("quantize_nf4", backend)(weight)
    assert data.shape == (-(-weight.numel() // 2),) and absmax.shape == (-(-weight.numel() // 64),)
    assert scale.shape == (-(-absmax.shape[0] // 256),) and offset.shape == (1,)
    assert {part.dtype for part in parts} == {torch.uint8, FP32}
    exact = absmax_of(weight)
    held = op.dynamic_map(torch.device("cpu"))[absmax.int()] * scale.repeat_interleave(256)[: absmax.shape[0]] + offset
    gap = op.dynamic_map(torch.device("cpu")).diff().max()
    assert ((held - exact).abs() <= scale.repeat_interleave(256)[: absmax.shape[0]] * gap / 2 + 1e-6).all()
    made = kernel("dequantize", backend)(parts, 0, *shape, FP32).flatten()
    widest = torch.tensor(op.NF4_CODE).diff().max()
    bound = exact * widest / 2 + (held - exact).abs()
    off = (made - weight.float().flatten()).abs()
    assert (off <= bound.repeat_interleave(64)[: off.shape[0]] * (1 + 1e-5) + 1e-7).all()
    assert not made[64:128].any()


@pytest.mark.parametrize("backend", contract.BACKENDS[1:])
def test_values_at_a_threshold_have_the_code_of_the_reference(backend):
    """The first threshold is halfway between two floats: it has to be rounded to the same one in both languages."""
    thresholds = torch.tensor(op.NF4_THRESHOLDS)
    below, above = (thresholds.nextafter(torch.tensor(end)) for end in (-torch.inf, torch.inf))
    block = torch.cat([thresholds, below, above, torch.ones(19)]).view(1, 64)
    codes = [dispatch.kernel_of("quantize_nf4", name)(block)[0] for name in ("reference", backend)]
    assert torch.equal(*codes)


def test_the_code_book_is_the_published_one():
    code, thresholds = torch.tensor(op.NF4_CODE, dtype=FP64), torch.tensor(op.NF4_THRESHOLDS, dtype=FP64)
    assert len(code) == 16 and code[0] == -1 and code[7] == 0 and code[15] == 1
    assert ((code[1:] + code[:-1]) / 2 - thresholds).abs().max() < 1e-6
    # QLoRA's construction: quantiles of a normal distribution, 8 above 0 and 7 below, over their largest
    quantile = torch.distributions.Normal(0.0, 1.0).icdf
    above = quantile(torch.linspace(0.9677083, 0.5, 9, dtype=FP64)[:-1])
    below = -quantile(torch.linspace(0.9677083, 0.5, 8, dtype=FP64)[:-1])
    built = torch.cat([above, below, torch.zeros(1, dtype=FP64)]).sort().values
    torch.testing.assert_close(built / built.max(), code, rtol=0, atol=1e-5)


def test_the_dynamic_map_is_the_published_one():
    entries = op.dynamic_map(torch.device("cpu"))
    assert entries.shape == (256,) and entries.dtype == FP32 and (entries.diff() > 0).all()
    known = {0: -0.9929687, 1: -0.97890625, 63: -0.10703125, 64: -0.09859375, 127: 0.0, 128: 5.5e-7, 254: 0.9929687}
    for index, value in known.items():
        assert entries[index].item() == pytest.approx(value, rel=1e-5), index
    assert entries[255] == 1


@on_backends
def test_known_bytes(backend):
    """One block: the high four bits come first, and ties follow the thresholds."""
    weight = torch.zeros(1, 6)
    weight[0] = torch.tensor([2.0, -2.0, 0.0, 2 * 0.0796, 2 * -0.6962, 2 * 0.7])
    data, absmax, scale, offset = kernel("quantize_nf4", backend)(weight)
    assert data.tolist() == [0xF0, 0x78, 0x1E]
    assert absmax.tolist() == [127] and scale.tolist() == [0] and offset.tolist() == [2]
    data, scale = kernel("quantize_int8", backend)(torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0]]))
    assert data.tolist() == [[127, 0, 2, -2, -127]] and scale.tolist() == [1]


@on_backends
@storages
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (70, 4096), (1300, 200)], ids=str)
def test_every_backend_has_the_same_bits(backend, storage, dtype, shape):
    weight = weight_of(shape, dtype)
    expected = kernel(f"quantize_{storage}", "reference")(weight)
    parts = kernel(f"quantize_{storage}", backend)(weight)
    for part, other in zip(parts, expected, strict=True):
        assert torch.equal(part, other)
    for first, last in ((0, shape[0]), (shape[0] // 3, shape[0]), (shape[0] - 1, shape[0])):
        arguments = (first, last - first, shape[1], dtype)
        made = kernel("dequantize", backend)(parts, *arguments)
        assert torch.equal(made, kernel("dequantize", "reference")(parts, *arguments))


@storages
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantizing_again_changes_no_code(storage, shape):
    once = quantize(weight_of(shape), storage)
    again = quantize(once.dequantize(FP32), storage)
    assert torch.equal(once.packed, again.packed)
    torch.testing.assert_close(again.dequantize(), once.dequantize(), rtol=1e-2, atol=1e-2)


@on_backends
@storages
@pytest.mark.parametrize("view", ["transposed", "every second column", "expanded"])
def test_weights_of_any_strides(backend, storage, view):
    weight = {
        "transposed": weight_of((72, 40)).T,
        "every second column": weight_of((40, 144))[:, ::2],
        "expanded": weight_of((1, 72)).expand(40, 72),
    }[view]
    parts = kernel(f"quantize_{storage}", backend)(weight)
    for part, other in zip(parts, kernel(f"quantize_{storage}", "reference")(weight.contiguous()), strict=True):
        assert torch.equal(part, other)


# ---- products -------------------------------------------------------------------------------------------------------


@held
@storages
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 3, 17, 129])
@pytest.mark.parametrize(("n", "k", "bias"), [(40, 72, True), (2, 7, True), (131, 129, False), (64, 128, False)])
def test_products(backend, storage, dtype, rows, n, k, bias):
    given = parity.quantized_project_arguments(contract.source(dtype), rows, n, k, storage, bias)
    contract.assert_parity("quantized_project", backend, given)


@on_backends
@storages
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
@pytest.mark.parametrize(("rows", "n", "k"), [(9, 700, 1100), (9, 5000, 300), (1100, 4200, 72)])
def test_products_of_several_tiles(backend, storage, dtype, rows, n, k):
    """Few and many outputs: the tiles of dx are columns of the weight, or rows with sums over them."""
    given = parity.quantized_project_arguments(contract.source(dtype), rows, n, k, storage)
    weight, values = given["weight"].dequantize(dtype).double(), parity.run("quantized_project", backend, given)
    exact = {"y": given["x"].double() @ weight.T + given["bias"].double(), "dx": given["dy"].double() @ weight}
    for name, value in exact.items():
        error = (values[name].double() - value).abs().max()
        assert error <= (1 if dtype == BF16 else 32) * torch.finfo(dtype).eps * value.abs().max(), name


@on_backends
@storages
def test_products_are_the_same_in_every_run(backend, storage):
    given = parity.quantized_project_arguments(contract.source(BF16), 129, 700, 1100, storage)
    contract.assert_deterministic("quantized_project", backend, given, threads=(1, 2))


def test_tiles_are_at_most_a_mebibyte():
    for columns, dtype in ((1024, FP32), (4096, BF16), (130, FP64)):
        parts = list(op.tiles(5000, columns, dtype))
        assert max(part.stop - part.start for part in parts) * columns * dtype.itemsize <= 1 << 20
        assert parts[0].start == 0 and parts[-1].stop == 5000
    assert len(list(op.tiles(3, 1 << 21, FP32))) == 3


@on_backends
@storages
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("shape", [(33, 75), (33, 128), (7, 66)], ids=str)
def test_embedding(backend, storage, dtype, shape):
    weight = quantize(weight_of(shape, dtype), storage)
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(0, shape[0], (4, 5), generator=draw)
    with ops.use(backend):
        for chosen in (ids, ids.int(), ids.T, ids[:0], ids[0, 0]):
            y = F.embedding(chosen, weight, padding_idx=1)
            assert y.dtype == dtype and torch.equal(y, weight.dequantize()[chosen.long()])
        for wrong in (-1, shape[0]):
            with pytest.raises(IndexError, match="index out of range"):
                F.embedding(torch.tensor([0, wrong]), weight)


def test_embedding_opcheck():
    for storage in op.STORAGES:
        weight = quantize(weight_of((9, 66)), storage)
        ids = torch.tensor([[1, 8], [0, 3]])
        contract.opcheck(torch.ops.petl.quantized_embedding.default, (ids, weight.parts(), 66, BF16))


# ---- the tensor -----------------------------------------------------------------------------------------------------


def parameter_of(storage: str, shape=(40, 72), dtype=FP32) -> nn.Parameter:
    return nn.Parameter(quantize(weight_of(shape, dtype), storage), requires_grad=False)


def linear_of(storage: str, **options) -> nn.Linear:
    layer = nn.Linear(72, 40).requires_grad_(False)
    layer.weight = parameter_of(storage, **options)
    return layer


@storages
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_it_looks_like_the_weight_that_it_stands_for(storage, dtype):
    weight = parameter_of(storage, dtype=dtype)
    assert isinstance(weight, nn.Parameter) and isinstance(weight, QuantizedTensor)
    assert weight.shape == (40, 72) and weight.dtype == dtype and weight.device.type == "cpu"
    assert weight.numel() == 2880 and weight.is_floating_point() and not weight.requires_grad
    assert weight.storage == storage and storage in repr(weight)
    assert weight.dequantize().dtype == dtype and weight.dequantize(FP64).dtype == FP64
    dense = weight_of()
    assert parts_of(dense)[0] is dense and len(parts_of(weight)) == {"int8": 2, "nf4": 4}[storage]


@on_backends
@storages
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
def test_a_linear_layer(backend, storage, dtype):
    layer = linear_of(storage)
    bias = nn.Parameter(layer.bias.detach().to(dtype))
    layer.bias = bias
    draw = contract.source(dtype)
    leaves, dy = {"x": draw(2, 3, 72), "bias": bias.detach()}, draw(2, 3, 40)
    dense = layer.weight.dequantize(dtype).double()
    with ops.use(backend):
        found = contract.gradients(lambda x, bias: F.linear(x, layer.weight, bias), leaves, dy)
    wide = {name: leaf.double() for name, leaf in leaves.items()}
    exact = contract.gradients(lambda x, bias: F.linear(x, dense, bias), wide, dy.double())
    contract.assert_close_by_name(found, exact, 8 * torch.finfo(dtype).eps)
    assert {value.dtype for value in found.values()} == {dtype}
    torch.testing.assert_close(layer(leaves["x"]), found["y"])


@storages
def test_autocast_follows_linear(storage):
    layer = linear_of(storage)
    x = weight_of((9, 72)).requires_grad_()
    with torch.autocast("cpu", BF16):
        y, plain = layer(x), F.linear(x, layer.weight.dequantize(), layer.bias)
    assert y.dtype == BF16
    torch.testing.assert_close(y, plain, rtol=0.02, atol=0.05)
    assert torch.autograd.grad(y.float().sum(), x)[0].dtype == FP32


@storages
def test_it_saves_nothing(storage):
    layer = linear_of(storage)
    x = weight_of((9, 72)).requires_grad_()
    assert contract.bytes_saved(lambda: layer(x), [layer.weight, layer.bias]) == 0


@storages
def test_compiles_to_one_graph(storage):
    layer, table = linear_of(storage), parameter_of(storage, shape=(9, 72))
    ids = torch.tensor([1, 8, 3])
    contract.assert_compiles(lambda x: layer(x + F.embedding(ids, table)).relu(), weight_of((3, 72)))


@storages
def test_copies_and_files(storage):
    layer = linear_of(storage, dtype=BF16)
    dense = layer.weight.dequantize()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert isinstance(other.weight, nn.Parameter) and other.weight.storage == storage
        assert torch.equal(other.weight.dequantize(), dense) and other.weight.dtype == BF16
        assert other.weight.packed.data_ptr() != layer.weight.packed.data_ptr()
    assert layer.weight.detach().packed is layer.weight.packed
    assert torch.equal(layer.weight.clone().dequantize(), dense)


@storages
def test_state_dict(storage):
    layer, other = linear_of(storage), linear_of(storage)
    other.weight = nn.Parameter(empty_quantized((40, 72), storage, FP32), requires_grad=False)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight.dequantize(), layer.weight.dequantize())
    assert other.weight.packed.data_ptr() != layer.weight.packed.data_ptr()


@storages
def test_exchanging_the_data_of_a_parameter(storage):
    layer, other = linear_of(storage), quantize(weight_of(seed=1), storage)
    weight = layer.weight
    weight.data = other.to(BF16)
    assert layer.weight is weight and weight.dtype == BF16 and isinstance(weight, nn.Parameter)
    assert torch.equal(weight.dequantize(FP32), other.dequantize())
    for wrong in (weight_of(), other.to("meta")):
        with pytest.raises(InputError, match="data of a quantized weight: expected another .* on the same device"):
            weight.data = wrong


@storages
def test_moving_a_model_keeps_its_ties(storage):
    embedding, head = nn.Embedding(40, 72), nn.Linear(72, 40, bias=False)
    embedding.weight = head.weight = parameter_of(storage)
    model = nn.ModuleList([embedding, head])
    values = head.weight.dequantize()
    model.to(BF16)
    assert embedding.weight is head.weight and head.weight.dtype == BF16 and isinstance(head.weight, nn.Parameter)
    assert torch.equal(head.weight.dequantize(FP32), values)
    assert embedding(torch.tensor([3])).dtype == BF16 and len(list(model.parameters())) == 1
    twin = copy.deepcopy(model)
    assert twin[0].weight is twin[1].weight and twin[0].weight is not embedding.weight
    model.to("meta")
    assert embedding.weight is head.weight and head.weight.is_meta and head.weight.packed.is_meta


@storages
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_bytes_without_making_it(storage, shape, dtype):
    weight = quantize(weight_of(shape, dtype), storage)
    size = sum(part.numel() * part.element_size() for part in weight.parts())
    assert storage_bytes(shape, storage, dtype) == size
    assert storage_bytes(shape, None, dtype) == weight.numel() * dtype.itemsize
    empty = empty_quantized(shape, storage, dtype)
    assert [(part.shape, part.dtype) for part in empty.parts()] == [(part.shape, part.dtype) for part in weight.parts()]


def test_bytes_of_large_weights():
    assert storage_bytes((1024, 1024), "int8", BF16) == 2**20 + 4096
    assert storage_bytes((1024, 1024), "nf4", BF16) == 2**19 + 2**14 + 4 * 64 + 4


@storages
def test_without_memory(storage):
    on_meta = empty_quantized((40, 72), storage, BF16, "meta")
    assert on_meta.is_meta and on_meta.parts()[0].is_meta
    assert quantize(torch.empty(40, 72, device="meta"), storage).shape == (40, 72)
    x = torch.empty(2, 3, 72, device="meta")
    assert F.linear(x, on_meta).shape == (2, 3, 40)
    with FakeTensorMode() as mode:
        fake = empty_quantized((40, 72), storage, FP32)
        dense = torch.empty(40, 72)
        assert quantize(dense, storage).shape == (40, 72)
        assert F.linear(torch.empty(5, 72), fake).shape == (5, 40)
        assert F.embedding(torch.zeros(2, 3, dtype=torch.int64), fake).shape == (2, 3, 72)
    assert isinstance(quantize(dense, storage).packed, FakeTensor)
    real = quantize(weight_of(), storage)
    converted = mode.from_tensor(real)
    assert isinstance(converted, QuantizedTensor) and converted.shape == real.shape


@pytest.mark.parametrize("state", [torch.inference_mode, torch._C._AutoDispatchBelowAutograd, torch.no_grad])
@storages
def test_it_changes_dtype_and_device_below_autograd_too(storage, state):
    """There PyTorch hands over ``to`` itself, not what it is made of."""
    weight = quantize(weight_of(), storage)
    changes = {
        FP64: lambda w: w.double(),
        FP16: lambda w: w.half(),
        BF16: lambda w: w.to(BF16),
        FP32: lambda w: w.to("cpu", FP32),
    }
    with state():
        for dtype, change in changes.items():
            changed = change(weight)
            assert isinstance(changed, QuantizedTensor) and changed.dtype == dtype
            assert all(map(torch.equal, changed.parts(), weight.parts()))
        assert weight.to("meta").is_meta and weight.to(torch.empty(1, dtype=FP64)).dtype == FP64
        assert weight.cpu() is weight and weight.to(FP32, copy=True).packed is not weight.packed
        for refused, name in (
            (lambda: weight + 1, "add"),
            (lambda: weight.T, "permute|numpy_T|t"),
            (weight.mean, "mean"),
        ):
            with pytest.raises(InputError, match=rf"aten.({name}) of a quantized weight: expected F.linear"):
                refused()
        with pytest.raises(InputError, match="to torch.int32 of a quantized weight: expected a floating-point dtype"):
            weight.int()


OTHER_DEFAULTS = """
import sys, torch
torch.set_default_dtype(getattr(torch, sys.argv[1]))
from petl_kernels import ops, parity
for backend in ops.available_backends():
    for op in ("quantize_nf4", "dequantize", "quantized_project", "quantized_embedding"):
        error = parity.check(op, backend, "cpu", torch.float32)
        assert error is None, (backend, op, error)
torch.set_default_dtype(torch.float32)
weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
parts = ops.quantized.quantize(weight, "nf4").parts()
print([part.double().sum().item() for part in parts])
"""


@pytest.mark.parametrize("kind", ["bfloat16", pytest.param("float64", marks=pytest.mark.repeat)])
@pytest.mark.slow
def test_tables_are_those_of_fp32_whatever_the_default_dtype_is_when_they_are_made(kind):
    """transformers sets it while it loads a model. The tables are made once a process."""
    parts = quantize(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), "nf4").parts()
    run = subprocess.run([sys.executable, "-c", OTHER_DEFAULTS, kind], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{[part.double().sum().item() for part in parts]}\n"


# ---- wrong input ----------------------------------------------------------------------------------------------------


@storages
@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda w: w + 1, "aten.add of a quantized weight: expected F.linear"),
        (lambda w: w.T, "aten.permute of a quantized weight"),
        (lambda w: w[0], "aten.select of a quantized weight"),
        (lambda w: torch.ones(3, 40) @ w, "aten.mm of a quantized weight"),
        (lambda w: w.to(torch.int32), "to torch.int32 of a quantized weight: expected a floating-point dtype"),
        (lambda w: w.requires_grad_(), r"QuantizedTensor\(\(40, 72\), .* requires grad: a quantized weight is frozen"),
        (lambda w: setattr(w, "requires_grad", True), "requires grad: a quantized weight is frozen"),
        (lambda w: w.copy_(torch.ones(40, 72)), "copy of .* expected the same storage and shape"),
        (lambda w: torch.ones(40, 72).copy_(w), "aten.copy_ of a quantized weight"),
        (lambda w: quantize(w, "int8"), "weight is .* already: expected a dense one"),
        (lambda w: F.embedding(torch.tensor([0]), w, max_norm=1.0), "embedding: max_norm is 1.0: expected None"),
        (lambda w: ops.quantized_embedding(torch.ones(2), w), "ids has dtype torch.float32: expected torch.int64"),
        (lambda w: ops.quantized_embedding(torch.ones(2, device="meta").long(), w), "ids is on meta"),
        (lambda w: F.linear(torch.ones(3, 40), w), r"weight has shape \(40, 72\): expected \(out, 40\)"),
        (lambda w: F.linear(torch.ones(3, 72, device="meta"), w), "weight is on cpu: expected the device of x, meta"),
    ],
)
def test_refuses(storage, use, message):
    with pytest.raises(InputError, match=message) as error:
        use(quantize(weight_of(), storage))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("weight", "storage", "message"),
    [
        (torch.ones(4), "int8", r"weight is torch.float32 of shape \(4,\): expected a floating-point matrix"),
        (torch.ones(4, 4).int(), "nf4", "weight is torch.int32 of shape"),
        ("w", "nf4", "weight is 'w': expected"),
        (torch.ones(4, 4), "fp8", "storage is 'fp8': expected int8 or nf4"),
        (torch.ones(4, 4).requires_grad_(), "int8", "weight requires grad: expected a frozen weight"),
        (torch.tensor([[1.0, float("nan")]]), "int8", "weight holds inf or nan"),
        (torch.tensor([[1.0, float("inf")]]), "nf4", "weight holds inf or nan"),
        (torch.ones(0, 4), "int8", r"shape is \(0, 4\): expected \(rows, columns\) of at least 1"),
        (torch.ones(1, 7), "nf4", r"shape is \(1, 7\): expected an even number of values for nf4"),
    ],
)
def test_refuses_to_quantize(weight, storage, message):
    with pytest.raises(InputError, match=message) as error:
        quantize(weight, storage)
    assert "\n" not in str(error.value)


# ---- the ops over quantized weights ---------------------------------------------------------------------------------

MIXED = ("nf4", None, "int8")  # storages of a group; None is dense


def weight_in(storage: str | None, draw: parity.Source, n: int, k: int):
    dense = draw(n, k, std=k**-0.5)
    return dense if storage is None else quantize(dense, storage)


def lora_arguments(dtype, storages=MIXED, k=72, **options) -> dict:
    draw, ns = contract.source(dtype), (40, 33, 56)[: len(storages)]
    given = parity.lora_linear_arguments(draw, (2, 17), ns, k, (4, 1, 7)[: len(storages)], **options)
    return given | {"weights": [weight_in(s, draw, n, k) for s, n in zip(storages, ns, strict=True)]}


def ffn_arguments(dtype, storages=MIXED, d=24, f=43, **options) -> dict:
    draw = contract.source(dtype)
    given = parity.frozen_ffn_arguments(draw, (3, 11), d, f, **options)
    first, second, third = (
        weight_in(s, draw, *size) for s, size in zip(storages, ((f, d), (d, f), (f, d)), strict=True)
    )
    return given | {"w1": first, "w2": second, "gate": third if given["gate"] is not None else None}


def loss_arguments(dtype, storage, d=64, words=1100, **options) -> dict:
    given = parity.linear_cross_entropy_arguments(contract.source(dtype), (3, 5), d, words, **options)
    return given | {"weight": quantize(given["weight"], storage)}


@held
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("k", [72, 131])
def test_lora_linear(backend, dtype, dropout, k):
    contract.assert_parity("lora_linear", backend, lora_arguments(dtype, k=k, dropout=dropout))


@held
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize(("activation", "gated", "recompute"), [("relu", False, False), ("silu", True, True)])
@pytest.mark.parametrize("storages", [MIXED, ("int8", "nf4", "nf4")], ids=str)
def test_frozen_ffn(backend, dtype, activation, gated, recompute, storages):
    options = {"activation": activation, "gated": gated, "recompute": recompute}
    contract.assert_parity("frozen_ffn", backend, ffn_arguments(dtype, storages, **options))


@held
@storages
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 33])
def test_linear_cross_entropy(backend, storage, dtype, d):
    contract.assert_parity("linear_cross_entropy", backend, loss_arguments(dtype, storage, d))


@storages
@pytest.mark.parametrize("columns", [64, 96, 100, 33, 1])
def test_blocks_of_rows_are_views(storage, columns):
    rows = 1700 if columns > 1 else 40000
    weight = quantize(weight_of((rows, columns)), storage)
    dense, seen = weight.dequantize(), 0
    for part in op.row_blocks(weight.parts(), rows, columns, 7):
        cut = op.part_rows(weight.parts(), part, columns)
        assert part.start == seen and cut[0].untyped_storage().data_ptr() == weight.packed.untyped_storage().data_ptr()
        count = part.stop - part.start
        assert op.out_features(cut, columns) == count and op.in_features(cut, count) == columns
        made = op.dequantize(cut, 0, count, columns, FP32)
        assert torch.equal(made, dense[part])
        seen = part.stop
    assert seen == rows


def test_the_loss_multiplies_block_by_block():
    given = loss_arguments(FP32, "nf4", d=64, words=1100, chunk_rows=1)
    blocks = list(op.row_blocks(parts_of(given["weight"]), 1100, 64, given["chunk_bytes"] // 4 // 256))
    assert len(blocks) > 1 and blocks[0].stop == 256


def leaves_of(dtype) -> dict:
    draw = contract.source(dtype)
    names = {"x": draw(2, 3, 72), "a": draw(4, 72), "b": draw(40, 4), "bias": draw(40)}
    return {name: leaf.requires_grad_() for name, leaf in names.items()}


@storages
def test_saved_bytes_are_those_of_a_dense_weight(storage):
    draw = contract.source(BF16)
    weight, w1, w2 = (quantize(draw(*size), storage) for size in ((40, 72), (96, 72), (72, 96)))
    leaves = leaves_of(BF16)
    fixed = [weight, w1, w2, *leaves.values()]
    x, a, b, bias = leaves.values()
    kept = contract.bytes_saved(lambda: ops.lora_linear(x, weight, bias, a, b, 2.0), fixed)
    assert kept == 6 * 4 * 2
    kept = contract.bytes_saved(lambda: ops.frozen_ffn(x, w1, None, w2, None), fixed)
    assert kept == 6 * 12
    words, labels = quantize(draw(99, 72), storage), torch.zeros(2, 3, dtype=torch.int64)
    kept = contract.bytes_saved(lambda: ops.linear_cross_entropy(x, words, labels), [words, *fixed])
    assert kept == 6 * 72 * 2 + 4


def test_opcheck_of_the_ops():
    parts = {storage: quantize(weight_of((6, 8)), storage).parts() for storage in op.STORAGES}
    draw = contract.source(FP32)
    x, bias = draw(3, 8).requires_grad_(), draw(6).requires_grad_()
    petl = torch.ops.petl
    for own in parts.values():
        contract.opcheck(petl.frozen_linear.default, (x, own, bias))
        contract.opcheck(petl.frozen_linear_backward.default, (draw(3, 6), own, True, True))
    a, b = [draw(2, 8).requires_grad_()] * 2, [draw(6, 2).requires_grad_()] * 2
    flat = [*parts["nf4"], *parts["int8"]]
    contract.opcheck(petl.lora_linear.default, (x, flat, [bias, draw(6)], a, b, [2.0, 1.0], 0.0, None))
    w2 = quantize(weight_of((8, 6)), "nf4").parts()
    contract.opcheck(petl.frozen_ffn.default, (x, parts["int8"], bias, w2, None, [], "relu", "bits"))
    contract.opcheck(petl.frozen_ffn.default, (x, parts["nf4"], None, w2, None, parts["int8"], "gelu", "x"))
    labels, options = torch.tensor([0, 5, 2]), (0.1, "uniform", 1.0, -100, 1024, -1, 0.0, "mean")
    for own in parts.values():
        contract.opcheck(petl.linear_cross_entropy.default, (x, own, labels, None, *options, True, False, False))


@storages
def test_the_ops_compile_to_one_graph(storage):
    draw = contract.source(FP32)
    weight, w1, w2, words = (quantize(draw(*size), storage) for size in ((72, 72), (96, 72), (72, 96), (99, 72)))
    labels = torch.tensor([0, 98, 7])

    def function(x, a, b):
        h = ops.frozen_ffn(ops.lora_linear(x, weight, None, a, b, 2.0), w1, None, w2, None, activation="gelu")
        return ops.linear_cross_entropy(h, words, labels)

    contract.assert_compiles(function, draw(3, 72), draw(4, 72), draw(72, 4), tolerance=1e-5)


@storages
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_bias_is_trained_beside_a_quantized_vocabulary(storage, reduction):
    draw = contract.source(FP64)
    weight, labels = quantize(draw(99, 72), storage), torch.tensor([0, 98, 7])
    leaves = {"hidden": draw(3, 72), "bias": draw(99)}
    dloss = draw(3) if reduction == "none" else draw(1)[0]
    dense = weight.dequantize()

    def loss(weight):
        return lambda hidden, bias: ops.linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction)

    found = contract.gradients(loss(weight), leaves, dloss)
    contract.assert_close_by_name(found, contract.gradients(loss(dense), leaves, dloss), 1e-12)


# ---- bitsandbytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_nf4_is_that_of_bitsandbytes(dtype):
    """Both have the same nibbles. Some absmaxes may be one entry of the map apart: between two entries its CPU code
    does not always take the nearer one."""
    functional = pytest.importorskip("bitsandbytes").functional
    weight = (torch.randn(256, 192, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = quantize(weight, "nf4")
    assert torch.equal(packed.flatten(), ours.packed)
    apart = (state.absmax.int() - ours.absmax.int()).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 0.01
    torch.testing.assert_close(state.state2.absmax, ours.absmax_scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(state.offset, ours.absmax_offset[0], rtol=1e-6, atol=0)
    found = ours.dequantize().float()
    torch.testing.assert_close(found, functional.dequantize_4bit(packed, state).float(), rtol=0.02, atol=1e-6)
