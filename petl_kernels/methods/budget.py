"""Parameter budgets: "10%", "2M", 0.1 or a number, and the size of a method that fits one."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from petl_kernels.errors import InputError
from petl_kernels.models.structure import total_parameters

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
# A budget is met when the smallest size exceeds it by at most this, and the largest reaches at least this share of it
_OVER, _UNDER = 1.05, 0.5


def parse_budget(budget: float | int | str) -> float | int:
    """Returns a share of the model's parameters as a float in (0, 1], or a number of parameters as an int above 1.

    "10%" and 0.1 are the share 0.1; "2M", "1.5k", "1B", "40000" and 40000 are numbers. Raises InputError.
    """
    value = _parse_text(budget) if isinstance(budget, str) else budget
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _refusal(budget)
    if isinstance(value, float) and not 0 < value <= 1:
        raise _refusal(budget)
    if isinstance(value, int) and value <= 1:
        raise _refusal(budget)
    return value


def _parse_text(text: str) -> float | int:
    match = re.fullmatch(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*(%|[kmb]?)\s*", text, re.IGNORECASE)
    if match is None:
        raise _refusal(text)
    number, unit = float(match[1]), match[2].lower()
    if unit == "%":
        return number / 100
    if unit == "" and not match[1].lstrip("+-").isdigit():
        return number if number < 1 else round(number) if number > 1 and number.is_integer() else number
    return round(number * _UNITS[unit])


def _refusal(budget: object) -> InputError:
    return InputError(
        f"parameter budget {budget!r}: expected a share above 0% and up to 100% (10% or 0.1), "
        "or a number of parameters (2M or 40000)"
    )


def budget_parameters(model: nn.Module, budget: float | int | str) -> int:
    """Returns the budget as a number of parameters of ``model``. Raises InputError for more than the model has."""
    value, total = parse_budget(budget), total_parameters(model)
    if isinstance(value, float):
        return int(value * total)
    if value > total:
        raise InputError(f"parameter budget {budget!r}: more than 100% of the model's {total:,} parameters")
    return value


def largest_that_fits(fits: Callable[[int], bool], largest: int | None) -> int:
    """Returns the largest size, up to ``largest`` where there is a bound, that fits; 1 where none does.

    ``fits(size)`` is true up to some size and false from there on.
    """
    low, high = 1, 2  # low: taken even if it does not fit; high: fits no more, or is past the largest
    while (largest is None or high <= largest) and fits(high):
        low, high = high, 2 * high
    if largest is not None:
        high = min(high, largest + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def check_reached(model: nn.Module, budget: float | int | str, limit: int, count: int, label: str, size: str) -> None:
    """Raises InputError unless ``count`` parameters meet the budget of ``limit``. label, size: those of the method."""
    if _UNDER * limit <= count <= _OVER * limit:
        return
    share = count / total_parameters(model)
    raise InputError(
        f"parameter budget {budget!r} ({limit:,} parameters): {label} cannot reach it; "
        f"the nearest it can is {count:,} parameters, {share:.3%}{size}"
    )
