"""bench/predict/lean_step.py: a layer has the ops that the rule runs, and a step the work of its linears."""

from __future__ import annotations

from collections import Counter

import pytest
from layers.lean_cases import adapted, ragged, step

import petl_kernels as pk
from bench.predict import counts, lean_step
from bench.shapes import shape
from petl_kernels.layers import border
from petl_kernels.ops import define


def test_a_layer_runs_what_is_listed(monkeypatch):
    """Two encoder and two decoder layers with dropout of what is added, forward and backward."""
    monkeypatch.setattr(border, "DEVICES", {"cpu"})
    ran = Counter()
    for name, kernel in list(define._kernels.items()):
        monkeypatch.setitem(define._kernels, name, lambda *args, n=name, k=kernel: ran.update([n]) or k(*args))
    model = pk.lean(adapted("m2m100", "lora", dropout=0.2), tier=1)
    step(model, ragged(model))
    s = shape("nllb-600m", "cuda")
    layers = lean_step.encoder_layer(s, 8192), lean_step.decoder_layer(s, 8192, 8192)
    listed = Counter(op for layer in layers for op, _ in layer * 2 if op)
    assert {name: ran[name] for name in ran if not name.endswith("_backward")} == {**listed, "linear_cross_entropy": 1}
    # The gradient of a layer's first norm comes with that of the residual in one pass; nobody wants that of the
    # embeddings, which the first layer of either side has read.
    listed["dropout_add_norm"] += listed.pop("layer_norm") - 2
    del listed["layer_norm_from_statistics"]  # belongs to backward, and has none of its own
    assert {name.removesuffix("_backward"): ran[name] for name in ran if name.endswith("_backward")} == listed


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_a_layer_has_the_work_of_its_frozen_linears_and_of_lora(side):
    s, t = shape("nllb-600m", "cuda"), 8192
    layer = lean_step.encoder_layer(s, t) if side == "encoder" else lean_step.decoder_layer(s, t, t)
    frozen = counts.layer(side, t // 128, 128, s.d, s.ffn, s.heads, s.head_dim, False, 2)
    adapters = {"encoder": 2, "decoder": 4}[side]
    assert lean_step.total(layer).flops == frozen.flops + adapters * 6 * t * 2 * s.d * lean_step.RANK


def test_a_step_has_its_layers_and_its_loss():
    parts = lean_step.step("nllb-600m", 8192, 8192, 32 << 20)
    s = shape("nllb-600m", "cuda")
    assert parts["encoder"].flops == 12 * lean_step.total(lean_step.encoder_layer(s, 8192)).flops
    assert parts["loss"].flops == 4 * 8192 * s.d * s.words
