"""Seconds, bytes and rates in words, three digits each."""

from __future__ import annotations


def seconds(value: float) -> str:
    """Seconds with a unit and three digits: "6.78 ms"."""
    unit, scale = next((u, s) for u, s in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 0.0)) if value >= s)
    return f"{digits(value / (scale or 1e-9))} {unit}"


def size(value: float) -> str:
    """Bytes with a binary unit and three digits: "1.50 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1000 or unit == "GiB":
            return f"{digits(value) if unit != 'B' else int(value)} {unit}"
        value /= 1024
    raise AssertionError


def rate(value: float, unit: str) -> str:
    """Operations or bytes a second, decimal: "215 GFLOP/s", unit "FLOP/s" or "B/s"."""
    prefix, scale = next((p, s) for p, s in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("", 0)) if value >= s)
    return f"{digits(value / (scale or 1))} {prefix}{unit}"


def digits(value: float) -> str:
    """Three digits that count, and all before the point."""
    magnitude = abs(value)
    places = 2 if magnitude < 9.995 else 1 if magnitude < 99.95 else 0
    return f"{value:,.{places}f}"
