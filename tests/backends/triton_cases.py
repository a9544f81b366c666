"""Calls that between them take every path of the Triton kernels, at sizes that no tile divides.

The interpreter's tiles are 32 wide: 33 rows are two tiles, 129 rows several parts of a sum over tokens, and an
adapter with a bottleneck above 64 (32 in backward) takes two launches. On a GPU the same calls run, and `LARGE`
beside them, at sizes that take the tiles of its tables.
"""

from __future__ import annotations

import torch

from petl_kernels.parity import bottleneck_adapter_arguments as adapter
from petl_kernels.parity import frozen_ffn_arguments as ffn
from petl_kernels.parity import frozen_linear_arguments as frozen
from petl_kernels.parity import layer_norm_arguments as layer_norm
from petl_kernels.parity import lora_linear_arguments as lora
from petl_kernels.parity import rms_norm_arguments as rms_norm


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values behind strides that neither rows nor columns are contiguous in."""
    wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
    wide[..., ::2] = tensor
    return wide[..., ::2]


def _strided_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as columns of a wider tensor: rows further apart than they are long."""
    return torch.cat([tensor, torch.zeros_like(tensor)], -1)[..., : tensor.shape[-1]]


def _lora_strided(draw):
    given = lora(draw, (3, 17), ns=(40, 33), ranks=(5, 16), dropout=0.5)
    return given | {"x": _strided(given["x"]), "dys": [_strided_rows(dy) for dy in given["dys"]]}


def _lora_some_biases(draw):
    given = lora(draw, (33,), ns=(32, 40, 7), k=45, ranks=(4, 8, 4))
    return given | {"biases": [given["biases"][0], None, given["biases"][2]]}


def _adapter_offset(draw):
    """Rows far from zero: what folding the LayerNorm into the product has to survive."""
    given = adapter(draw, (33,), d=100, m=20, activation="gelu", adapter_dtype=torch.float32)
    return given | {"x": given["x"] * 0.5 + 20}


def _adapter_strided(draw):
    given = adapter(draw, (3, 11), d=45, m=16, parallel=True, activation="silu")
    rows = {name: _strided_rows(given[name]) for name in ("residual", "dy")}
    return given | rows | {"x": _strided(given["x"])}


def _norm_strided(draw):
    given = layer_norm(draw, (3, 11), d=45)
    return given | {"x": _strided(given["x"]), "dy": _strided_rows(given["dy"]), "weight": _strided(given["weight"])}


def _norm_offset(draw):
    given = layer_norm(draw, (7,), d=70)
    return given | {"x": given["x"] * 0.5 + 20}


def _ffn_strided(draw):
    given = ffn(draw, (3, 11), d=24, f=45)
    return given | {"x": _strided(given["x"]), "dy": _strided_rows(given["dy"]), "w1": _strided(given["w1"])}


FROZEN = {
    "1-row": lambda draw: frozen(draw, (1,), n=37, k=45),
    "33-rows-no-bias": lambda draw: frozen(draw, (33,), n=64, k=33, bias=False),
    "3x43-rows": lambda draw: frozen(draw, (3, 43), n=37, k=72),
    "width-1": lambda draw: frozen(draw, (5,), n=1, k=1),
    "no-rows": lambda draw: frozen(draw, (0,), n=37, k=45),
}
LORA = {
    "1-row-rank-1": lambda draw: lora(draw, (1,), ns=(37,), k=45, ranks=(1,)),
    "129-rows-3-groups-dropout": lambda draw: lora(
        draw, (3, 43), ns=(50, 33, 70), k=45, ranks=(4, 9, 20), dropout=0.3, adapter_dtype=torch.float32
    ),
    "5-groups-dropout": lambda draw: lora(draw, (17,), ns=(16, 20, 8, 33, 5), k=36, ranks=(3, 4, 2, 1, 5), dropout=0.1),
    "rank-40": lambda draw: lora(draw, (17,), ns=(40, 24), k=33, ranks=(40, 8), bias=False),
    "some-biases": _lora_some_biases,
    "strided": _lora_strided,
    "no-rows": lambda draw: lora(draw, (2, 0), ns=(37, 8), k=45, ranks=(4, 4), dropout=0.5),
}
ADAPTER = {
    "1-row": lambda draw: adapter(draw, (1,), d=45, m=5),
    "129-rows-gelu-offset": _adapter_offset,
    "129-rows-relu": lambda draw: adapter(draw, (3, 43), d=72, m=24, scale=0.7),
    "no-norm-silu": lambda draw: adapter(draw, (17,), d=40, m=20, norm=False, activation="silu"),
    "no-bias-parallel": lambda draw: adapter(draw, (33,), d=40, m=8, bias=False, parallel=True),
    "no-norm-no-bias": lambda draw: adapter(draw, (9,), d=33, m=8, bias=False, norm=False),
    "split-backward-silu": lambda draw: adapter(draw, (33,), d=45, m=40, activation="silu"),
    "split-gelu-fp32-adapter": lambda draw: adapter(
        draw, (33,), d=45, m=70, activation="gelu", parallel=True, adapter_dtype=torch.float32
    ),
    "split-no-norm": lambda draw: adapter(draw, (17,), d=33, m=80, norm=False),
    "strided": _adapter_strided,
    "no-rows": lambda draw: adapter(draw, (0,), d=45, m=5),
}
LAYER_NORM = {
    "1-row": lambda draw: layer_norm(draw, (1,), d=7),
    "67-rows": lambda draw: layer_norm(draw, (67,), d=72),
    "fp32-parameters": lambda draw: layer_norm(draw, (3, 3), d=45, parameter_dtype=torch.float32),
    "no-bias": lambda draw: layer_norm(draw, (9,), d=32, bias=False),
    "offset": _norm_offset,
    "strided": _norm_strided,
    "no-rows": lambda draw: layer_norm(draw, (0,), d=45),
}
RMS_NORM = {
    "1-row": lambda draw: rms_norm(draw, (1,), d=7),
    "67-rows": lambda draw: rms_norm(draw, (67,), d=72),
    "fp32-weight": lambda draw: rms_norm(draw, (9,), d=45, parameter_dtype=torch.float32),
    "no-rows": lambda draw: rms_norm(draw, (2, 0), d=45),
}
# Chunks have 48 rows in the interpreter.
FFN = {
    "1-row": lambda draw: ffn(draw, (1,), d=7, f=5),
    "129-rows-relu": lambda draw: ffn(draw, (3, 43), d=24, f=75),
    "no-bias-silu": lambda draw: ffn(draw, (33,), d=40, f=64, bias=False, activation="silu"),
    "gelu": lambda draw: ffn(draw, (97,), d=24, f=33, activation="gelu"),
    "gelu-recomputed": lambda draw: ffn(draw, (97,), d=24, f=33, activation="gelu", recompute=True),
    "relu-gated": lambda draw: ffn(draw, (33,), d=24, f=40, gated=True),
    "gelu-tanh-gated": lambda draw: ffn(draw, (33,), d=24, f=40, bias=False, gated=True, activation="gelu_tanh"),
    "gelu-tanh-gated-recomputed": lambda draw: ffn(
        draw, (97,), d=24, f=40, gated=True, activation="gelu_tanh", recompute=True
    ),
    "strided": _ffn_strided,
    "no-rows": lambda draw: ffn(draw, (0,), d=24, f=40),
}
CASES = {
    f"{op}-{name}": (op, case)
    for op, cases in (
        ("frozen_linear", FROZEN),
        ("lora_linear", LORA),
        ("bottleneck_adapter", ADAPTER),
        ("layer_norm", LAYER_NORM),
        ("rms_norm", RMS_NORM),
        ("frozen_ffn", FFN),
    )
    for name, case in cases.items()
}

LARGE = {
    **{
        f"frozen_linear-{rows}-rows": ("frozen_linear", lambda draw, rows=rows: frozen(draw, (rows,), 1032, 520))
        for rows in (8200, 2050, 500)
    },
    **{
        f"lora_linear-rank-{rank}-dropout-{p}": (
            "lora_linear",
            lambda draw, rank=rank, p=p: lora(
                draw, (4100,), (1032, 520, 1032), 520, (rank, rank, rank), dropout=p, adapter_dtype=torch.float32
            ),
        )
        for rank in (8, 16, 64, 100)
        for p in (0.0, 0.1)
    },
    **{
        f"bottleneck_adapter-{m}-{activation}": (
            "bottleneck_adapter",
            lambda draw, m=m, activation=activation: adapter(
                draw, (8200,), 1032, m, activation=activation, adapter_dtype=torch.float32
            ),
        )
        for m, activation in ((16, "relu"), (64, "relu"), (64, "gelu"), (100, "silu"), (256, "relu"), (400, "gelu"))
    },
    **{f"layer_norm-{d}": ("layer_norm", lambda draw, d=d: layer_norm(draw, (2050,), d)) for d in (1032, 8200)},
    "rms_norm-1032": ("rms_norm", lambda draw: rms_norm(draw, (8200,), 1032, parameter_dtype=torch.float32)),
    **{
        f"frozen_ffn-{activation}-gated-{gated}": (
            "frozen_ffn",
            lambda draw, activation=activation, gated=gated: ffn(
                draw, (4100,), 520, 2060, gated=gated, activation=activation
            ),
        )
        for activation, gated in (("relu", False), ("gelu", False), ("gelu_tanh", True))
    },
}
