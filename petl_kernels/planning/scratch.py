"""Bytes that one call of an op allocates inside itself and frees, beside its inputs and outputs.

They are those of the CPU's C++ kernels, and on CUDA those of Triton's where these take more. Ops are listed whose
scratch grows with the batch or comes to megabytes; that of the others stays below a plan's slack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from petl_kernels.ops import loss_by_words
from petl_kernels.ops.capped_attention import chunk_slices
from petl_kernels.ops.define import accumulate_dtype
from petl_kernels.ops.frozen_ffn import chunk_rows
from petl_kernels.ops.linear_cross_entropy import SCALED_BYTES
from petl_kernels.ops.lora_border import CUDA_PARTS
from petl_kernels.ops.lora_norm import norm_dtype, tile_bytes
from petl_kernels.ops.product import product_bytes
from petl_kernels.ops.quantized import CUDA_TILE_BYTES, TILE_BYTES, in_features, is_quantized, out_features, split_parts

Given = dict[str, Any]  # the arguments of a call by their names in the schema, and "device"

# How the C++ kernels cut their work, by the names in csrc/cpu; tests/planning/test_scratch.py compares the two.
ATTENTION = {"kBlockScores": 1 << 17, "kMinRows": 16, "kMaxRows": 256}  # attention.cpp
BLOCKS = {"kMaxRows": 256, "kMaxSlices": 16}  # common.h
QUANTIZED = {"kBackRows": 1024}  # quantized.cpp


def scratch_bytes(
    function: OpOverload, args: tuple[Any, ...], device: str = "cpu", kwargs: dict[str, Any] | None = None
) -> int:
    """Returns the bytes for ``function``, of ``torch.ops.petl`` or a sum, called with args and kwargs; 0 for any other.

    device: "cpu" or "cuda", whose kernels are counted wherever ``args`` are.
    """
    rule = _RULES.get(function.name().removeprefix("petl::"))
    if rule is None:
        return 0
    arguments = function._schema.arguments  # pyright: ignore[reportPrivateUsage]
    given: Given = {argument.name: value for argument, value in zip(arguments, args, strict=False)}
    return rule({**given, **(kwargs or {}), "device": device})


def _sum(given: Given) -> int:
    """Counts the copy in the wider dtype that PyTorch's CPU kernel makes of what it sums."""
    x, dtype = given["self"], given.get("dtype") or given["self"].dtype
    return x.numel() * dtype.itemsize if given["device"] == "cpu" and dtype != x.dtype else 0


def _linear_cross_entropy(given: Given) -> int:
    weight, scale, cap = given["weight"], given["logit_scale"], given["softcap"]
    if loss_by_words.serves(given["hidden"], weight, given["bias"], scale, given["need_dweight"], cap):
        return _loss_by_words(given)
    return _loss_by_rows(given)


def _loss_by_words(given: Given) -> int:
    hidden, d, words = given["hidden"], given["hidden"].shape[-1], given["weight"][0].shape[0]
    rows, dtype, device, gradient = hidden.numel() // d, hidden.dtype, given["device"], given["need_dhidden"]
    sizes = (d, words, dtype, device, given["chunk_bytes"])
    size, columns = loss_by_words.blocks_of(rows, *sizes, True, gradient)
    buffers, wide = loss_by_words.most_bytes(rows, *sizes, gradient), accumulate_dtype(dtype).itemsize
    if device == "cpu" and dtype.itemsize < wide:  # the sum of some words, or a product before it is added
        buffers = max(buffers + size * d * dtype.itemsize, loss_by_words.SUMMED_WORDS * d * wide)
    return buffers + _products(size, d, columns, dtype)


def _loss_by_rows(given: Given) -> int:
    hidden, d, chunk_bytes = given["hidden"], given["hidden"].shape[-1], given["chunk_bytes"]
    rows, words = hidden.numel() // d, out_features(given["weight"], d)
    buffers = 2 if given["softcap"] else 1  # the derivative of a cap beside the logits
    size = min(rows, max(1, chunk_bytes // buffers // (words * hidden.itemsize)))
    size = -(-rows // -(-rows // max(1, size)))
    sums = size * d * accumulate_dtype(hidden.dtype).itemsize
    block = max(1, min(words, chunk_bytes // 4 // (d * hidden.itemsize)))
    products = max(_products(size, d, words, hidden.dtype), product_bytes(block, size, d, hidden.dtype))
    if is_quantized(given["weight"]):  # the logits of a block of words, or what it adds to the gradient
        products += _tile(given, block * d, hidden)
        products += max(size * block * hidden.itemsize, sums + size * d * hidden.itemsize)
    else:
        if given["weight"][0].dtype != hidden.dtype:  # a block in the dtype of hidden
            products += block * d * hidden.itemsize
        products += sums  # over blocks of words in a wider dtype
    # the logits of a chunk and the gradient of its rows
    return size * (words + d) * hidden.itemsize + max(products, _cap(given, size * words))


def _cap(given: Given, logits: int) -> int:
    """Counts the derivative of a cap on so many logits, and two wide copies of a few rows."""
    dtype = given["hidden"].dtype
    return logits * dtype.itemsize + 2 * -(-logits // 16) * accumulate_dtype(dtype).itemsize if given["softcap"] else 0


def _products(rows: int, k: int, n: int, dtype: torch.dtype) -> int:
    """Returns the larger of what x (rows, k) Wᵀ and dy (rows, n) W take for their blocks."""
    return max(product_bytes(rows, k, n, dtype), product_bytes(rows, n, k, dtype))


def _frozen_linear(given: Given) -> int:
    """Counts a tile of a quantized weight, which may be all of it, and the blocks of the product."""
    x = given["x"]
    d = x.shape[-1]
    n = out_features(given["weight"], d)
    tile = min(_tile(given, n * d, x), n * d * x.itemsize) if is_quantized(given["weight"]) else 0
    return tile + product_bytes(x.numel() // max(1, d), d, n, x.dtype)


def _frozen_linear_backward(given: Given) -> int:
    dy, quantized = given["dy"], is_quantized(given["weight"])
    if not given["need_dx"]:
        return 0
    n = dy.shape[-1]
    k = in_features(given["weight"], n)
    return (_back(given, dy, n * k) if quantized else 0) + product_bytes(dy.numel() // max(1, n), n, k, dy.dtype)


def _lora_linear(given: Given) -> int:
    x, weights = given["x"], given["weights"]
    return (_tile(given, _largest(weights, x.shape[-1]), x) if _any_quantized(weights) else 0) + _lora_products(given)


def _lora_linear_backward(given: Given) -> int:
    x, weights, products = given["x"], given["weights"], _lora_products(given)
    if not _any_quantized(weights):
        return products
    back = _back(given, x, _largest(weights, x.shape[-1]))
    return products + back + (x.nbytes if given["device"] == "cuda" else 0)  # what is added to dx


def _lora_products(given: Given) -> int:
    """Counts the blocks of the largest product, with W or with an adapter."""
    x = given["x"]
    d, ranks = x.shape[-1], sum(a.shape[0] for a in given["a"])
    widths = [out_features(weight, d) for weight in split_parts(given["weights"])]
    return max(_products(x.numel() // max(1, d), d, n, x.dtype) for n in (ranks, *widths))


def _lora_norm(given: Given) -> int:
    """Counts a tile of W in the dtype of sums and the same one with the change, and copies of A and B."""
    a, b = given["a"], given["b"]
    wide = norm_dtype(given["weight"], a, b).itemsize
    tile = min(b.shape[0] * a.shape[1] * wide, max(tile_bytes(given["device"]), a.shape[1] * wide))
    return 2 * tile + sum(own.numel() * wide for own in (a, b) if own.dtype.itemsize < wide)


def _lora_border(given: Given) -> int:
    """Counts the border in the dtype of the rows, where it has another."""
    border, wide = given["border"], given["wide"]
    return border.numel() * wide.itemsize if border.dtype != wide.dtype else 0


def _lora_border_backward(given: Given) -> int:
    """Counts also the partial sums of dB and of the biases' gradients, or of dA, which come after them, if larger."""
    a, b, wide = given["a"], given["b"], given["wide"]
    outputs = sum(own.shape[0] for own in b)
    biases = outputs if any(given["need_dbias"]) else 0
    largest = max(sum(own.numel() for own in b) + biases, sum(own.numel() for own in a))
    return _lora_border(given) + (min(CUDA_PARTS, -(-wide.shape[0] // 32)) * largest + biases) * 4


def _any_quantized(tensors: list[Tensor]) -> bool:
    """Returns whether one of several weights is quantized, whose tensors stand one weight after the other."""
    return not all(tensor.is_floating_point() for tensor in tensors)


def _largest(tensors: list[Tensor], columns: int) -> int:
    """Returns the number of values of the largest of several weights."""
    return max(out_features(weight, columns) for weight in split_parts(tensors)) * columns


def _tile(given: Given, values: int, like: Tensor) -> int:
    """Returns the bytes of a tile of a quantized weight of so many values, in the dtype of ``like``."""
    return min(CUDA_TILE_BYTES, values * like.itemsize) if given["device"] == "cuda" else TILE_BYTES


def _back(given: Given, rows: Tensor, values: int) -> int:
    """Counts a product with a quantized weight: a tile, and on a CPU the fp32 sums of some rows."""
    if given["device"] == "cuda":
        return _tile(given, values, rows)
    return TILE_BYTES + 2 * min(rows.numel(), QUANTIZED["kBackRows"] * rows.shape[-1]) * 4


def _scaled(given: Given) -> int:
    return 2 * min(SCALED_BYTES, given["values"].numel() * given["factor"].itemsize)


def _frozen_ffn(given: Given) -> int:
    return _ffn_chunks(given, given["x"], 1 if not given["gate"] or given["keeps"] == "z" else 2)


def _frozen_ffn_backward(given: Given) -> int:
    chunks = (2 if given["gate"] else 1) * (2 if given["keeps"] == "x" else 1)
    return _ffn_chunks(given, given["dy"], chunks)


def _ffn_chunks(given: Given, x: Tensor, chunks: int) -> int:
    d = x.shape[-1]
    hidden = out_features(given["w1"], d)
    rows = chunk_rows(x.numel() // d, hidden, x.itemsize, given["device"])
    values = chunks * rows * hidden * x.itemsize + _products(rows, d, hidden, x.dtype)
    if not is_quantized(given["w1"]):
        return values
    added = rows * d * x.itemsize if given["gate"] and given["device"] == "cuda" else 0  # to dx, of the gate
    return values + _back(given, x, hidden * d) + added


def _parallel_ffn(given: Given) -> int:
    return _frozen_ffn({**given, "w1": [given["w1"]], "gate": []})


def _parallel_ffn_backward(given: Given) -> int:
    network = _frozen_ffn_backward({**given, "w1": [given["w1"]], "gate": []})
    return max(network, _bottleneck_adapter_backward(given)) if given["need_adapter"] else network


def _attention(given: Given, buffers: int = 1) -> int:
    """Counts for each thread the keys and values of one head, and its block of scores.

    Sentences of a packed row are taken to be of one length, as those of a simulation are.
    """
    q, k, prefix, ends = given["q"], given["k"], given["prefix_k"], given.get("cu_seqlens_k")
    sentences = 1 if ends is None else len(ends) - 1
    columns = -(-k.shape[2] // sentences) + (0 if prefix is None else prefix.shape[0])
    wanted = min(ATTENTION["kMaxRows"], ATTENTION["kBlockScores"] // max(1, columns))
    block = min(max(ATTENTION["kMinRows"], wanted), max(1, -(-q.shape[2] // sentences)))
    scores = block * columns * (2 if given["dropout"] else 1)
    own = 2 * columns * q.shape[3] + 2 * block * q.shape[3] + scores
    return torch.get_num_threads() * buffers * own * accumulate_dtype(q.dtype).itemsize


def _capped_attention(given: Given, buffers: int = 3) -> int:
    """Counts the scores of a chunk, the cap's derivative and probabilities, and their gradients; and its rows."""
    q, k, prefix = given["q"], given["k"], given["prefix_k"]
    columns, shared = k.shape[2] + (0 if prefix is None else prefix.shape[0]), q.shape[1] // k.shape[1]
    sentences, parts = next(chunk_slices(q.shape[0], shared, q.shape[2], columns))
    rows = (sentences.stop - sentences.start) * shared * (parts[0].stop - parts[0].start)
    buffers += 2 if given["dropout"] else 0
    sums = accumulate_dtype(q.dtype).itemsize
    keys = (sentences.stop - sentences.start) * columns
    return (rows * columns * buffers + (4 * rows + 6 * keys) * q.shape[3]) * sums


def _bottleneck_adapter(given: Given) -> int:
    x, down = given["x"], given["down"]
    rows = x.numel() // x.shape[-1]
    blocks = min(rows, BLOCKS["kMaxRows"]) * (3 * x.shape[-1] + 3 * down.shape[0])
    return (torch.get_num_threads() * blocks + 2 * down.numel()) * 4


def _bottleneck_adapter_backward(given: Given) -> int:
    x, down = given["x"], given["down"]
    slices = max(1, min(BLOCKS["kMaxSlices"], x.numel() // x.shape[-1] // BLOCKS["kMaxRows"]))
    return _bottleneck_adapter(given) + 2 * slices * down.numel() * 4


_RULES: dict[str, Callable[[Given], int]] = {
    "aten::sum.dim_IntList": _sum,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_cross_entropy_scaled": _scaled,
    "frozen_linear": _frozen_linear,
    "frozen_linear_backward": _frozen_linear_backward,
    "lora_linear": _lora_linear,
    "lora_linear_backward": _lora_linear_backward,
    "lora_norm": _lora_norm,
    "lora_border": _lora_border,
    "lora_border_backward": _lora_border_backward,
    "frozen_ffn": _frozen_ffn,
    "frozen_ffn_backward": _frozen_ffn_backward,
    "parallel_ffn": _parallel_ffn,
    "parallel_ffn_backward": _parallel_ffn_backward,
    "attention": _attention,
    "attention_backward": lambda given: _attention(given, 2),
    "capped_attention": _capped_attention,
    "capped_attention_backward": lambda given: _capped_attention(given, 5),
    "bottleneck_adapter": _bottleneck_adapter,
    "bottleneck_adapter_backward": _bottleneck_adapter_backward,
}
