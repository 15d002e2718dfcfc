"""Formats numbers for display. The only module that converts base units to GiB and ms."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)},
}
"""Unit that a user may write -> bytes."""


def bytes_value(text: str) -> int:
    """Bytes of a size such as `4TB`, `1900 GiB` or `80_000_000_000`."""
    found = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2] not in UNITS or not float(found[1]):
        raise ValueError(
            f"'{text}' is not a size; write a number and one of {', '.join(u for u in UNITS if u)}"
        )
    return int(float(found[1]) * UNITS[found[2]])


def rate_value(text: str) -> float:
    """Units per second of a rate such as `450GB/s` or `989.4TFLOPS`."""
    size, _, _ = text.strip().partition("/s")
    number, found = size, None
    if text.strip().upper().endswith("FLOPS"):
        number, found = size[: -len("FLOPS")], "FLOPS"
    try:
        return float(bytes_value(number + ("B" if found and number[-1:] in "KMGT" else "")))
    except ValueError:
        raise ValueError(f"'{text}' is not a rate; write such as 450GB/s or 989.4TFLOPS") from None


def written(parse: Callable[[str], Any]) -> Callable[[Any], Any]:
    """`parse` for text; other values as they are."""
    return lambda value: parse(value) if isinstance(value, str) else value


def bytes_text(value: float) -> str:
    """Bytes with a binary unit: KiB, MiB or GiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{number_text(value / size)} {unit}"
    return f"{value:.0f} B"


def seconds_text(value: float) -> str:
    """Seconds, or milliseconds below one."""
    if value < 1:
        return f"{number_text(value * 1e3)} ms"
    return f"{number_text(value)} s"


def length_text(value: int) -> str:
    """A sequence length. K and M are 2**10 and 2**20, used where they divide the length."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if value >= size and value % size == 0:
            return f"{value // size}{unit}"
    return f"{value:,}"


def tokens_text(value: float) -> str:
    """A length as the paper writes it: K, M and B are 10**3, 10**6 and 10**9."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def percent_text(value: float) -> str:
    """A relative error with its sign."""
    return f"{value:+.0%}" if abs(value) >= 0.1 else f"{value:+.1%}"


def error_text(value: float) -> str:
    """A relative error."""
    return "0" if value == 0 else f"{value:.1e}"


def ratio_text(value: float) -> str:
    """A ratio."""
    return f"{value:.2f}x"


def metric_text(value: float, unit: str) -> str:
    """A metric's value, bytes and seconds with a unit; a dash for NaN."""
    if math.isnan(value):
        return "–"
    if unit == "B":
        return bytes_text(value)
    if unit == "s":
        return seconds_text(value)
    if unit.startswith("tokens"):
        return f"{value:,.0f}"
    return error_text(value) if abs(value) < 1e-3 else f"{value:.4f}"


def number_text(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def options_text(options: Mapping[str, Any]) -> list[str]:
    """Options of a method as words, such as `stream` and `every 4`."""
    return [f"{k} {v}".removesuffix(" True").replace("_", " ") for k, v in options.items()]


LIMITS = {
    "gpu_memory": "GPU memory",
    "host_memory": "host memory",
    "index_range": "32-bit index",
    "heads": "number of heads",
    "none": "nothing",
}
"""What stops a longer sequence, in words."""
