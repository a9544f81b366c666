"""Calls that between them take every path of the Triton kernels, at sizes that no tile divides.

The interpreter's tiles are 32 wide: 33 rows are two tiles, 129 rows several parts of a sum over tokens, and an
adapter with a bottleneck above 64 (32 in backward) takes two launches. On a GPU the same calls run, and `LARGE`
beside them, at sizes that take the tiles of its tables.
"""

from __future__ import annotations

import torch

from petl_kernels.parity import bottleneck_adapter_arguments as adapter
from petl_kernels.parity import frozen_linear_arguments as frozen
from petl_kernels.parity import linear_cross_entropy_arguments as loss
from petl_kernels.parity import lora_linear_arguments as lora


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


def _loss_switched_off(draw):
    """A whole block of words that a bias of -inf switches off."""
    given = loss(draw, (9,), words=97, label_smoothing=0.0)
    given["bias"] -= 200
    given["bias"][32:64] = -torch.inf
    return given | {"labels": given["labels"].where((given["labels"] < 32) | (given["labels"] >= 64), 0)}


LOSS = {
    "1-row-1-block": lambda draw: loss(draw, (1,), words=20),
    "33-rows-fairseq": lambda draw: loss(draw, (3, 11), words=131, smoothing="fairseq", logit_scale=0.5),
    "no-smoothing-no-bias": lambda draw: loss(draw, (17,), words=97, bias=False, label_smoothing=0.0),
    "dlosses-power-of-two-words": lambda draw: loss(draw, (17,), words=128, dlosses=True, chunk_rows=17),
    "switched-off": _loss_switched_off,
    "no-rows": lambda draw: loss(draw, (0,), words=40),
}
CASES = {
    f"{op}-{name}": (op, case)
    for op, cases in (
        ("frozen_linear", FROZEN),
        ("lora_linear", LORA),
        ("bottleneck_adapter", ADAPTER),
        ("linear_cross_entropy", LOSS),
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
    **{
        f"linear_cross_entropy-{words}-words": (
            "linear_cross_entropy",
            lambda draw, words=words: loss(draw, (300,), 520, words, chunk_rows=128),
        )
        for words in (32000, 50021)
    },
}
