"""The table of cards: rates that are reached, what is measured, and names as CUDA gives them."""

from __future__ import annotations

import pytest
import torch

from petl_kernels.planning.cards import CARDS, HOST_COPIES, MEASURED, PUBLISHED, card_of
from petl_kernels.planning.cost import Rates


def test_a_published_rate_is_taken_by_its_share_and_a_measured_one_whole():
    assert CARDS["L4"].rates(torch.bfloat16) == Rates(121e12 * 0.55, 0.3e12 * 0.85, 31.5e9 * HOST_COPIES, False)
    assert CARDS["H200"].rates(torch.bfloat16) == Rates(780e12, 4.15e12, 63e9 * HOST_COPIES, False)
    assert CARDS["H200"].rate("fp32") == 67e12 * 0.77
    assert [CARDS["H200"].kind(name) for name in ("bf16", "bandwidth", "fp32")] == [MEASURED, MEASURED, PUBLISHED]
    assert all(card.kind("bf16") == PUBLISHED for name, card in CARDS.items() if name != "H200")


def test_a_card_without_bf16_trains_in_fp16():
    assert [name for name, card in CARDS.items() if card.dtype == torch.float16] == ["T4"]
    assert CARDS["T4"].rates(torch.float16).products == 65e12 * 0.45
    with pytest.raises(ValueError, match="bf16: the card has no such products"):
        CARDS["T4"].rates(torch.bfloat16)


@pytest.mark.parametrize("name", CARDS)
def test_figures_have_the_right_size(name):
    card = CARDS[name]
    assert 7 * 2**30 < card.memory < 150e9 and 2**21 < card.l2 < 2**27
    assert 8e12 <= card.fp32 < card.fp16 < 1e15 and card.bf16 in (None, card.fp16)
    assert 15e9 < card.host < 64e9 < card.bandwidth < 5e12
    assert 0.4 < card.products < 1 and 0.7 < card.copies < 1 and card.source


def test_names_of_cuda():
    names = {
        "Tesla T4": "T4",
        "NVIDIA GeForce RTX 3060": "RTX 3060",
        "NVIDIA A10G": "A10G",
        "NVIDIA A100-SXM4-40GB": "A100 40GB",
        "NVIDIA A100 80GB PCIe": "A100 80GB",
        "NVIDIA H100 80GB HBM3": "H100 SXM",
    }
    assert {card: card_of(card) for card in names} == names
    assert card_of("NVIDIA L40S") is None and card_of("NVIDIA A10") is None
