from __future__ import annotations

import pytest
import torch
from petl_mt.train.delayed_reader import DelayedReader


@pytest.fixture
def told() -> list:
    return []


def reader(told: list, late: bool) -> DelayedReader:
    made = DelayedReader(torch.device("cpu"), lambda step, values: told.append((step, values)))
    made._late = late
    return made


def test_at_once(told):
    numbers = reader(told, late=False)
    numbers.put(torch.tensor([1.0, 2.0]), 7)
    assert told == [(7, [1.0, 2.0])]
    numbers.settle()
    assert len(told) == 1


def test_one_later(told):
    numbers = reader(told, late=True)
    for step in (1, 2, 3):
        numbers.put(torch.tensor([float(step)]), step)
        assert [entry[0] for entry in told] == list(range(1, step))
    numbers.settle()
    numbers.settle()
    assert told == [(1, [1.0]), (2, [2.0]), (3, [3.0])]


def test_what_telling_raises_comes_out_and_is_not_told_again(told):
    def tell(step, values):
        told.append(step)
        raise ValueError

    numbers = DelayedReader(torch.device("cpu"), tell)
    numbers._late = True
    numbers.put(torch.zeros(1), 1)
    with pytest.raises(ValueError):
        numbers.put(torch.zeros(1), 2)
    with pytest.raises(ValueError):
        numbers.settle()
    assert told == [1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_card(told):
    numbers = DelayedReader(torch.device("cuda"), lambda step, values: told.append((step, values)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (1, 2):
            numbers.put(torch.full((1,), step, device="cuda"), step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    numbers.settle()
    assert told == [(1, [1.0]), (2, [2.0])]
