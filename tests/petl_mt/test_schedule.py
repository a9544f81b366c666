from __future__ import annotations

import pytest
from petl_mt.train.schedule import lr_factor


@pytest.mark.parametrize("schedule", ["inverse-sqrt", "linear", "polynomial"])
def test_rises_to_one_and_falls(schedule):
    factors = [lr_factor(schedule, step, warmup=10, steps=100) for step in range(1, 101)]
    assert factors[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert all(a > b > 0 for a, b in zip(factors[9:], factors[10:], strict=False))


@pytest.mark.parametrize(
    ("schedule", "expected"), [("inverse-sqrt", (10 / 55) ** 0.5), ("linear", 46 / 91), ("polynomial", (46 / 91) ** 2)]
)
def test_formulas(schedule, expected):
    assert lr_factor(schedule, 55, warmup=10, steps=100) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["inverse-sqrt", "linear", "polynomial"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 7), (1, 1), (7, 7), (9, 7)])
def test_edges_stay_between_zero_and_one(schedule, warmup, steps):
    assert all(0 < lr_factor(schedule, step, warmup, steps) <= 1 for step in range(1, steps + 1))
