"""Does a backend compute what the reference computes? Used by the router on CUDA devices, `petl-mt doctor` and tests.

The criterion: against the reference in float64, a kernel's error may be at most twice the error that the reference
itself makes in the dtype at hand, plus two units in the last place of the largest value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from petl_kernels import backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Values = dict[str, Tensor]


def table(device: torch.device | str | None = None) -> list[tuple[str, str, str, str, bool]]:
    """Rows (op, backend, dtype, "pass" or the error, whether the backend is the op's default) for one device."""
    from petl_kernels.ops import OPS

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows = []
    for op in OPS:
        default = backends.backend_of(op, device)
        for backend in backends.serving(op, device):
            for dtype in DTYPES:
                if backend == "triton" and dtype == torch.bfloat16 and backends.triton_interprets():
                    continue
                error = check(op, backend, device, dtype)
                rows.append((op, backend, str(dtype).removeprefix("torch."), error or "pass", backend == default))
    return rows


def check(op: str, backend: str, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Compare forward and backward of one backend with the reference on small, odd sizes; None or the first error."""
    for case in CASES[op]:
        try:
            error = compare(op, backend, case(torch.device(device), dtype))
        except Exception as problem:  # a kernel that cannot even run must not stop the caller
            lines = str(problem).splitlines()
            error = f"{type(problem).__name__}: {lines[0] if lines else ''}"
        if error:
            return f"{case.__name__}: {error}"
    return None


def compare(op: str, backend: str, arguments: dict) -> str | None:
    """Every value and gradient of one call, by name, held to the criterion; None or the first that fails."""
    exact = run(op, "reference", _in_float64(arguments))
    reference = run(op, "reference", arguments)
    computed = run(op, backend, arguments)
    for name, value in exact.items():
        if error := compare_tensors(name, computed[name], reference[name], value):
            return error
    return None


def compare_tensors(name: str, computed: Tensor, reference: Tensor, exact: Tensor) -> str | None:
    if computed.shape != exact.shape or computed.dtype != reference.dtype:
        return (
            f"{name} is {computed.dtype} of shape {tuple(computed.shape)}, "
            f"expected {reference.dtype} of {tuple(exact.shape)}"
        )
    if exact.numel() == 0:
        return None
    error = (computed.double() - exact).abs().max().item()
    allowed = 2 * (reference.double() - exact).abs().max().item()
    allowed += 2 * torch.finfo(computed.dtype).eps * exact.abs().max().item()
    if not error <= allowed:  # also true for NaN
        return f"{name} is off by {error:.3g}, allowed {allowed:.3g}"
    return None


@torch.no_grad()
def run(op: str, backend: str, arguments: dict) -> Values:
    """Outputs and all gradients of one op by name, straight from a backend's kernels."""
    forward = backends.kernel_of(op, backend) or backends.kernel_of(op, "reference")
    backward = backends.kernel_of(f"{op}_backward", backend) or backends.kernel_of(f"{op}_backward", "reference")
    return _RUN[op](forward, backward, arguments)


def _run_frozen_linear(forward: Callable, backward: Callable, given: dict) -> Values:
    y = forward(given["x"], given["weight"], given["bias"])
    dx, dbias = backward(given["dy"], given["weight"], True, given["bias"] is not None)
    return {"y": y, "dx": dx, "dbias": _sum_dtype(dbias)}


def _run_lora_linear(forward: Callable, backward: Callable, given: dict) -> Values:
    fixed = [given[name] for name in ("weights", "biases", "a", "b", "scales", "dropout", "seed")]
    weights, biases, *adapters = fixed
    ys, s = forward(given["x"], *fixed)
    need_dbias = [bias is not None for bias in biases]
    dx, da, db, dbias = backward(given["dys"], given["x"], s, weights, *adapters, True, need_dbias)
    values = {"s": s, "dx": dx}
    for g in range(len(weights)):
        values |= {f"y{g}": ys[g], f"da{g}": da[g], f"db{g}": db[g], f"dbias{g}": _sum_dtype(dbias[g])}
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


_RUN = {
    "frozen_linear": _run_frozen_linear,
    "lora_linear": _run_lora_linear,
    "bottleneck_adapter": _run_bottleneck_adapter,
    "activation": _run_activation,
    "gated_activation": _run_gated_activation,
    "dropout_add": _run_dropout_add,
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
        values = torch.randn(shape, generator=self.generator) * std
        return values.to(self.device, dtype or self.dtype)

    def seed(self) -> Tensor:
        return torch.randint(0, 2**63 - 1, (1,), generator=self.generator).to(self.device)


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
    down_bias = draw(m, dtype=adapter_dtype)
    if activation == "relu" and draw.dtype.itemsize == 2:
        # Rounding may put a z near 0 on the other side of the kink, in the reference as in a kernel: stay away from it.
        down_bias = torch.tensor([5.0, -5.0]).repeat(m)[:m].to(down_bias)
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


def activation_arguments(draw: Source, rows=(17,), features=72, kind="relu", dropout=0.0, gated=False) -> dict:
    z = draw(*rows, features, std=2.0)
    gate = {"g": draw(*rows, features)} if gated else {}
    seed = draw.seed() if dropout else None
    return {"z": z, **gate, "kind": kind, "dropout": dropout, "seed": seed, "dy": draw(*rows, features)}


def dropout_add_arguments(draw: Source, rows=(17,), features=72, p=0.3, stream=None) -> dict:
    stream = stream or draw.dtype
    x, residual, dy = draw(*rows, features), draw(*rows, features, dtype=stream), draw(*rows, features, dtype=stream)
    return {"x": x, "residual": residual, "p": p, "seed": draw.seed(), "dy": dy}


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


CASES = {
    "frozen_linear": (_with_bias, _without_bias),
    "lora_linear": (_one_layer, _group_with_dropout),
    "bottleneck_adapter": (_relu, _gelu_fp32_adapter, _silu_parallel),
    "activation": (_packed_relu, _gelu_with_dropout, _gelu_tanh, _silu),
    "gated_activation": (_gated_gelu_tanh, _gated_silu_with_dropout),
    "dropout_add": (_one_dtype, _fp32_stream),
}
