"""What a card lacks is not chosen there: bf16 on Turing, and Triton's kernels on ROCm. The cards are pretended."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from petl_kernels import cards, dispatch, parity

CARD, FP32, FP16, BF16 = torch.device("cuda", 0), torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def pretend(monkeypatch):
    """Returns a function that pretends a card of some capability, where Triton has a kernel of rms_norm."""
    assert dispatch.load_error("reference") is None
    kernels = {key: kernel for key, kernel in dispatch._kernels.items() if key[1] == "reference"}
    monkeypatch.setattr(dispatch, "_kernels", kernels)
    monkeypatch.setattr(dispatch, "_load_errors", {name: None for name in dispatch.BACKENDS})
    for name in ("_chosen", "_parity_errors", "_checking"):
        monkeypatch.setattr(dispatch, name, {})
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "_captures", lambda device: False)
    monkeypatch.setattr(dispatch, "_first_use_check", lambda *key: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for op in ("rms_norm", "layer_norm"):
        dispatch.register(op, "triton")(print)

    def pretended(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return pretended


@pytest.mark.check
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.filterwarnings("ignore:petl_kernels")
def test_bf16_is_chosen_where_the_card_has_it(pretend, capability):
    pretend(*capability)
    here = capability >= (8, 0)
    for named in ("", "triton"):
        served = {dtype: dispatch._choose("rms_norm", CARD, named, dtype)[0] for dtype in (FP32, FP16, BF16)}
        assert served == {FP32: "triton", FP16: "triton", BF16: "triton" if here else "reference"}
    assert (BF16 in parity.checked_dtypes("triton", CARD)) == here
    assert FP16 in parity.checked_dtypes("cuda", CARD) and BF16 in parity.checked_dtypes("reference", CARD)


def test_what_the_card_lacks_is_said_once_and_listed(pretend):
    pretend(7, 5)
    reason = "the card has no bfloat16 (compute capability 7.5; 8.0 and later have it)"
    with pytest.warns(UserWarning, match="triton is not used on cuda:0 in bfloat16: the card has no") as told:
        for op in ("rms_norm", "layer_norm", "rms_norm"):
            assert dispatch.backend_of(op, CARD, BF16) == "reference"
    assert len(told) == 1
    assert list(map(str, dispatch.turned_down())) == [
        f"triton {op} is not used on cuda:0 in bfloat16: {reason}" for op in ("rms_norm", "layer_norm")
    ]


def test_on_rocm_one_line_says_why_triton_does_not_serve(pretend, monkeypatch):
    pretend(9, 4)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(dispatch, "_load_errors", {"reference": None})
    with pytest.warns(UserWarning, match="backend 'triton' is not available .ROCm: ") as told:
        assert dispatch.backend_of("rms_norm", CARD, BF16) == dispatch.backend_of("layer_norm", CARD) == "reference"
    assert len(told) == 1


def test_each_card_has_one_class():
    found = [capability for kind in cards.CLASSES for capability in kind.capabilities]
    assert len(set(found)) == len(found)
    names = {(7, 0): "sm75", (7, 5): "sm75", (8, 0): "sm80", (8, 9): "small", (9, 0): "sm90", (11, 0): "small"}
    assert {capability: cards.class_of(capability).name for capability in names} == names


def test_the_page_of_cards_says_what_the_classes_do():
    """Its tables are written by tests/backends/card_tables.py, which takes minutes."""
    page = Path(__file__).parents[2] / "docs/CARDS.md"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.read_text().splitlines()]
    rows = [row for row in rows if row and row[0].startswith("sm_")]
    assert [row[0] for row in rows] == ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
    for name, kind, examples, dtypes, kilobytes, most, *_ in rows:
        found = cards.class_of((int(name[3:-1]), int(name[-1])))
        assert [kind, examples, dtypes] == [found.name, found.cards, found.dtypes()]
        assert int(most) <= int(kilobytes) == found.shared_memory >> 10
