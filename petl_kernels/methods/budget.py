"""Parameter budgets: "10%", "2M", 0.1 or a number, and the size of a method that fits one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torch import nn

from petl_kernels.errors import InputError
from petl_kernels.models.structure import total_parameters

if TYPE_CHECKING:
    from petl_kernels.methods.base import Method

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
# A budget is met when the smallest size exceeds it by at most this, and the largest reaches at least this share of it
_OVER, _UNDER = 1.05, 0.5


def parse_budget(budget: float | int | str) -> float | int:
    """A share of the model's parameters as a float in (0, 1], or a number of parameters as an int above 1.

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
    """The budget as a number of parameters of ``model``. InputError when it is more than the model has."""
    value, total = parse_budget(budget), total_parameters(model)
    if isinstance(value, float):
        return int(value * total)
    if value > total:
        raise InputError(f"parameter budget {budget!r}: more than 100% of the model's {total:,} parameters")
    return value


def solve(cls: type[Method], model: nn.Module, budget: float | int | str, fixed: dict) -> Method:
    """``cls`` with the largest size whose count fits the budget. See ``Method.for_budget``."""
    limit = budget_parameters(model, budget)
    if cls.size_field is None:
        return _accept(cls(**fixed), model, budget, limit)
    if cls.size_field in fixed:
        raise InputError(f"{cls.method} {cls.size_field} {fixed[cls.size_field]}: a parameter budget sets it, give one")
    largest = cls.largest_size(model, **fixed)

    def fits(size: int) -> bool:
        return cls.sized(size, **fixed).count(model) <= limit

    low, high = 1, 2  # low: taken even if it does not fit; high: fits no more, or is past the largest
    while (largest is None or high <= largest) and fits(high):
        low, high = high, 2 * high
    if largest is not None:
        high = min(high, largest + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return _accept(cls.sized(low, **fixed), model, budget, limit)


def _accept(config: Method, model: nn.Module, budget: float | int | str, limit: int) -> Method:
    count = config.count(model)
    if _UNDER * limit <= count <= _OVER * limit:
        return config
    size = f" ({config.size_field} {getattr(config, config.size_field)})" if config.size_field else ""
    share = count / total_parameters(model)
    raise InputError(
        f"parameter budget {budget!r} ({limit:,} parameters): {config.label} cannot reach it; "
        f"the nearest it can is {count:,} parameters, {share:.3%}{size}"
    )
