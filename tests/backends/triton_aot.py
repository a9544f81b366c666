"""Compile the Triton kernels for cards that need not be here, exactly as the launcher would.

The backend's own functions run on meta tensors with `launch` replaced, so every signature, alignment and configuration
is the one that ships. `python tests/backends/triton_aot.py own CARD...` prints one JSON line for each compiled launch
that no other card stands for, with the cards that it stands for; `first` of those the first of each kernel, in 16 bits
and in fp32; `shared` those that another card stands for; `all` every launch; `few` those of `FEW` alone. A CARD is one
of CARDS or AMD.
"""

from __future__ import annotations

import functools
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton_races
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from petl_kernels.backends import triton as package
from petl_kernels.backends.triton import (
    activation,
    attention,
    bottleneck_adapter,
    common,
    config,
    dropout_add,
    dropout_add_norm,
    frozen_ffn,
    frozen_linear,
    gated_activation,
    layer_norm,
    linear_cross_entropy,
    lora_border,
    lora_linear,
    loss_by_words,
    quantize,
    quantized,
    rms_norm,
)
from petl_kernels.ops.lora_border import room
from petl_kernels.ops.loss_by_words import Kernels, compute
from petl_kernels.ops.loss_options import ALL_ROWS, LossOptions
from petl_kernels.ops.parallel_ffn import with_room


class Card(NamedTuple):
    kind: str  # its class (petl_kernels/cards.py)
    target: GPUTarget
    processors: int  # of a usual one


CARDS = {
    "sm75": Card("sm75", GPUTarget("cuda", 75, 32), 40),
    "sm80": Card("sm80", GPUTarget("cuda", 80, 32), 108),
    "sm86": Card("small", GPUTarget("cuda", 86, 32), 82),
    "sm89": Card("small", GPUTarget("cuda", 89, 32), 58),
    "sm90": Card("sm90", GPUTarget("cuda", 90, 32), 132),
    "sm100": Card("sm100", GPUTarget("cuda", 100, 32), 148),
    "sm120": Card("small", GPUTarget("cuda", 120, 32), 170),
}
# No kernel is started on these yet; the tiles are those of the smallest CUDA card with matrix instructions.
AMD = {
    "gfx90a": Card("small", GPUTarget("hip", "gfx90a", 64), 104),
    "gfx942": Card("small", GPUTarget("hip", "gfx942", 64), 304),
}
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.int8: "*i8",
}
CUOBJDUMP = Path(triton.__path__[0]) / "backends/nvidia/bin/cuobjdump"


def record(card: str, call: Callable[[], None]) -> list[tuple]:
    """The launches that `call()` makes on a card of this class: (kernel, args, constexprs, options)."""
    launches = []

    def launch(kernel, grid, *args, warps, stages, **constexprs):
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        launches.append((kernel, args, constexprs, options))

    saved = config.device_class, config.processors
    described = (CARDS | AMD)[card]
    config.device_class, config.processors = lambda device: described.kind, lambda device: described.processors
    names = [found.name for found in pkgutil.iter_modules(package.__path__) if found.name != "launch"]
    folder = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    modules = [module for module in folder if hasattr(module, "launch")]
    original = common.launch
    for module in modules:
        module.launch = launch
    try:
        call()
    finally:
        config.device_class, config.processors = saved
        for module in modules:
            module.launch = original
    return launches


def source(kernel, args: tuple, constexprs: dict) -> ASTSource:
    """Describes what Triton's launcher would specialise: alignment to 16, integers equal to 1, absent tensors."""
    constants, attributes = {}, {}

    def describe(path: tuple[int, ...], value, specialise: bool):
        if isinstance(value, tuple):
            return tuple(describe((*path, i), item, specialise) for i, item in enumerate(value))
        if isinstance(value, torch.Tensor):
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
            return POINTERS[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if value is None or (value == 1 and specialise):
            constants[path] = value
            return "constexpr"
        if value % 16 == 0 and specialise:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    signature = {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        signature[name] = describe((i,), value, name != "threshold")
    for name, value in constexprs.items():
        signature[name] = "constexpr"
        constants[(kernel.arg_names.index(name),)] = value
    return ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants, attributes)


def compile_launch(card: str, kernel, args, constexprs, options) -> dict:
    """Returns what the compiler says of one launch, and the audit of it (triton_races.py)."""
    compiled = triton.compile(source(kernel, args, constexprs), target=CARDS[card].target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    counts = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    ptx = compiled.asm["ptx"]
    return {
        "kernel": kernel.__name__,
        "constexprs": constexprs,
        "options": options,
        "registers": int(counts["REG"]),
        "stack": int(counts["STACK"]) + int(counts["LOCAL"]),
        "shared": compiled.metadata.shared,
        "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
        "instructions": {
            name: ptx.count(name)
            for name in ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "cp.async.c", "fma.rn.f32", "fma.rn.f16")
        },
        **triton_races.audit(compiled.asm["ttgir"])._asdict(),
    }


def compile_for_amd(card: str, kernel, args, constexprs, options) -> dict:
    """Returns what the compiler says of one launch on an AMD card; `error`: why it makes no code."""
    report = {"kernel": kernel.__name__, "constexprs": constexprs, "options": options, "error": None}
    try:
        compiled = triton.compile(source(kernel, args, constexprs), target=AMD[card].target, options=options)
    except Exception as error:
        return {**report, "error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    assembly = compiled.asm["amdgcn"]
    spilled = re.findall(r"\.vgpr_spill_count:\s*(\d+)", assembly)
    return {
        **report,
        "stack": 4 * max(map(int, spilled)),
        "shared": compiled.metadata.shared,
        "instructions": {"v_mfma": assembly.count("v_mfma")},
    }


def frozen(dtype: torch.dtype, tokens: int, d: int = 1024) -> None:
    x, weight, bias = (_new(dtype, *shape) for shape in ((tokens, d), (d, d), (d,)))
    frozen_linear.frozen_linear(x, weight, bias)
    frozen_linear.frozen_linear_backward(x, weight, True, True)


def lora(dtype: torch.dtype, groups: int, rank: int, dropout: float, tokens: int = 8192, d: int = 1024) -> None:
    x, dys = _new(dtype, tokens, d), [_new(dtype, tokens, d) for _ in range(groups)]
    weights, biases = [_new(dtype, d, d) for _ in range(groups)], [_new(dtype, d) for _ in range(groups)]
    a, b = ([_new(torch.float32, *shape) for _ in range(groups)] for shape in ((rank, d), (d, rank)))
    rest = ([2.0] * groups, dropout, _new(torch.int64, 1))
    _, s = lora_linear.lora_linear(x, weights, biases, a, b, *rest)
    lora_linear.lora_linear_backward(dys, x, s, weights, a, b, *rest, True, [True] * groups)


def border(dtype: torch.dtype, ranks: tuple[int, ...], dbias: bool = False, tokens: int = 8192, d: int = 1024) -> None:
    """Calls it like a layer whose linears have a bias each."""
    n, r, g = len(ranks) * d, room(sum(ranks)), len(ranks)
    wide, stacked, bias = _new(dtype, tokens, d + r), _new(dtype, n + r, d + r), _new(dtype, n)
    a, b = [_new(torch.float32, each, d) for each in ranks], [_new(torch.float32, d, each) for each in ranks]
    own = a, b, [2.0] * g
    _, s = lora_border.lora_border(wide, stacked, bias, [_new(dtype, d) for _ in ranks], *own)
    x, dys = wide[:, :d], _new(dtype, tokens, n + r)
    lora_border.lora_border_backward(dys, x, s, stacked, *own, True, [dbias] * g)


def adapter(
    dtype: torch.dtype, m: int, norm: bool = True, activation: str = "relu", tokens: int = 8192, d: int = 1024
) -> None:
    x = _new(dtype, tokens, d)
    down, down_bias, up, bias = (_new(torch.float32, *shape) for shape in ((m, d), (m,), (d, m), (d,)))
    ln = (bias, bias) if norm else (None, None)
    bottleneck_adapter.bottleneck_adapter(x, None, *ln, down, down_bias, up, bias, 1e-5, activation, 1.0)
    bottleneck_adapter.bottleneck_adapter_backward(
        x, x, True, *ln, down, down_bias, up, 1e-5, activation, 1.0, True, True
    )


def norms(
    dtype: torch.dtype, d: int, parameters: torch.dtype, needs: tuple[bool, ...] = (True,) * 3, tokens: int = 8192
) -> None:
    """needs: the gradients of x, the weight and the bias."""
    x, weight = _new(dtype, tokens, d), _new(parameters, d)
    y, mean, rstd = layer_norm.layer_norm(x, weight, weight, 1e-5)
    layer_norm.layer_norm_from_statistics(x, mean, rstd, weight, weight)
    layer_norm.layer_norm_backward(y, x, mean, rstd, weight, *needs)
    y, rstd = rms_norm.rms_norm(x, weight, 1e-6)
    rms_norm.rms_norm_from_statistics(x, rstd, weight)
    rms_norm.rms_norm_backward(y, x, rstd, weight, *needs[:2])


def ffn(dtype: torch.dtype, activation: str, gated: bool, keeps: str, tokens: int = 1024, d: int = 1024) -> None:
    x, w1, w2, c1, c2 = (_new(dtype, *shape) for shape in ((tokens, d), (4 * d, d), (d, 4 * d), (4 * d,), (d,)))
    gate = [w1] if gated else []
    _, z, g = frozen_ffn.frozen_ffn(x, [w1], c1, [w2], c2, gate, activation, keeps)
    frozen_ffn.frozen_ffn_backward(x, x, z, g, [w1], c1, [w2], gate, activation, keeps, True, True, True)


def parallel(dtype: torch.dtype, m: int, tokens: int = 8192, d: int = 1024) -> None:
    """Calls the kernels of ``ops.parallel_ffn``."""
    x, w1, w2, c1, c2 = (_new(dtype, *shape) for shape in ((tokens, d), (4 * d, d), (d, 4 * d), (4 * d,), (d,)))
    w1, c1, w2 = with_room(w1, c1, w2, m)
    down, down_bias, up = (_new(torch.float32, *shape) for shape in ((m, d), (m,), (d, m)))
    _, bits, none = frozen_ffn.frozen_ffn(x, [w1], c1, [w2], c2, [], "relu", "bits")
    frozen_ffn.frozen_ffn_backward(x, None, bits, none, [w1], c1, [w2], [], "relu", "bits", True, False, False)
    bottleneck_adapter.bottleneck_adapter_backward(
        x, x, False, None, None, down, down_bias, up, 0.0, "relu", 4.0, False, True
    )


def activate(dtype: torch.dtype, kind: str, dropout: float, tokens: int = 8192, features: int = 4096) -> None:
    z, seed = _new(dtype, tokens, features), _new(torch.int64, 1)
    y, bits = activation.activation(z, kind, dropout, seed)
    activation.activation_backward(y, bits if kind == "relu" else z, kind, dropout, seed)
    gated_activation.gated_activation(z, y, kind, dropout, seed)
    gated_activation.gated_activation_backward(y, z, y, kind, dropout, seed)


def residual(dtype: torch.dtype, stream: torch.dtype, tokens: int = 8192, d: int = 1024) -> None:
    x, stream, seed = _new(dtype, tokens, d), _new(stream, tokens, d), _new(torch.int64, 1)
    y = dropout_add.dropout_add(x, stream, 0.1, seed)
    dropout_add.dropout_add_backward(y, dtype, 0.1, seed)


def residual_norm(
    dtype: torch.dtype, stream: torch.dtype, d: int, trained: bool, centred: bool = True, p: float = 0.1,
    tokens: int = 8192,
) -> None:  # fmt: skip
    """Calls it like a layer with its norms in front."""
    y, x, weight, seed = _new(dtype, tokens, d), _new(stream, tokens, d), _new(dtype, d), _new(torch.int64, 1)
    h, u, mean, rstd = dropout_add_norm.dropout_add_norm(
        y, x, weight, weight if centred else None, 1e-5, p, seed, centred
    )
    mean = mean if centred else None
    needs = trained, trained and centred
    dropout_add_norm.dropout_add_norm_backward(u, x, h, mean, rstd, weight, dtype if p else None, p, seed, *needs)


def loss(dtype: torch.dtype, words: int, bias: bool, smoothing: float, rows: int = 64) -> None:
    logits = _new(dtype, rows, -(-words // 16) * 16)[:, :words]
    labels, word = _new(torch.int64, rows), _new(torch.float32, words) if bias else None
    dlosses = _new(torch.float32, rows) if bias else None
    linear_cross_entropy.linear_cross_entropy(logits, labels, word, 0.9, smoothing, 0.5, dlosses, True)
    linear_cross_entropy.linear_cross_entropy(logits, labels, word, 0.9, smoothing, 0.5, None, False)


def loss_words(
    dtype: torch.dtype, columns: int, words: int = 256206, smooth: bool = True, gradient: bool = True
) -> None:
    """The launches for some rows: at their start, for the first block of words, others and the last, at their end."""
    rows, d = 8192, 1024
    h, weight, labels = _new(dtype, rows, d), _new(dtype, words, d), _new(torch.int64, rows)
    word_sum, total = _new(torch.float32, d) if smooth else None, _new(torch.float32, rows, d) if gradient else None
    logits, left = _new(dtype, rows, columns), words % columns or columns
    state = loss_by_words.linear_cross_entropy_begin(h, weight, labels, word_sum)
    loss_by_words.linear_cross_entropy_words(logits, labels, 0, state, total, True)
    loss_by_words.linear_cross_entropy_words(logits, labels, columns, state, total, False)
    loss_by_words.linear_cross_entropy_words(logits[:, :left], labels, words - left, state, total, False)
    dlosses = _new(torch.float32, rows) if smooth else None
    rest = (0.9, 1e-6, dlosses, torch.empty_like(h) if gradient else None)
    loss_by_words.linear_cross_entropy_end(weight, labels, state, total, word_sum, *rest)


def whole_loss(dtype: torch.dtype, chunk_bytes: int, rows: int = 8192, words: int = 256206, d: int = 1024) -> None:
    """All launches of a smoothed loss by words."""
    kernels = loss_by_words.linear_cross_entropy_begin, loss_by_words.linear_cross_entropy_words
    kernels = Kernels(*kernels, loss_by_words.linear_cross_entropy_end)
    h, weight, labels = _new(dtype, rows, d), _new(dtype, words, d), _new(torch.int64, rows)
    options = LossOptions(0.1, "uniform", 1.0, -100, chunk_bytes, ALL_ROWS)
    compute(kernels, h, weight, labels, None, None, options, gradient=True)


def attend(dtype: torch.dtype, d: int, options: tuple[str, ...] = (), length: int = 512, heads: int = 16) -> None:
    rows = 1 if "packed" in options else 16
    q, k, v, do = (_new(dtype, rows, length * 16 // rows, heads, d).transpose(1, 2) for _ in range(4))
    mask = None
    if "padding" in options:
        mask = _new(torch.bool, 16, 1, 1, length)
    elif "additive" in options:
        mask = _new(torch.float32, 16, 1, length, length)
    bias = _new(dtype, 1, heads, length, length) if "bias" in options else None
    prefix = [_new(torch.float32, 20, heads, d) if "prefix" in options else None] * 2
    dropout = 0.1 if "dropout" in options else 0.0
    rest = (mask, bias, *prefix, "causal" in options, d**-0.5, dropout, _new(torch.int64, 1) if dropout else None)
    cu = _new(torch.int32, 129) if "packed" in options else None
    distance = _new(dtype, heads, 257) if "distance" in options else None
    o, lse = attention.attention(q, k, v, *rest, cu, cu, distance)
    attention.attention_backward(do, q, k, v, o, lse, *rest, False, cu, cu, distance, distance is not None)


def quantized_products(dtype: torch.dtype, storage: str, tokens: int, n: int = 1024, k: int = 1024) -> None:
    if storage == "int8":
        parts = [_new(torch.int8, n, k), _new(torch.float32, n)]
    else:
        blocks = -(-n * k // 64)
        parts = [_new(torch.uint8, -(-n * k // 2)), _new(torch.uint8, blocks), _new(torch.float32, -(-blocks // 256))]
        parts.append(_new(torch.float32, 1))
    quantized.quantized_project(_new(dtype, tokens, k), parts, _new(dtype, n))
    quantized.quantized_project_back(_new(dtype, tokens, n), parts)


def quantized_weight(dtype: torch.dtype, storage: str, n: int = 4096, k: int = 1024) -> None:
    """A weight into a storage and back."""
    parts = getattr(quantize, f"quantize_{storage}")(_new(dtype, n, k))
    quantized.dequantize(parts, 0, n, k, dtype)


def _new(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Every kernel and every tile of the tables, in one of the two 16-bit types: their code differs in a suffix.
EVERYWHERE = [
    (lora, BF16, 3, 16, 0.1),
    (lora, FP16, 1, 16, 0.0),
    (lora, BF16, 3, 64, 0.1),
    (border, BF16, (16, 0, 16)),
    (border, FP16, (256, 256, 256), True),
    (frozen, BF16, 8192),
    (frozen, FP16, 2048),
    (frozen, BF16, 512),
    (frozen, FP16, 16),
    (adapter, BF16, 64),
    (adapter, FP16, 256),
    (adapter, BF16, 512),
    (norms, BF16, 1024, FP32),
    (norms, FP16, 8192, FP16),
    (ffn, BF16, "relu", False, "bits"),
    (ffn, FP16, "gelu_tanh", True, "z"),
    (activate, BF16, "relu", 0.1),
    (activate, FP16, "gelu_tanh", 0.0),
    (residual, BF16, BF16),
    (residual, FP16, FP32),
    (residual_norm, BF16, BF16, 1024, False),
    (residual_norm, FP16, FP32, 4096, True),
    (quantized_products, BF16, "nf4", 128),
    (quantized_products, FP16, "nf4", 17),
    (quantized_products, FP16, "nf4", 8192, 1024, 1000),
    (quantized_products, FP16, "int8", 512, 4096),
    (quantized_products, BF16, "int8", 1),
    (quantized_products, FP16, "nf4", 4, 1024, 4096),
    (quantized_products, FP16, "int8", 16),
    (quantized_products, BF16, "int8", 8192),
    (quantized_weight, BF16, "int8"),
    (quantized_weight, BF16, "nf4"),
    (loss, BF16, 256206, False, 1e-6),
    (loss, FP16, 128112, True, 0.0),
    (loss_words, BF16, 2048),
    (loss_words, BF16, 8192, 256206, False, False),
    (attend, BF16, 64, ("padding", "dropout")),
    (attend, FP16, 128, ("additive", "bias", "causal", "dropout", "prefix")),
    (attend, BF16, 64, ("packed", "causal", "dropout", "prefix", "distance")),
    (attend, FP16, 64, ("padding", "dropout"), 128),
    (attend, BF16, 64, ("packed", "causal", "dropout")),
]
ONLY = {
    "sm75": [(adapter, FP16, 32)],
    "sm80": [
        (lora, FP32, 3, 16, 0.1),
        (border, FP32, (16, 0, 16), True),
        (adapter, FP32, 64),
        (adapter, FP32, 32),
        (norms, FP32, 1024, FP32),
        (ffn, FP32, "gelu", True, "x"),
        (quantized_products, FP32, "nf4", 300),
        (quantized_products, FP32, "int8", 16),
        (loss, FP32, 128112, True, 1e-6),
        (loss_words, FP32, 4096),
        (attend, FP32, 64, ("padding", "dropout")),
        (attend, FP32, 64, ("packed", "distance")),
    ],
    "sm90": [
        (loss_words, BF16, 8192),
        (norms, BF16, 1024, BF16, (True, False, False)),
        (norms, BF16, 1024, BF16, (True, False, True)),
        (norms, BF16, 2048, BF16, (False, True, True)),
        (norms, FP32, 4090, FP32),
        (residual_norm, FP32, FP32, 1024, True),
        (residual_norm, BF16, FP32, 2048, False),
        (residual_norm, BF16, BF16, 768, True, False),
        (residual_norm, FP16, FP16, 1037, False, True, 0.1),
        (residual_norm, BF16, BF16, 1024, False, True, 0.0),
        (activate, FP32, "gelu", 0.1),
        (activate, BF16, "relu", 0.0),
        (activate, BF16, "silu", 0.1, 8192, 1037),
        (lora, FP16, 2, 8, 0.0),
        (adapter, FP16, 128),
        (adapter, BF16, 64, True, "gelu", 16),
        (adapter, FP16, 16, False, "silu"),
        (ffn, BF16, "gelu", False, "z"),
        (ffn, BF16, "silu", True, "x"),
        (attend, BF16, 64),
        (attend, FP16, 64, ("additive", "bias", "causal", "dropout", "prefix")),
        (attend, FP16, 32, ("padding",)),
        (attend, BF16, 64, ("packed",)),
        (attend, FP16, 128, ("packed", "causal", "dropout", "distance")),
        (attend, BF16, 64, ("additive", "distance")),
        (attend, BF16, 64, ("packed", "causal", "dropout"), 1024),
        (attend, FP16, 128, ("causal", "dropout"), 128),
        (attend, FP16, 64, ("padding", "dropout"), 64),
    ],
}


# Another card has many launches of these in the same words. Between sm_80, sm_86 and sm_89 that is the same code; on
# the others it is where nothing is multiplied: sm_75 copies nothing ahead, sm_120 has a pipeline of its own.
LIKE = {"sm86": "sm80", "sm89": "sm86", "sm75": "sm80", "sm100": "sm90", "sm120": "sm86"}
SAME_CODE = {"sm86", "sm89"}
WITHOUT_PRODUCT = (
    *(activation, dropout_add, gated_activation, layer_norm, linear_cross_entropy, loss_by_words, quantize, rms_norm),
)


def calls(card: str) -> list[tuple]:
    """Returns the calls for a card; on one without bf16 those of others, in fp16 and in fp32."""
    if card in AMD:
        return EVERYWHERE + ONLY["sm80"]
    if card != "sm75":
        return EVERYWHERE + ONLY.get(card, [])
    others = EVERYWHERE + ONLY["sm75"] + ONLY["sm80"]
    return [tuple(FP16 if argument is BF16 else argument for argument in call) for call in others]


FEW = [(lora, BF16, 1, 16, 0.0)]


@functools.cache
def launches(card: str, few: bool = False) -> dict[tuple, tuple]:
    """Returns the launches that differ: their key -> (dtype, kernel, args, constexprs, options)."""
    found = {}
    for function, *arguments in FEW if few else calls(card):
        dtype = str(arguments[0]).removeprefix("torch.")
        for kernel, args, constexprs, options in record(card, lambda f=function, a=arguments: f(*a)):
            absent = tuple(arg is None for arg in args)
            key = (kernel.__name__, absent, str(constexprs), str(options), dtype == "float32")
            found.setdefault(key, (dtype, kernel, args, constexprs, options))
    return found


@functools.cache
def shared(card: str) -> set[tuple]:
    """The launches of ``card`` that the card which it is like has, too."""
    if card not in LIKE:
        return set()
    modules = {module.__name__ for module in WITHOUT_PRODUCT}
    other = launches(LIKE[card])
    return {
        key
        for key, launch in launches(card).items()
        if key in other and (card in SAME_CODE or launch[1].fn.__module__ in modules)
    }


def stands_for(card: str, key: tuple) -> list[str]:
    """Returns the cards that have the code of a launch compiled for ``card``, itself first."""
    like = [name for name, other in LIKE.items() if other == card and key in shared(name)]
    return [card, *(other for name in like for other in stands_for(name, key))]


def main(part: str, *cards: str) -> None:
    for card in cards:
        print_compiled(part, card)


def print_compiled(part: str, card: str) -> None:
    """part: "all"; "own", without what ``shared`` has; "first", the first of each kernel of those; "shared" alone."""
    theirs, seen = set() if part == "few" else shared(card), set()
    for key, (dtype, kernel, args, constexprs, options) in launches(card, part == "few").items():
        # On sm_75 fp16 and fp32 have the same tiles and instructions; of AMD's cards one dtype says enough.
        first = key[0], card == "sm75" or card in AMD or key[-1]
        if (part != "all" and (key in theirs) != (part == "shared")) or (part == "first" and first in seen):
            continue
        seen.add(first)
        compiler = compile_for_amd if card in AMD else compile_launch
        report = compiler(card, kernel, args, constexprs, options)
        cards = [card] if part == "few" else stands_for(card, key)
        print(json.dumps({"card": card, "dtype": dtype, "cards": cards, **report}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
