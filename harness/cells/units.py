"""Reads sizes and rates, and formats numbers for display. The only module that converts base units to GiB and ms.

`alst_impl.config.tokens` reads lengths, and `length_text` writes them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

BYTES = {
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)},
}
"""Units of a size that a user may write."""
BANDWIDTHS = {f"{unit}/s": scale for unit, scale in BYTES.items()}
"""Units of a bandwidth."""
FLOPS = {
    f"{letter}{word}": 1000**power
    for word in ("FLOPS", "FLOP/s")
    for power, letter in enumerate("GTP", start=3)
}
"""Units of a speed of arithmetic."""


def quantity(text: str, units: Mapping[str, int], what: str) -> int:
    """`text`, a number and one of `units`, in the unit 1. Raises `ValueError` that says `what` is expected, also for
    a number alone: 256 may mean GB or GiB.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:_[0-9]+)*(?:\.[0-9]+)?)\s*([A-Za-z/]+)\s*", text)
    value = int(Fraction(found[1]) * units.get(found[2], 0)) if found else 0
    if not 0 < value < 2**63:
        raise ValueError(f"'{text}' is not {what}; write a number and one of {', '.join(units)}")
    return value


def bytes_value(text: str) -> int:
    """Bytes of a size such as `4TB`, `1900 GiB` or `80_000_000_000 B`. Raises `ValueError`."""
    return quantity(text, BYTES, "a size")


def bandwidth_value(text: str) -> int:
    """Bytes per second of a bandwidth such as `450GB/s`. Raises `ValueError`."""
    return quantity(text, BANDWIDTHS, "a bandwidth in bytes")


def flops_value(text: str) -> int:
    """FLOP/s of a speed such as `989.4 TFLOPS`. Raises `ValueError`."""
    return quantity(text, FLOPS, "a speed of arithmetic")


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


def interval_text(value: float, low: float, high: float) -> str:
    """Seconds with their interval, all in the unit of `value`."""
    scale = 1e3 if value < 1 else 1
    return f"{seconds_text(value)} ({number_text(low * scale)}-{number_text(high * scale)})"


def length_text(value: float) -> str:
    """A length in tokens, as `alst_impl.config.tokens` reads it: `128K` and `1M` are 131,072 and 1,048,576.

    K and M stand for powers of two and their multiples below 10; other lengths have full digits, so that they compare
    with published ones.
    """
    count = round(value)
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if count and count % size == 0 and count // (count & -count) < 10:
            return f"{count // size:,}{unit}"
    return f"{count:,}"


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
