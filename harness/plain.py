"""Numbers as people read them; the only place where base units become GiB and ms."""

from __future__ import annotations

import math


def bytes_text(value: float) -> str:
    """Bytes in powers of 1024."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{_digits(value / size)} {unit}"
    return f"{value:.0f} B"


def seconds_text(value: float) -> str:
    """Seconds, or milliseconds below one."""
    if value < 1:
        return f"{_digits(value * 1e3)} ms"
    return f"{_digits(value)} s"


def length_text(value: int) -> str:
    """A sequence length; K and M are 2**10 and 2**20 where they divide it."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if value >= size and value % size == 0:
            return f"{value // size}{unit}"
    return f"{value:,}"


def error_text(value: float) -> str:
    """A relative error."""
    return "0" if value == 0 else f"{value:.1e}"


def ratio_text(value: float) -> str:
    """A ratio."""
    return f"{value:.2f}x"


def metric_text(value: float, unit: str) -> str:
    """A metric's value; bytes and seconds with their unit, a dash where there is none."""
    if math.isnan(value):
        return "–"
    if unit == "B":
        return bytes_text(value)
    if unit == "s":
        return seconds_text(value)
    if unit.startswith("tokens"):
        return f"{value:,.0f}"
    return error_text(value) if abs(value) < 1e-3 else f"{value:.4f}"


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"
