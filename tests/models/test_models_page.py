"""The table of ``docs/reference/models.md``: each row is what the code does."""

from __future__ import annotations

from pathlib import Path

import pytest
from layers import every_model
from layers.lean_cases import SETTINGS

import petl_kernels as pk
from petl_kernels.errors import InputError
from petl_kernels.interop.hf import SUPPORTED
from petl_kernels.layers.loss.lean_loss import packing_obstacle
from petl_kernels.methods import METHODS

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "models.md"
ROWS = {
    cells[1].strip("`"): cells
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and (cells := [cell.strip() for cell in line.strip("|").split("|")])[1].startswith("`")
}
_HALF = {"encoder_layers": 2, "decoder_layers": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2}


def build(model_type: str, monkeypatch):
    if model_type == "nllb-moe":  # as its checkpoints are: some layers with experts, some without
        monkeypatch.setitem(every_model.SETTINGS, model_type, every_model.SETTINGS[model_type] | _HALF)
    return every_model.build(model_type)


def refuses(model_type: str, method: str, monkeypatch) -> bool:
    try:
        pk.adapt(build(model_type, monkeypatch), METHODS[method](**SETTINGS.get(method, {})))
    except InputError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ROWS)
def test_a_row(model_type, monkeypatch):
    _, _, lean, packed, refused, trainer, _ = ROWS[model_type]
    model = pk.lean(build(model_type, monkeypatch), 2)
    tiers = {state.tier for state in pk.report(model).layers}
    assert {"yes": {2}, "all but experts": {2}, "no": {0}}[lean] == tiers
    assert (lean == "all but experts") == any("experts" in state.own for state in pk.report(model).layers)
    assert {"yes": True, "no": False}[packed] == (packing_obstacle(model) == "")
    assert {"yes": True, "no": False}[trainer] == (model_type in SUPPORTED)
    found = [method for method in METHODS if refuses(model_type, method, monkeypatch)]
    assert ([] if refused == "none" else refused.split(", ")) == found


def test_what_the_trainer_reads_is_there():
    assert SUPPORTED.keys() <= ROWS.keys()
