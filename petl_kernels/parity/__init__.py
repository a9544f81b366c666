"""Does a backend compute what the reference computes? Used by the router on CUDA devices, `petl-mt doctor` and tests.

The criterion: against the reference in float64, a kernel's error may be at most twice the error that the reference
itself makes in the dtype at hand, plus some units in the last place of the largest value m (2^-23 m in fp32):

    2           for values in 16 bits, whose own rounding outweighs all else, and for ops that add nothing up
    max(2, √n)  for values in fp32 and wider at the end of n additions
                (n is counted for each value by its axes; in attention a score of 15 counts as 15² more)

A kernel may add up in any order, and how far the reference is off depends on the order of a library. With u = 2^-24,
an addition rounds its result S by u|S| at most, evenly distributed. In no order are the partial sums of random terms,
such as the ones here, much larger than the largest of all results. So n additions make n errors of mean zero and of
variance u²m²/3 at most, together a standard deviation of u m √(n/3): √n units, 2u m each, are 3.5 of these.

LoRA as the Triton kernels add it, the part of the rank first and in order, misses two units for 25 of 60 draws of
inputs, and √n/3 for none. Inputs in TF32 are off by 70 times what is allowed at least, a sum without one of its terms
by 30,000 times (``tests/ops/test_parity.py``).

Source: N. J. Higham and T. Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41
(2019), A2815: √n u instead of the worst case's n u, where rounding errors are independent and of mean zero.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from petl_kernels import dispatch
from petl_kernels.device import resolve

# What a card uses first comes first.
DTYPES = (torch.bfloat16, torch.float32, torch.float16)

Values = dict[str, Tensor]


def table(device: torch.device | str | None = None) -> list[tuple[str, str, str, str, bool]]:
    """Rows (op, backend, dtype, "pass" or the error, whether the backend is the op's default) for one device."""
    from petl_kernels.ops import OPS

    device = resolve(device)
    rows = []
    for op in OPS:
        for backend in dispatch.serving(op, device):
            for dtype in checked_dtypes(backend):
                error = check(op, backend, device, dtype)
                default = backend == dispatch.backend_of(op, device, dtype)
                rows.append((op, backend, str(dtype).removeprefix("torch."), error or "pass", default))
    return rows


def checked_dtypes(backend: str) -> tuple[torch.dtype, ...]:
    """Those of DTYPES that ``backend`` can be held to."""
    interpreted = backend == "triton" and dispatch.triton_interprets()
    return tuple(dtype for dtype in DTYPES if not (interpreted and dtype == torch.bfloat16))


def check(op: str, backend: str, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Compare forward and backward of one backend with the reference on small, odd sizes; None or the first error.

    It may be called anywhere: below autograd, in a tensor subclass's handler, under autocast, ``inference_mode``,
    FakeTensorMode or any other mode, on a stream of the caller's. All of these, and what PyTorch will have one day,
    belong to a thread. So the check runs in one of its own, whose state is PyTorch's default, on inputs from a
    generator of its own. Settings of the process hold there too: precision of products, deterministic algorithms. The
    few megabytes that it takes count where the allocator counts. Products of another thread may take a workspace of
    cuBLAS more (32 MiB on Hopper, 8 MiB elsewhere), which PyTorch keeps for the next thread that multiplies.

    Raises torch.OutOfMemoryError, which says nothing about the backend. Not for the capture of a CUDA graph.
    """
    return _in_a_thread_of_its_own(_first_error, op, backend, device, dtype)


def _in_a_thread_of_its_own(function: Callable, *args):
    outcome = Future()

    def work() -> None:
        try:
            outcome.set_result(function(*args))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, name="petl-parity", daemon=True).start()
    return outcome.result()


def _first_error(op: str, backend: str, device: torch.device | str, dtype: torch.dtype) -> str | None:
    errors = (check_case(op, backend, device, dtype, case) for case in CASES[op])
    return next((error for error in errors if error), None)


def check_case(
    op: str, backend: str, device: torch.device | str, dtype: torch.dtype, case: Callable[..., dict]
) -> str | None:
    """One of the ``CASES`` of ``op``, in the state that this thread is in: None or the first error."""
    device = torch.device(device)
    try:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            error = compare(op, backend, case(device, dtype))
    except Exception as problem:  # a kernel that cannot even run must not stop the caller
        lines = str(problem).splitlines()
        error = f"{type(problem).__name__}: {lines[0] if lines else ''}"
        if _is_out_of_memory(problem):
            raise torch.OutOfMemoryError(f"checking {backend} {op}: {error}") from problem
    return f"{case.__name__}: {error}" if error else None


def _is_out_of_memory(problem: Exception) -> bool:
    """Whether it is memory that was missing: cuBLAS, Triton and the driver say so in errors of other types."""
    words = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    return isinstance(problem, (torch.OutOfMemoryError, MemoryError)) or any(word in str(problem) for word in words)


def compare(op: str, backend: str, arguments: dict) -> str | None:
    """Every value and gradient of one call, by name, held to the criterion; None or the first that fails."""
    exact = run(op, "reference", _in_float64(arguments))
    reference = run(op, "reference", arguments)
    computed = run(op, backend, arguments)
    for name, value in exact.items():
        additions = most_additions(op, name, arguments)
        if error := compare_tensors(name, computed[name], reference[name], value, additions):
            return error
    return None


def compare_tensors(name: str, computed: Tensor, reference: Tensor, exact: Tensor, additions: int = 0) -> str | None:
    """Hold one value to the criterion; None or how far it is off. additions: in the chain behind one element."""
    if computed.shape != exact.shape or computed.dtype != reference.dtype:
        return (
            f"{name} is {computed.dtype} of shape {tuple(computed.shape)}, "
            f"expected {reference.dtype} of {tuple(exact.shape)}"
        )
    if exact.numel() == 0:
        return None
    units = 2 if computed.dtype.itemsize == 2 else max(2, math.sqrt(additions))
    error = (computed.double() - exact).abs().max().item()
    allowed = 2 * (reference.double() - exact).abs().max().item()
    allowed += units * torch.finfo(computed.dtype).eps * exact.abs().max().item()
    if not error <= allowed:  # also true for NaN
        return f"{name} is off by {error:.3g}, allowed {allowed:.3g}"
    return None


def most_additions(op: str, value: str, arguments: dict) -> int:
    """Returns the most additions behind one element of ``value`` of ``op``, nested sums together; 0 where none are.

    Sums run over features and, in gradients of parameters, over tokens: the last axis of a tensor and the others, taken
    as one. In attention they run over queries, keys and features. What is computed for each token has none over tokens.
    A softmax turns the rounding of a score, relative to it, into one relative to 1: a score of 15 counts as 15²
    additions.
    """
    if op in _WITHOUT_SUMS:
        return 0
    axes, tensors = set(), [tensor for tensor in _tensors(arguments) if tensor.dim()]
    for tensor in tensors:
        *leading, last = tensor.shape
        axes.add(last)
        if leading:
            axes.add(leading[-1] if op == "attention" else math.prod(leading))
    if op != "attention" and (not value.startswith("d") or value in _OF_TOKENS):
        axes.discard(math.prod(tensors[0].shape[:-1]))  # the activation comes first
    if value == "ddistance_bias":  # all pairs of a query and a key may be equally far apart
        axes.add(arguments["q"].shape[0] * arguments["q"].shape[2] * arguments["k"].shape[2])
    return sum(axes) + (math.ceil(_largest_score(arguments) ** 2) if op == "attention" else 0)


def _largest_score(given: dict) -> float:
    scores = given["q"].double() @ given["k"].double().mT * given["scale"]
    return scores.abs().max().item() if scores.numel() else 0.0


_OF_TOKENS = ("dx", "dy", "dresidual", "dhidden")  # gradients of activations


_WITHOUT_SUMS = {
    *("activation", "gated_activation", "dropout_add"),
    *("quantize_int8", "quantize_nf4", "dequantize", "quantized_embedding"),
}


def _tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list)):
        for member in value.values() if isinstance(value, dict) else value:
            yield from _tensors(member)


@torch.no_grad()
def run(op: str, backend: str, arguments: dict) -> Values:
    """Outputs and all gradients of one op by name, straight from a backend's kernels."""
    kernels = (_kernel(f"{op}{part}", backend) for part in ("", "_backward", *_MORE_PARTS.get(op, ())))
    return _RUN[op](*kernels, arguments)


def _kernel(op: str, backend: str) -> Callable:
    return dispatch.kernel_of(op, backend) or dispatch.kernel_of(op, "reference")


def _parts(weight: Tensor | None) -> list[Tensor]:
    from petl_kernels.ops.quantized import parts_of  # see table()

    return [] if weight is None else parts_of(weight)


def _run_frozen_linear(forward: Callable, backward: Callable, given: dict) -> Values:
    y = forward(given["x"], given["weight"], given["bias"])
    dx, dbias = backward(given["dy"], given["weight"], True, given["bias"] is not None)
    return {"y": y, "dx": dx, "dbias": _sum_dtype(dbias)}


def _run_lora_linear(forward: Callable, backward: Callable, given: dict) -> Values:
    fixed = [given[name] for name in ("weights", "biases", "a", "b", "scales", "dropout", "seed")]
    weights, biases, *adapters = fixed
    weights = [part for weight in weights for part in _parts(weight)]
    ys, s = forward(given["x"], weights, biases, *adapters)
    need_dbias = [bias is not None for bias in biases]
    dx, da, db, dbias = backward(given["dys"], given["x"], s, weights, *adapters, True, need_dbias)
    values = {"s": s, "dx": dx}
    for g in range(len(ys)):
        values |= {f"y{g}": ys[g], f"da{g}": da[g], f"db{g}": db[g], f"dbias{g}": _sum_dtype(dbias[g])}
    return values


def _run_lora_border(forward: Callable, backward: Callable, given: dict) -> Values:
    from petl_kernels.ops.lora_border import room  # see table()
    from petl_kernels.ops.room import copied_rows

    x, biases, a, b, scales = (given[name] for name in ("x", "biases", "a", "b", "scales"))
    outputs, r = sum(b_g.shape[0] for b_g in b), room(sum(a_g.shape[0] for a_g in a))
    border = given["border"].clone()[: outputs + r, : x.shape[1] + r]
    need_dbias = [c.numel() > 0 for c in biases]
    bias = x.new_empty(outputs) if any(need_dbias) else None
    y, s = forward(copied_rows([x], r), border, bias, biases, a, b, scales)
    dys = copied_rows(given["dys"], r)
    dx, da, db, dbias = backward(dys, x, s, border, a, b, scales, True, need_dbias)
    values = {"y": y, "s": s, "dx": dx}
    for g, (own, need) in enumerate(zip(dbias, need_dbias, strict=True)):
        values |= {f"da{g}": da[g], f"db{g}": db[g], **({f"dbias{g}": _sum_dtype(own)} if need else {})}
    return values


def _run_bottleneck_adapter(forward: Callable, backward: Callable, given: dict) -> Values:
    x, residual, up_bias = given["x"], given["residual"], given["up_bias"]
    norm = [given[name] for name in ("ln_weight", "ln_bias")]
    options = [given[name] for name in ("eps", "activation", "scale")]
    down, down_bias, up = given["down"], given["down_bias"], given["up"]
    y = forward(x, residual, *norm, down, down_bias, up, up_bias, *options)
    grads = backward(given["dy"], x, residual is None, *norm, down, down_bias, up, *options, True, up_bias is not None)
    names = ("dx", "dln_weight", "dln_bias", "ddown", "ddown_bias", "dup", "dup_bias")
    present = (True, *(p is not None for p in (*norm, down, down_bias, up, up_bias)))
    values = {name: grad for name, grad, there in zip(names, grads, present, strict=True) if there}
    if up_bias is not None:
        values["dup_bias"] = _sum_dtype(values["dup_bias"])
    return {"y": y, **values}


def _run_layer_norm(forward: Callable, backward: Callable, from_statistics: Callable, given: dict) -> Values:
    x, weight, bias, dy = (given[name] for name in ("x", "weight", "bias", "dy"))
    y, mean, rstd = forward(x, weight, bias, given["eps"])
    again = from_statistics(x, mean, rstd, weight, bias)
    dx, dweight, dbias = backward(dy, x, mean, rstd, weight, True, True, bias is not None)
    return {"y": y, "again": again, "dx": dx, "dweight": dweight, "dbias": dbias}


def _run_rms_norm(forward: Callable, backward: Callable, from_statistics: Callable, given: dict) -> Values:
    x, weight = given["x"], given["weight"]
    y, rstd = forward(x, weight, given["eps"])
    dx, dweight = backward(given["dy"], x, rstd, weight, True, True)
    return {"y": y, "again": from_statistics(x, rstd, weight), "dx": dx, "dweight": dweight}


def _run_frozen_ffn(forward: Callable, backward: Callable, given: dict) -> Values:
    from petl_kernels.ops.frozen_ffn import what_to_keep

    x, c1, c2, activation = (given[name] for name in ("x", "c1", "c2", "activation"))
    w1, w2, gate = (_parts(given[name]) for name in ("w1", "w2", "gate"))
    keeps = what_to_keep(activation, bool(gate), given["recompute"])
    y, *kept = forward(x, w1, c1, w2, c2, gate, activation, keeps)
    needs = (True, c1 is not None, c2 is not None)
    dx, dc1, dc2 = backward(
        given["dy"], x if keeps == "x" else None, *kept, w1, c1, w2, gate, activation, keeps, *needs
    )
    return {"y": y, "dx": dx, "dc1": dc1, "dc2": dc2}


_MORE_PARTS = {
    "layer_norm": ("_from_statistics",),
    "rms_norm": ("_from_statistics",),
    "quantized_project": ("_back",),
    "linear_cross_entropy": ("_begin", "_words", "_end"),
}


def _run_attention(forward: Callable, backward: Callable, given: dict) -> Values:
    q, k, v, bias, prefix_k, distance = (given[name] for name in ("q", "k", "v", "bias", "prefix_k", "distance_bias"))
    rest = [given[name] for name in ("mask", "bias", "prefix_k", "prefix_v", "causal", "scale", "dropout", "seed")]
    packed = given["cu_seqlens_q"], given["cu_seqlens_k"], distance
    o, lse = forward(q, k, v, *rest, *packed)
    grads = backward(given["do"], q, k, v, o, lse, *rest, bias is not None, *packed, distance is not None)
    names = ("dq", "dk", "dv", "dbias", "dprefix_k", "dprefix_v", "ddistance_bias")
    present = (True, True, True, *(x is not None for x in (bias, prefix_k, prefix_k, distance)))
    values = {name: grad for name, grad, there in zip(names, grads, present, strict=True) if there}
    # The lse of a query that sees nothing, or only what an additive mask all but hides, means nothing.
    return {"o": o, "lse": lse.masked_fill(lse.isinf() | (lse < -1e4), 0), **values}


def _run_linear_cross_entropy(
    rows: Callable, backward: Callable, begin: Callable, words: Callable, end: Callable, given: dict
) -> Values:
    from petl_kernels.ops import loss_by_words  # see table()
    from petl_kernels.ops.linear_cross_entropy import Kernels, compute

    names = ("hidden", "weight", "labels", "bias", "label_smoothing", "smoothing", "logit_scale", "ignore_index")
    fixed = {name: given[name] for name in (*names, "chunk_bytes", "counted", "dlosses")} | {
        "weight": _parts(given["weight"])
    }
    needs = (True, len(fixed["weight"]) == 1 and not given["frozen"], given["bias"] is not None)
    kernels = Kernels(rows, loss_by_words.Kernels(begin, words, end))
    losses, dhidden, dweight, dbias, _ = compute(kernels, *fixed.values(), *needs)
    return {"losses": losses, "dhidden": dhidden, "dweight": dweight, "dbias": dbias}


def _run_activation(forward: Callable, backward: Callable, given: dict) -> Values:
    z, options = given["z"], [given[name] for name in ("kind", "dropout", "seed")]
    y, bits = forward(z, *options)
    return {"y": y, "dz": backward(given["dy"], bits if given["kind"] == "relu" else z, *options)}


def _run_gated_activation(forward: Callable, backward: Callable, given: dict) -> Values:
    z, g, *options = (given[name] for name in ("z", "g", "kind", "dropout", "seed"))
    dz, dg = backward(given["dy"], z, g, *options)
    return {"y": forward(z, g, *options), "dz": dz, "dg": dg}


def _run_dropout_add(forward: Callable, backward: Callable, given: dict) -> Values:
    x, residual, p, seed = (given[name] for name in ("x", "residual", "p", "seed"))
    return {"y": forward(x, residual, p, seed), "dx": backward(given["dy"], x.dtype, p, seed)}


def _run_dropout_add_norm(forward: Callable, backward: Callable, given: dict) -> Values:
    y, weight, bias, p, seed, centred = (given[name] for name in ("y", "weight", "bias", "p", "seed", "centred"))
    h, u, mean, rstd = forward(y, given["residual"], weight, bias, given["eps"], p, seed, centred)
    mean, needs = mean if centred else None, (True, bias is not None)
    dropout = y.dtype, p, seed
    dh, dy, dweight, dbias = backward(given["du"], given["dh"], h, mean, rstd, weight, *dropout, *needs)
    return {"h": h, "u": u, "dresidual": dh, "dy": dy, "dweight": dweight, "dbias": dbias}


def _run_quantize(forward: Callable, backward: Callable, given: dict) -> Values:
    weight, dequantize = given["weight"], _kernel("dequantize", "reference")
    return {"w": dequantize(forward(weight), 0, *weight.shape, torch.float32)}


def _run_dequantize(forward: Callable, backward: Callable, given: dict) -> Values:
    weight, first = given["weight"], given["first_row"]
    return {"w": forward(_parts(weight), first, weight.shape[0] - first, weight.shape[1], weight.dtype)}


def _run_quantized_project(forward: Callable, backward: Callable, back: Callable, given: dict) -> Values:
    parts = _parts(given["weight"])
    return {"y": forward(given["x"], parts, given["bias"]), "dx": back(given["dy"], parts)}


def _run_quantized_embedding(forward: Callable, backward: Callable, given: dict) -> Values:
    weight = given["weight"]
    return {"y": forward(given["ids"], _parts(weight), weight.shape[1], weight.dtype)}


_RUN = {
    "frozen_linear": _run_frozen_linear,
    "lora_linear": _run_lora_linear,
    "lora_border": _run_lora_border,
    "bottleneck_adapter": _run_bottleneck_adapter,
    "layer_norm": _run_layer_norm,
    "rms_norm": _run_rms_norm,
    "frozen_ffn": _run_frozen_ffn,
    "attention": _run_attention,
    "linear_cross_entropy": _run_linear_cross_entropy,
    "activation": _run_activation,
    "gated_activation": _run_gated_activation,
    "dropout_add": _run_dropout_add,
    "dropout_add_norm": _run_dropout_add_norm,
    "quantize_int8": _run_quantize,
    "quantize_nf4": _run_quantize,
    "dequantize": _run_dequantize,
    "quantized_project": _run_quantized_project,
    "quantized_embedding": _run_quantized_embedding,
}


def _sum_dtype(dbias: Tensor) -> Tensor:
    # A kernel may return a bias gradient in the activations' dtype; the op hands it on in the dtype of sums.
    return dbias if dbias.dtype == torch.float64 else dbias.float()


def _in_float64(value):
    if isinstance(value, dict):
        return {name: _in_float64(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_in_float64(member) for member in value]
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value


class Source:
    """Reproducible normal values that leave PyTorch's own generators alone."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = normal(self.generator, *shape) * std
        return values.to(self.device, dtype or self.dtype)

    def seed(self) -> Tensor:
        return torch.randint(0, 2**63 - 1, (1,), generator=self.generator).to(self.device)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Returns normal values in fp32, whatever the process's default dtype is."""
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def frozen_linear_arguments(draw: Source, rows=(17,), n=40, k=72, bias=True) -> dict:
    return {
        "x": draw(*rows, k),
        "weight": draw(n, k, std=k**-0.5),
        "bias": draw(n) if bias else None,
        "dy": draw(*rows, n),
    }


def lora_linear_arguments(
    draw: Source, rows=(17,), ns=(40,), k=72, ranks=(4,), bias=True, dropout=0.0, adapter_dtype=None
) -> dict:
    adapter_dtype = adapter_dtype or draw.dtype
    return {
        "x": draw(*rows, k),
        "weights": [draw(n, k, std=k**-0.5) for n in ns],
        "biases": [draw(n) if bias else None for n in ns],
        "a": [draw(r, k, std=k**-0.5, dtype=adapter_dtype) for r in ranks],
        "b": [draw(n, r, dtype=adapter_dtype) for n, r in zip(ns, ranks, strict=True)],
        "scales": [2.0 - 0.5 * g for g in range(len(ns))],
        "dropout": dropout,
        "seed": draw.seed() if dropout else None,
        "dys": [draw(*rows, n) for n in ns],
    }


def lora_border_arguments(
    draw: Source, rows=17, ns=(40, 24, 33), k=72, ranks=(4, 0, 8), bias=True, more=0, adapter_dtype=None
) -> dict:
    """The weights stand in ``border``, in which nothing else is set; more: room for other adapters. Every second linear
    has no bias."""
    from petl_kernels.ops.lora_border import room  # see table()

    r = room(sum(ranks)) + more
    weights = [draw(n, k, std=k**-0.5) for n in ns]
    border = weights[0].new_full((sum(ns) + r, k + r), torch.nan)
    border[: sum(ns), :k] = torch.cat(weights)
    return {
        "x": draw(rows, k),
        "border": border,
        "weights": weights,
        "biases": [draw(n if bias and i % 2 == 0 else 0) for i, n in enumerate(ns)],
        "a": [draw(r_g, k, std=k**-0.5, dtype=adapter_dtype) for r_g in ranks],
        "b": [draw(n, r_g, dtype=adapter_dtype) for n, r_g in zip(ns, ranks, strict=True)],
        "scales": [2.0 + i for i in range(len(ns))],
        "dys": [draw(rows, n) for n in ns],
    }


def bottleneck_adapter_arguments(
    draw: Source,
    rows=(17,),
    d=72,
    m=24,
    bias=True,
    norm=True,
    parallel=False,
    activation="relu",
    scale=1.0,
    adapter_dtype=None,
) -> dict:
    adapter_dtype = adapter_dtype or draw.dtype
    down_bias = _hidden_bias(draw, m, activation, adapter_dtype)
    return {
        "x": draw(*rows, d),
        "residual": draw(*rows, d) if parallel else None,
        "ln_weight": draw(d, dtype=adapter_dtype) if norm else None,
        "ln_bias": draw(d, dtype=adapter_dtype) if norm and bias else None,
        "down": draw(m, d, std=d**-0.5, dtype=adapter_dtype),
        "down_bias": down_bias if bias else None,
        "up": draw(d, m, std=m**-0.5, dtype=adapter_dtype),
        "up_bias": draw(d, dtype=adapter_dtype) if bias else None,
        "eps": 1e-5,
        "activation": activation,
        "scale": scale,
        "dy": draw(*rows, d),
    }


def _hidden_bias(draw: Source, size: int, activation: str, dtype: torch.dtype) -> Tensor:
    bias = draw(size, dtype=dtype)
    if activation == "relu" and draw.dtype.itemsize == 2:
        # Rounding may put a z near 0 on the other side of the kink, in the reference as in a kernel: stay away from it.
        bias = torch.tensor([5.0, -5.0]).repeat(size)[:size].to(bias)
    return bias


def layer_norm_arguments(draw: Source, rows=(17,), d=72, bias=True, parameter_dtype=None) -> dict:
    parameter_dtype = parameter_dtype or draw.dtype
    return {
        "x": draw(*rows, d),
        "weight": draw(d, dtype=parameter_dtype),
        "bias": draw(d, dtype=parameter_dtype) if bias else None,
        "eps": 1e-5,
        "dy": draw(*rows, d, dtype=torch.promote_types(draw.dtype, parameter_dtype)),
    }


def rms_norm_arguments(draw: Source, rows=(17,), d=72, parameter_dtype=None) -> dict:
    given = layer_norm_arguments(draw, rows, d, False, parameter_dtype)
    return {name: value for name, value in given.items() if name != "bias"}


def frozen_ffn_arguments(
    draw: Source, rows=(17,), d=40, f=72, bias=True, gated=False, activation="relu", recompute=False
) -> dict:
    return {
        "x": draw(*rows, d),
        "w1": draw(f, d, std=d**-0.5),
        "c1": draw(f) if bias else None,
        "w2": draw(d, f, std=f**-0.5),
        "c2": draw(d) if bias else None,
        "gate": draw(f, d, std=d**-0.5) if gated else None,
        "activation": activation,
        "recompute": recompute,
        "dy": draw(*rows, d),
    }


def attention_arguments(
    draw: Source,
    batch=2,
    heads=3,
    queries=17,
    keys=17,
    d=16,
    mask=None,
    bias=0,
    causal=False,
    dropout=0.0,
    prefix=0,
    scale=None,
    prefix_dtype=None,
    sentences=(),
    reach=None,
) -> dict:
    """mask: None, "padding", "rows" (some queries see nothing), "additive" or "finfo"; bias: its batch size, or 0.

    sentences: (queries, keys) of each in a packed row, in place of batch, queries and keys; reach: R of distance_bias.
    """
    if sentences:
        batch, (queries, keys) = 1, map(sum, zip(*sentences, strict=True))

    def heads_of(length):
        return draw(batch, length, heads, d).transpose(1, 2)

    prefix_dtype = prefix_dtype or draw.dtype
    return {
        "q": heads_of(queries),
        "k": heads_of(keys),
        "v": heads_of(keys),
        "mask": attention_mask(draw, mask, batch, heads, queries, keys),
        "bias": draw(bias, heads, queries, keys) if bias else None,
        "prefix_k": draw(prefix, heads, d, dtype=prefix_dtype) if prefix else None,
        "prefix_v": draw(prefix, heads, d, dtype=prefix_dtype) if prefix else None,
        "causal": causal,
        "scale": d**-0.5 if scale is None else scale,
        "dropout": dropout,
        "seed": draw.seed() if dropout else None,
        "cu_seqlens_q": boundaries([pair[0] for pair in sentences], draw.device) if sentences else None,
        "cu_seqlens_k": boundaries([pair[1] for pair in sentences], draw.device) if sentences else None,
        "distance_bias": draw(heads, 2 * reach + 1) if reach is not None else None,
        "do": heads_of(queries),
    }


def boundaries(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Where sentences of these lengths begin in a packed row, and last their sum: int32 (sentences + 1,)."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def attention_mask(draw: Source, kind: str | None, batch: int, heads: int, queries: int, keys: int) -> Tensor | None:
    if kind is None:
        return None
    if kind == "additive":
        return draw(1, heads, queries, keys, dtype=torch.float32)
    if kind == "padding":
        visible = draw(batch, 1, 1, keys, dtype=torch.float32) > -0.5
        visible[..., :1] = True
        return visible
    visible = draw(batch, 1, queries, keys, dtype=torch.float32) > 0
    visible[:, :, ::3] = False
    if kind == "rows":
        return visible
    lowest = torch.finfo(torch.float32).min
    return torch.zeros_like(visible, dtype=torch.float32).masked_fill_(~visible, lowest)


def linear_cross_entropy_arguments(
    draw: Source,
    rows=(17,),
    d=24,
    words=72,
    bias=True,
    label_smoothing=0.1,
    smoothing="uniform",
    logit_scale=1.0,
    chunk_rows=7,
    dlosses=False,
    weight_dtype=None,
    counted=-1,
    frozen=False,
) -> dict:
    labels = torch.randint(0, words, rows, generator=draw.generator)
    labels.view(-1)[2::5] = -100
    return {
        "hidden": draw(*rows, d),
        "weight": draw(words, d, std=2 * d**-0.5, dtype=weight_dtype),
        "labels": labels.to(draw.device),
        "bias": draw(words) if bias else None,
        "label_smoothing": label_smoothing,
        "smoothing": smoothing,
        "logit_scale": logit_scale,
        "ignore_index": -100,
        "chunk_bytes": chunk_rows * words * draw.dtype.itemsize,
        "counted": counted,
        "dlosses": draw(labels.numel(), dtype=torch.float32) if dlosses else None,
        "frozen": frozen,
    }


def activation_arguments(draw: Source, rows=(17,), features=72, kind="relu", dropout=0.0, gated=False) -> dict:
    z = draw(*rows, features, std=2.0)
    gate = {"g": draw(*rows, features)} if gated else {}
    seed = draw.seed() if dropout else None
    return {"z": z, **gate, "kind": kind, "dropout": dropout, "seed": seed, "dy": draw(*rows, features)}


def dropout_add_arguments(draw: Source, rows=(17,), features=72, p=0.3, stream=None) -> dict:
    stream = stream or draw.dtype
    x, residual, dy = draw(*rows, features), draw(*rows, features, dtype=stream), draw(*rows, features, dtype=stream)
    return {"x": x, "residual": residual, "p": p, "seed": draw.seed(), "dy": dy}


def dropout_add_norm_arguments(
    draw: Source, rows=(17,), d=72, p=0.3, centred=True, bias=True, stream=None, parameter_dtype=None, more=True
) -> dict:
    """more: whether h has a gradient from elsewhere, as it has in a layer with its norms in front."""
    stream, parameter_dtype = stream or draw.dtype, parameter_dtype or draw.dtype
    wide = torch.promote_types(draw.dtype, stream)
    return {
        "y": draw(*rows, d),
        "residual": draw(*rows, d, dtype=stream),
        "weight": draw(d, dtype=parameter_dtype),
        "bias": draw(d, dtype=parameter_dtype) if bias and centred else None,
        "eps": 1e-5,
        "p": p,
        "seed": draw.seed() if p else None,
        "centred": centred,
        "du": draw(*rows, d, dtype=torch.promote_types(wide, parameter_dtype)),
        "dh": draw(*rows, d, dtype=wide) if more else None,
    }


def quantized_weight(draw: Source, n: int, k: int, storage: str) -> Tensor:
    """A weight (n, k) that every backend gets with the same bits."""
    from petl_kernels.ops.quantized import quantize  # see table()

    dense = normal(draw.generator, n, k) * k**-0.5
    return quantize(dense.to(draw.dtype), storage).to(draw.device)


def quantized_project_arguments(draw: Source, rows=17, n=40, k=72, storage="nf4", bias=True) -> dict:
    return {
        "x": draw(rows, k),
        "weight": quantized_weight(draw, n, k, storage),
        "bias": draw(n) if bias else None,
        "dy": draw(rows, n),
    }


def _with_bias(device, dtype):
    return frozen_linear_arguments(Source(device, dtype), rows=(33,))


def _without_bias(device, dtype):
    return frozen_linear_arguments(Source(device, dtype), rows=(2, 9), bias=False)


def _one_layer(device, dtype):
    return lora_linear_arguments(Source(device, dtype), rows=(33,), bias=False)


def _group_with_dropout(device, dtype):
    return lora_linear_arguments(
        Source(device, dtype),
        rows=(3, 43),
        ns=(40, 56),
        ranks=(4, 8),
        dropout=0.3,
        adapter_dtype=torch.float32,
    )


def _two_of_three(device, dtype):
    return lora_border_arguments(
        Source(device, dtype), rows=43, ns=(40, 56, 40), ranks=(4, 0, 8), adapter_dtype=torch.float32
    )


def _frozen_together(device, dtype):
    return lora_border_arguments(Source(device, dtype), ranks=(0, 0), ns=(40, 24), more=8)


def _relu(device, dtype):
    return bottleneck_adapter_arguments(Source(device, dtype), rows=(33,))


def _gelu_fp32_adapter(device, dtype):
    return bottleneck_adapter_arguments(
        Source(device, dtype), rows=(3, 43), activation="gelu", adapter_dtype=torch.float32
    )


def _silu_parallel(device, dtype):
    return bottleneck_adapter_arguments(
        Source(device, dtype),
        rows=(17,),
        bias=False,
        norm=False,
        parallel=True,
        activation="silu",
        scale=4.0,
    )


def _norm(device, dtype):
    return layer_norm_arguments(Source(device, dtype), rows=(3, 43))


def _norm_fp32_parameters(device, dtype):
    return layer_norm_arguments(Source(device, dtype), rows=(33,), parameter_dtype=torch.float32)


def _norm_without_bias(device, dtype):
    return layer_norm_arguments(Source(device, dtype), bias=False)


def _rms(device, dtype):
    return rms_norm_arguments(Source(device, dtype), rows=(3, 43))


def _rms_fp32_weight(device, dtype):
    return rms_norm_arguments(Source(device, dtype), rows=(33,), parameter_dtype=torch.float32)


def _relu_bits(device, dtype):
    return frozen_ffn_arguments(Source(device, dtype), rows=(3, 43), f=75)


def _relu_bits_in_whole_words(device, dtype):
    return frozen_ffn_arguments(Source(device, dtype), rows=(130,), d=64, f=256)


def _gelu_recomputed(device, dtype):
    return frozen_ffn_arguments(Source(device, dtype), activation="gelu", recompute=True)


def _gelu_tanh_gated(device, dtype):
    return frozen_ffn_arguments(Source(device, dtype), rows=(33,), bias=False, gated=True, activation="gelu_tanh")


def _silu_kept(device, dtype):
    return frozen_ffn_arguments(Source(device, dtype), activation="silu")


def _causal_with_dropout(device, dtype):
    return attention_arguments(Source(device, dtype), queries=37, keys=43, mask="padding", causal=True, dropout=0.3)


def _relative_bias(device, dtype):
    return attention_arguments(Source(device, dtype), queries=33, keys=33, mask="rows", bias=1, scale=1.0)


def _prefix_of_cross_attention(device, dtype):
    return attention_arguments(
        Source(device, dtype), queries=37, keys=70, d=24, mask="rows", prefix=5, prefix_dtype=torch.float32
    )


def _packed_sentences(device, dtype):
    sentences = ((37, 43), (0, 5), (1, 1), (30, 18), (4, 0), (0, 0))
    return attention_arguments(
        Source(device, dtype), sentences=sentences, reach=9, causal=True, dropout=0.3, prefix=4, scale=1.0
    )


def _uniform(device, dtype):
    return linear_cross_entropy_arguments(Source(device, dtype), rows=(3, 11))


def _fairseq_scaled_rows(device, dtype):
    return linear_cross_entropy_arguments(
        Source(device, dtype), (17,), words=131, bias=False, smoothing="fairseq", logit_scale=0.5, dlosses=True
    )


def _no_smoothing(device, dtype):
    return linear_cross_entropy_arguments(Source(device, dtype), rows=(17,), label_smoothing=0.0)


def _frozen_table(device, dtype):
    """The way by words, in several blocks; the last word is so likely in some rows that what was summed is rescaled."""
    options = {"words": 2100, "bias": False, "frozen": True, "chunk_rows": 3}
    given = linear_cross_entropy_arguments(Source(device, dtype), (31,), **options)
    given["weight"][-1] *= 30
    return given


def _packed_relu(device, dtype):
    return activation_arguments(Source(device, dtype), rows=(33,), features=77)


def _gelu_with_dropout(device, dtype):
    return activation_arguments(Source(device, dtype), rows=(3, 11), kind="gelu", dropout=0.3)


def _gelu_tanh(device, dtype):
    return activation_arguments(Source(device, dtype), kind="gelu_tanh")


def _silu(device, dtype):
    return activation_arguments(Source(device, dtype), kind="silu")


def _gated_gelu_tanh(device, dtype):
    return activation_arguments(Source(device, dtype), rows=(33,), kind="gelu_tanh", gated=True)


def _gated_silu_with_dropout(device, dtype):
    return activation_arguments(Source(device, dtype), rows=(3, 11), features=77, kind="silu", dropout=0.3, gated=True)


def _one_dtype(device, dtype):
    return dropout_add_arguments(Source(device, dtype), rows=(3, 11), features=77)


def _fp32_stream(device, dtype):
    return dropout_add_arguments(Source(device, dtype), rows=(33,), stream=torch.float32)


def _sum_and_norm(device, dtype):
    return dropout_add_norm_arguments(Source(device, dtype), rows=(3, 43))


def _fp32_stream_and_norm(device, dtype):
    return dropout_add_norm_arguments(
        Source(device, dtype), rows=(33,), d=61, stream=torch.float32, parameter_dtype=torch.float32, more=False
    )


def _sum_and_rms(device, dtype):
    return dropout_add_norm_arguments(Source(device, dtype), p=0.0, centred=False)


def _matrix(device, dtype):
    return {"weight": Source(device, dtype)(33, 75)}


def _int8_rows(device, dtype):
    return {"weight": quantized_weight(Source(device, dtype), 33, 75, "int8"), "first_row": 5}


def _nf4_rows(device, dtype):
    return {"weight": quantized_weight(Source(device, dtype), 33, 75, "nf4"), "first_row": 5}


def _int8_product(device, dtype):
    return quantized_project_arguments(Source(device, dtype), storage="int8")


def _nf4_product(device, dtype):
    return quantized_project_arguments(Source(device, dtype), rows=33, n=96, k=128)


def _nf4_odd_product(device, dtype):
    return quantized_project_arguments(Source(device, dtype), rows=129, n=33, k=75, bias=False)


def _int8_ids(device, dtype):
    weight = quantized_weight(Source(device, dtype), 33, 75, "int8")
    return {"weight": weight, "ids": torch.tensor([0, 32, 7, 7, 1], device=device)}


def _nf4_ids(device, dtype):
    weight = quantized_weight(Source(device, dtype), 33, 75, "nf4")
    return {"weight": weight, "ids": torch.tensor([0, 32, 7, 7, 1], device=device)}


CASES = {
    "frozen_linear": (_with_bias, _without_bias),
    "lora_linear": (_one_layer, _group_with_dropout),
    "lora_border": (_two_of_three, _frozen_together),
    "bottleneck_adapter": (_relu, _gelu_fp32_adapter, _silu_parallel),
    "layer_norm": (_norm, _norm_fp32_parameters, _norm_without_bias),
    "rms_norm": (_rms, _rms_fp32_weight),
    "frozen_ffn": (_relu_bits, _relu_bits_in_whole_words, _gelu_recomputed, _gelu_tanh_gated, _silu_kept),
    "attention": (_causal_with_dropout, _relative_bias, _prefix_of_cross_attention, _packed_sentences),
    "linear_cross_entropy": (_uniform, _fairseq_scaled_rows, _no_smoothing, _frozen_table),
    "activation": (_packed_relu, _gelu_with_dropout, _gelu_tanh, _silu),
    "gated_activation": (_gated_gelu_tanh, _gated_silu_with_dropout),
    "dropout_add": (_one_dtype, _fp32_stream),
    "dropout_add_norm": (_sum_and_norm, _fp32_stream_and_norm, _sum_and_rms),
    "quantize_int8": (_matrix,),
    "quantize_nf4": (_matrix,),
    "dequantize": (_int8_rows, _nf4_rows),
    "quantized_project": (_int8_product, _nf4_product, _nf4_odd_product),
    "quantized_embedding": (_int8_ids, _nf4_ids),
}
