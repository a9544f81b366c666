"""Calls that between them take every path of the Triton kernels, at sizes that no tile divides.

The interpreter's tiles are 32 wide or less: 33 rows are two tiles, 129 rows several parts of a sum over tokens, and an
adapter with a bottleneck above 32 has the library's products. On a GPU the same calls run, and `LARGE`
beside them, at sizes that take the tiles of its tables.
"""

from __future__ import annotations

import torch

from petl_kernels.parity import activation_arguments as activation
from petl_kernels.parity import attention_arguments as attention
from petl_kernels.parity import bottleneck_adapter_arguments as adapter
from petl_kernels.parity import dropout_add_arguments as dropout_add
from petl_kernels.parity import dropout_add_norm_arguments as dropout_add_norm
from petl_kernels.parity import frozen_ffn_arguments as ffn
from petl_kernels.parity import frozen_linear_arguments as frozen
from petl_kernels.parity import layer_norm_arguments as layer_norm
from petl_kernels.parity import linear_cross_entropy_arguments as loss
from petl_kernels.parity import lora_border_arguments as border
from petl_kernels.parity import lora_linear_arguments as lora
from petl_kernels.parity import quantized_weight
from petl_kernels.parity import rms_norm_arguments as rms_norm


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the same values behind strides in which neither rows nor columns are contiguous."""
    wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
    wide[..., ::2] = tensor
    return wide[..., ::2]


def _strided_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the same values as columns of a wider tensor: rows further apart than they are long."""
    return torch.cat([tensor, torch.zeros_like(tensor)], -1)[..., : tensor.shape[-1]]


def _lora_strided(draw):
    given = lora(draw, (3, 17), ns=(40, 33), ranks=(5, 16), dropout=0.5)
    return given | {"x": _strided(given["x"]), "dys": [_strided_rows(dy) for dy in given["dys"]]}


def _lora_some_biases(draw):
    given = lora(draw, (33,), ns=(32, 40, 7), k=45, ranks=(4, 8, 4))
    return given | {"biases": [given["biases"][0], None, given["biases"][2]]}


def _lora_quantized(draw):
    given = lora(draw, (33,), ns=(40, 33, 7, 24), k=72, ranks=(4, 8, 4, 2), dropout=0.3)
    nf4, int8 = (quantized_weight(draw, n, 72, storage) for n, storage in ((40, "nf4"), (24, "int8")))
    return given | {"weights": [nf4, *given["weights"][1:3], int8]}


def _ffn_quantized(draw):
    given = ffn(draw, (97,), d=24, f=40, gated=True, activation="silu", recompute=True)
    sizes = {"w1": (40, 24, "nf4"), "w2": (24, 40, "int8"), "gate": (40, 24, "nf4")}
    return given | {name: quantized_weight(draw, *size) for name, size in sizes.items()}


def _loss_quantized(draw):
    return loss(draw, (17,), d=64, words=200) | {"weight": quantized_weight(draw, 200, 64, "nf4")}


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


def _activation_strided(draw):
    given = activation(draw, (3, 11), features=45, dropout=0.3)
    return given | {"z": _strided(given["z"]), "dy": _strided_rows(given["dy"])}


def _gated_halves(draw):
    given = activation(draw, (3, 11), features=40, kind="silu", gated=True)
    z, g = torch.cat([given["z"], given["g"]], -1).chunk(2, -1)
    return given | {"z": z, "g": g, "dy": _strided(given["dy"])}


def _dropout_add_strided(draw):
    given = dropout_add(draw, (3, 11), features=45)
    return (
        given | {name: _strided_rows(given[name]) for name in ("x", "dy")} | {"residual": _strided(given["residual"])}
    )


def _dropout_add_norm_strided(draw):
    given = dropout_add_norm(draw, (3, 11), d=45)
    strided = {name: _strided(given[name]) for name in ("residual", "weight", "dh")}
    return given | strided | {name: _strided_rows(given[name]) for name in ("y", "du")}


def _attention_strided(draw):
    given = attention(draw, queries=20, keys=20, mask="rows")
    return given | {name: _strided(given[name]) for name in ("q", "k", "v")} | {"do": draw(16).expand(2, 3, 20, 16)}


def _loss_switched_off(draw):
    """A whole block of words that a bias of -inf switches off."""
    given = loss(draw, (9,), words=97, label_smoothing=0.0)
    given["bias"] -= 200
    given["bias"][32:64] = -torch.inf
    return given | {"labels": given["labels"].where((given["labels"] < 32) | (given["labels"] >= 64), 0)}


def _loss_labels_apart(draw, frozen):
    """Labels that do not lie side by side, and have ones between them that are no words."""
    given = loss(draw, (9,), words=40, bias=not frozen, frozen=frozen)
    given["labels"] = given["labels"].clamp(min=0)
    return given | {"labels": torch.stack([given["labels"], torch.full_like(given["labels"], -1)], 1)[:, 0]}


def _loss_frozen(draw, words, loud=1, **options):
    """Returns a loss by words; a large last word makes m rise in some rows."""
    given = loss(draw, words=words, bias=False, frozen=True, **options)
    given["weight"][-1] *= loud
    return given


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
    "quantized": _lora_quantized,
    "no-rows": lambda draw: lora(draw, (2, 0), ns=(37, 8), k=45, ranks=(4, 4), dropout=0.5),
}
BORDER = {
    "1-row-rank-1": lambda draw: border(draw, 1, ns=(37,), k=45, ranks=(1,)),
    "129-rows-2-of-3": lambda draw: border(
        draw, 129, ns=(50, 33, 70), k=45, ranks=(4, 0, 20), more=8, adapter_dtype=torch.float32
    ),
    "rank-40": lambda draw: border(draw, 17, ns=(40, 24), k=33, ranks=(0, 40), bias=False),
    "frozen": lambda draw: border(draw, 33, ns=(40, 24, 33), k=40, ranks=(0, 0, 0)),
    "frozen-no-bias": lambda draw: border(draw, 5, ns=(40, 24), k=40, ranks=(0, 0), bias=False),
    "last-without": lambda draw: border(draw, 40, ns=(16, 20), k=36, ranks=(8, 0)),
    "no-rows": lambda draw: border(draw, 0, ns=(37, 8), k=45, ranks=(4, 4)),
}
ADAPTER = {
    "1-row": lambda draw: adapter(draw, (1,), d=45, m=5),
    "129-rows-gelu-offset": _adapter_offset,
    "129-rows-relu": lambda draw: adapter(draw, (3, 43), d=72, m=24, scale=0.7),
    "no-norm-silu": lambda draw: adapter(draw, (17,), d=40, m=20, norm=False, activation="silu"),
    "no-bias-parallel": lambda draw: adapter(draw, (33,), d=40, m=8, bias=False, parallel=True),
    "no-norm-no-bias": lambda draw: adapter(draw, (9,), d=33, m=8, bias=False, norm=False),
    "products-silu": lambda draw: adapter(draw, (33,), d=45, m=40, activation="silu"),
    "products-gelu-fp32-adapter": lambda draw: adapter(
        draw, (33,), d=45, m=70, activation="gelu", parallel=True, adapter_dtype=torch.float32
    ),
    "products-no-norm": lambda draw: adapter(draw, (17,), d=33, m=80, norm=False),
    "products-long-rows": lambda draw: adapter(draw, (9,), d=72, m=40, bias=False),
    "strided": _adapter_strided,
    "no-rows": lambda draw: adapter(draw, (0,), d=45, m=5),
}
LAYER_NORM = {
    "1-row": lambda draw: layer_norm(draw, (1,), d=7),
    "35-rows": lambda draw: layer_norm(draw, (35,), d=72),
    "fp32-parameters": lambda draw: layer_norm(draw, (3, 3), d=45, parameter_dtype=torch.float32),
    "no-bias": lambda draw: layer_norm(draw, (9,), d=32, bias=False),
    "offset": _norm_offset,
    "strided": _norm_strided,
    "no-rows": lambda draw: layer_norm(draw, (0,), d=45),
}
RMS_NORM = {
    "1-row": lambda draw: rms_norm(draw, (1,), d=7),
    "35-rows": lambda draw: rms_norm(draw, (35,), d=72),
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
    "quantized": _ffn_quantized,
    "no-rows": lambda draw: ffn(draw, (0,), d=24, f=40),
}
ACTIVATION = {
    "1-row-relu": lambda draw: activation(draw, (1,), features=45),
    "relu": lambda draw: activation(draw, (3, 11), features=72),
    "width-1-relu": lambda draw: activation(draw, (5,), features=1, dropout=0.3),
    "relu-dropout": lambda draw: activation(draw, (33,), features=40, dropout=0.3),
    "gelu": lambda draw: activation(draw, (17,), features=77, kind="gelu"),
    "gelu-tanh-dropout": lambda draw: activation(draw, (33,), features=40, kind="gelu_tanh", dropout=0.3),
    "silu-dropout": lambda draw: activation(draw, (33,), features=37, kind="silu", dropout=0.5),
    "strided": _activation_strided,
    "no-rows": lambda draw: activation(draw, (2, 0), features=45, dropout=0.5),
}
GATED = {
    "1-row-gelu": lambda draw: activation(draw, (1,), features=45, kind="gelu", gated=True),
    "gelu-tanh": lambda draw: activation(draw, (3, 11), features=72, kind="gelu_tanh", gated=True),
    "silu-dropout": lambda draw: activation(draw, (33,), features=37, kind="silu", dropout=0.5, gated=True),
    "relu-dropout": lambda draw: activation(draw, (33,), features=40, dropout=0.3, gated=True),
    "halves": _gated_halves,
    "no-rows": lambda draw: activation(draw, (0,), features=45, kind="silu", dropout=0.5, gated=True),
}
DROPOUT_ADD = {
    "1-row": lambda draw: dropout_add(draw, (1,), features=45),
    "3x11-rows": lambda draw: dropout_add(draw, (3, 11), features=72, p=0.1),
    "fp32-stream": lambda draw: dropout_add(draw, (33,), features=64, stream=torch.float32),
    "strided": _dropout_add_strided,
    "no-rows": lambda draw: dropout_add(draw, (0,), features=45),
}
# In the interpreter rows of more than 64 are too long for one program, and those after the 16th are its second turn.
DROPOUT_ADD_NORM = {
    "1-row": lambda draw: dropout_add_norm(draw, (1,), d=45),
    "19-rows": lambda draw: dropout_add_norm(draw, (19,), d=64, p=0.1),
    "too-long": lambda draw: dropout_add_norm(draw, (5,), d=72),
    "too-long-rms": lambda draw: dropout_add_norm(draw, (3,), d=65, p=0.0, centred=False),
    "no-bias-no-dropout": lambda draw: dropout_add_norm(draw, (5,), d=20, p=0.0, bias=False, more=False),
    "rms-fp32-stream": lambda draw: dropout_add_norm(
        draw, (18,), d=52, centred=False, stream=torch.float32, parameter_dtype=torch.float32
    ),
    "strided": _dropout_add_norm_strided,
    "no-rows": lambda draw: dropout_add_norm(draw, (0,), d=45),
}
LOSS = {
    "1-row-1-block": lambda draw: loss(draw, (1,), words=20),
    "33-rows-fairseq": lambda draw: loss(draw, (3, 11), words=131, smoothing="fairseq", logit_scale=0.5),
    "no-smoothing-no-bias": lambda draw: loss(draw, (17,), words=97, bias=False, label_smoothing=0.0),
    "dlosses-power-of-two-words": lambda draw: loss(draw, (17,), words=128, dlosses=True, chunk_rows=17),
    "switched-off": _loss_switched_off,
    "quantized": _loss_quantized,
    "no-rows": lambda draw: loss(draw, (0,), words=40),
    "labels-apart": lambda draw: _loss_labels_apart(draw, False),
    "by-words-labels-apart": lambda draw: _loss_labels_apart(draw, True),
    "by-words-1-row-1-word": lambda draw: _loss_frozen(draw, 1, rows=(1,)),
    "by-words-fairseq-dlosses": lambda draw: _loss_frozen(draw, 131, rows=(3, 11), smoothing="fairseq", dlosses=True),
    "by-words-rising": lambda draw: _loss_frozen(draw, 2100, loud=30, rows=(17,), d=45, label_smoothing=0.0),
    "by-words-smoothed-rising": lambda draw: _loss_frozen(draw, 2100, loud=30, rows=(17,), chunk_rows=3),
}
# Blocks with many sentences, sentences of many blocks, and empty ones, of which a graph has many at the end.
SENTENCES = ((5, 7), (0, 3), (1, 1), (9, 4), (2, 0), (0, 0), (70, 41), (33, 40), (1, 2), *[(0, 0)] * 5)
LONG_SENTENCES = ((5, 7), (0, 3), (2, 0), (131, 70), (3, 90), *[(0, 0)] * 3)  # of more than one block of queries, few
FEW_SENTENCES = ((5, 7), (0, 3), (2, 0), (33, 40), (0, 0))
ATTENTION = {
    "1-query": lambda draw: attention(draw, batch=1, heads=2, queries=1, keys=1, d=1),
    "wide": lambda draw: attention(draw, batch=1, heads=1, queries=20, keys=33, d=100),
    "too-wide": lambda draw: attention(draw, heads=1, queries=5, keys=6, d=130, prefix=2),
    "padding": lambda draw: attention(draw, batch=1, heads=2, queries=33, keys=70, d=24, mask="padding"),
    "rows-that-see-nothing": lambda draw: attention(draw, batch=1, heads=2, queries=37, keys=40, mask="rows"),
    "finfo-min": lambda draw: attention(draw, batch=1, heads=2, queries=37, keys=40, mask="finfo"),
    "additive": lambda draw: attention(draw, batch=1, heads=2, queries=18, keys=40, mask="additive", scale=1.0),
    "causal": lambda draw: attention(draw, batch=1, heads=2, queries=70, keys=70, d=33, causal=True),
    "causal-more-keys": lambda draw: attention(draw, batch=1, heads=2, queries=33, keys=70, causal=True, prefix=3),
    "causal-fewer-keys": lambda draw: attention(draw, batch=1, heads=2, queries=70, keys=33, causal=True),
    "bias": lambda draw: attention(draw, batch=1, heads=2, queries=33, keys=33, bias=1, mask="padding"),
    "dropout": lambda draw: attention(draw, batch=1, heads=2, queries=33, keys=50, dropout=0.3),
    "dropout-long": lambda draw: attention(draw, batch=1, heads=1, queries=70, keys=50, dropout=0.3),
    "prefix": lambda draw: attention(
        draw, batch=1, heads=2, queries=33, keys=50, prefix=20, prefix_dtype=torch.float32
    ),
    "everything": lambda draw: attention(
        draw, heads=2, queries=20, keys=40, d=20, prefix=5, mask="rows", bias=2, causal=True, dropout=0.4
    ),
    "strided": _attention_strided,
    "distance": lambda draw: attention(
        draw, batch=1, heads=2, queries=33, keys=70, mask="rows", prefix=3, reach=20, causal=True
    ),
    "packed": lambda draw: attention(draw, heads=2, sentences=SENTENCES, dropout=0.3),
    "packed-long-dropout": lambda draw: attention(
        draw, heads=1, d=20, sentences=LONG_SENTENCES, dropout=0.2, causal=True
    ),
    "packed-causal": lambda draw: attention(draw, heads=1, d=20, sentences=SENTENCES, causal=True, prefix=3),
    "packed-everything": lambda draw: attention(
        draw,
        heads=2,
        d=20,
        sentences=FEW_SENTENCES,
        causal=True,
        prefix=4,
        dropout=0.4,
        reach=6,
        prefix_dtype=torch.float32,
    ),
    "no-rows": lambda draw: attention(draw, batch=1, heads=2, queries=0, prefix=2, dropout=0.1),
    "no-keys": lambda draw: attention(draw, keys=0, prefix=2),
}
TABLES = {
    "frozen_linear": FROZEN,
    "lora_linear": LORA,
    "lora_border": BORDER,
    "bottleneck_adapter": ADAPTER,
    "layer_norm": LAYER_NORM,
    "rms_norm": RMS_NORM,
    "frozen_ffn": FFN,
    "activation": ACTIVATION,
    "gated_activation": GATED,
    "dropout_add": DROPOUT_ADD,
    "dropout_add_norm": DROPOUT_ADD_NORM,
    "linear_cross_entropy": LOSS,
    "attention": ATTENTION,
}
CASES = {f"{op}-{name}": (op, case) for op, cases in TABLES.items() for name, case in cases.items()}


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
    # Sizes that the tiles divide: products and copies of all blocks keep time with each other, and a race between them
    # shows as an error that stays. These sum what they multiply (triton/common.py).
    **{
        f"bottleneck_adapter-8192-rows-{m}{'' if norm else '-no-norm'}": (
            "bottleneck_adapter",
            lambda draw, m=m, norm=norm: adapter(draw, (8192,), 1024, m, norm=norm, adapter_dtype=torch.float32),
        )
        for m, norm in ((64, True), (256, True), (512, True), (64, False))
    },
    "lora_linear-8192-rows-bias": ("lora_linear", lambda draw: lora(draw, (8192,), (1024,), 1024, (16,))),
    **{
        f"layer_norm-{d}": ("layer_norm", lambda draw, d=d: layer_norm(draw, (2050,), d))
        for d in (1024, 1032, 4090, 8200)
    },
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
    **{
        f"{op}-{kind}-{features}-dropout-{p}": (
            op,
            lambda draw, op=op, kind=kind, features=features, p=p: activation(
                draw, (1030,), features, kind, dropout=p, gated=op == "gated_activation"
            ),
        )
        for op, kind in (("activation", "relu"), ("activation", "gelu"), ("gated_activation", "gelu_tanh"))
        for features in (4096, 1037)
        for p in (0.0, 0.1)
    },
    **{
        f"dropout_add-{features}": (
            "dropout_add",
            lambda draw, features=features: dropout_add(draw, (1030,), features, 0.1, torch.float32),
        )
        for features in (1024, 1037)
    },
    **{
        f"dropout_add_norm-{d}": (
            "dropout_add_norm",
            lambda draw, d=d: dropout_add_norm(draw, (2050,), d, 0.1, parameter_dtype=torch.float32),
        )
        for d in (1024, 1032, 4090, 4104)
    },
    **{
        f"linear_cross_entropy-{words}-words": (
            "linear_cross_entropy",
            lambda draw, words=words: loss(draw, (300,), 520, words, chunk_rows=128),
        )
        for words in (32000, 50021)
    },
    **{
        f"linear_cross_entropy-by-words-{words}": (
            "linear_cross_entropy",
            lambda draw, words=words: _loss_frozen(draw, words, loud=30, rows=(300,), d=520, chunk_rows=20),
        )
        for words in (32000, 50021)
    },
    **{
        f"attention-{d}-{name}": ("attention", lambda draw, d=d, options=options: attention(draw, d=d, **options))
        for d in (32, 64, 128)
        for name, options in {
            "plain": {"queries": 500, "keys": 700},
            "causal-dropout": {"queries": 520, "keys": 520, "causal": True, "dropout": 0.1, "mask": "padding"},
            "sentences": {"batch": 8, "queries": 128, "keys": 250, "dropout": 0.1, "mask": "padding"},
            "a-long-sentence": {"sentences": ((300, 200), *((n, n + 1) for n in range(20))), "dropout": 0.1},
            "prefix-finfo": {"queries": 300, "keys": 300, "prefix": 100, "mask": "finfo"},
            "packed": {
                "sentences": tuple((n, n + n % 3) for n in range(60)),
                "causal": True,
                "dropout": 0.1,
                "reach": 20,
            },
        }.items()
    },
}
