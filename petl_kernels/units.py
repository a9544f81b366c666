"""Sizes of memory as people write them."""

from __future__ import annotations

import re

from petl_kernels.errors import InputError, shown

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[f"{_letter}IB"] = 1024**_power


def parse_size(text: str | int) -> int:
    """Returns the bytes of ``text``: 8 * 2**30 for "8GiB", 8 * 10**9 for "8GB", 1,048,576 for "1048576".

    Raises InputError for anything else, and for sizes that are not above zero.
    """
    if isinstance(text, bool) or not isinstance(text, (int, str)):
        raise InputError(f"memory size {shown(text)}: expected a text such as 8GiB, or a whole number of bytes")
    if isinstance(text, int):
        number, unit = text, ""
    else:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
        if match is None or match[2].upper() not in _UNITS:
            raise InputError(
                f"memory size {text!r}: expected a number with B, KB, MB, GB, TB, KiB, MiB, GiB or TiB, such as 8GiB"
            )
        number, unit = float(match[1]), match[2].upper()
    size = number * _UNITS[unit]
    if not 1 <= size < 2**63:
        raise InputError(f"memory size {shown(text)}: expected more than zero bytes, and fewer than 2^63")
    return int(size)


def format_least(size: int) -> str:
    """Returns ``format_size`` of the smallest size, from ``size`` on, whose text is not below ``size``.

    A budget of that text suffices where ``size`` bytes are needed, and the next smaller text does not.
    """
    text, larger = format_size(size), size
    while parse_size(text) < size:
        larger += max(1, larger // 4096)  # less than any step between two texts
        text = format_size(larger)
    return text


def format_below(size: int, least: int) -> str:
    """Returns ``format_size`` of a size below ``least``, or its bytes where that text would not be below either."""
    text = format_size(size)
    return text if parse_size(text) < parse_size(format_least(least)) else f"{size:,} bytes"


def format_size(size: int) -> str:
    """Returns ``size`` bytes with a binary unit and three figures: 1.50 GiB."""
    amount, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if round(abs(amount)) < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.0f} {unit}" if unit == "B" or abs(amount) >= 100 else f"{amount:.3g} {unit}"
