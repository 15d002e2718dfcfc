"""Lengths, sizes and speeds as people write them, and as they are printed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import typer

from alst_impl.config import TOO_LONG, DataConfig, TrainConfig, tokens
from harness.cells.units import (
    bandwidth_value,
    bytes_value,
    flops_value,
    interval_text,
    length_text,
)
from harness.commands.options import share

KIB, MIB, GIB = 2**10, 2**20, 2**30


def lengths() -> list[int]:
    """Lengths of every magnitude, and whole multiples of what K, M, a thousand and a million mean."""
    draw = np.random.default_rng(0)
    magnitudes = draw.integers(1, 64, 2_000, dtype=np.uint64)
    any_length = [int(n) for n in draw.integers(1, 2**magnitudes, dtype=np.uint64)]
    units = (1_000, KIB, 10**6, MIB)
    whole = [int(n) * unit for n in draw.integers(1, 2_000, 500) for unit in units]
    return [1, 999, 128_000, 131_072, TOO_LONG - 1, *any_length, *whole]


def test_a_printed_length_is_read_as_the_same_number() -> None:
    """Whatever the length: what a table prints can be typed."""
    assert [n for n in lengths() if tokens(length_text(n)) != n] == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("128K", 131_072),
        ("128k", 131_072),
        ("131_072", 131_072),
        ("131,072", 131_072),
        ("128_000", 128_000),
        ("128000", 128_000),
        ("1M", 1_048_576),
        ("0.5M", 524_288),
        ("3.5K", 3_584),
        ("9007199254740993", 2**53 + 1),
    ],
)
def test_lengths_as_people_write_them(text: str, count: int) -> None:
    """K and M are binary, digits are exact, however many they are."""
    assert tokens(text) == count


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (131_072, "128K"),
        (128_000, "128,000"),
        (1_048_576, "1M"),
        (3_700_000, "3,700,000"),
        (98_304, "96K"),
        (1_572_864, "1,536K"),
        (712_704, "712,704"),
        (1_024_000, "1,024,000"),
        (1_000, "1,000"),
        (0, "0"),
    ],
)
def test_lengths_as_they_are_printed(count: int, text: str) -> None:
    """128K is 131,072. 128,000 is not called 125K, nor a found length 696K beside a published 700,000."""
    assert length_text(count) == text


@pytest.mark.parametrize(
    "text", ["", "0", "-4K", "1.5", "3.7M", "1,5K", "4 GB", "1e6", "K", "9" * 400, str(TOO_LONG)]
)
def test_what_is_no_length_is_refused(text: str) -> None:
    """No fraction of a token, and nothing beyond 64 bits; the message says what K is."""
    with pytest.raises(ValueError, match=r"is not a length; .* \(K is 1,024"):
        tokens(text)


def test_a_length_of_a_configuration_has_the_same_limits() -> None:
    """A number in YAML is bounded as text is, and lists of documents take `4K`."""
    assert DataConfig(documents=("4K", 1_000)).documents == (4_096, 1_000)
    for seqlen in (0, TOO_LONG):
        with pytest.raises(ValueError, match="seqlen"):
            TrainConfig(model="tiny-llama", method="baseline", engine="plain", seqlen=seqlen)


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (bytes_value, "40GB", 40 * 10**9),
        (bytes_value, "1.9TB", 1_900 * 10**9),
        (bytes_value, "1.5 GiB", 3 * GIB // 2),
        (bytes_value, "80_000 B", 80_000),
        (bandwidth_value, "450GB/s", 450 * 10**9),
        (bandwidth_value, "12.5 GB/s", 12_500 * 10**6),
        (flops_value, "989.4TFLOPS", 989_400 * 10**9),
        (flops_value, "2.25 PFLOP/s", 2_250 * 10**12),
    ],
)
def test_quantities_as_people_write_them(
    parse: Callable[[str], int], text: str, value: int
) -> None:
    """Exact, and units of 1000 differ from units of 1024."""
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text", "words"),
    [
        (bytes_value, "much", "is not a size"),
        (bytes_value, "256", "is not a size"),
        (bytes_value, "0GB", "is not a size"),
        (bytes_value, "40gb", "is not a size"),
        (bytes_value, "0.25K", "is not a size"),
        (bytes_value, "450GB/s", "is not a size"),
        (bytes_value, "9" * 400, "is not a size"),
        (bandwidth_value, "450GB", "is not a bandwidth in bytes; .* GB/s"),
        (bandwidth_value, "400Gbit/s", "is not a bandwidth in bytes"),
        (bandwidth_value, "989TFLOPS", "is not a bandwidth in bytes"),
        (flops_value, "450GB/s", "is not a speed of arithmetic; .* TFLOPS"),
        (flops_value, "989T", "is not a speed of arithmetic"),
    ],
)
def test_a_quantity_of_another_kind_is_refused(
    parse: Callable[[str], int], text: str, words: str
) -> None:
    """A bandwidth is no speed of arithmetic, and a size is neither."""
    with pytest.raises(ValueError, match=words):
        parse(text)


def test_a_share_is_a_number_or_percent() -> None:
    """`5%` is 0.05; what leaves less than a tenth is refused."""
    assert [share(text) for text in ("5%", "0.05", ".05", "0", "90%", 0.05)] == [
        0.05,
        0.05,
        0.05,
        0.0,
        0.9,
        0.05,
    ]
    for text in ("5", "95%", "-1%", "nan", "five"):
        with pytest.raises(typer.BadParameter, match=r"write such as 0\.05 or 5%"):
            share(text)


def test_an_interval_has_the_unit_of_its_value() -> None:
    """Milliseconds are not followed by seconds, also where the interval reaches beyond one."""
    assert interval_text(0.00322, 0.00274, 0.00371) == "3.22 ms (2.74-3.71)"
    assert interval_text(0.95, 0.8, 1.1) == "950 ms (800-1100)"
    assert interval_text(1.45, 0.9, 1.67) == "1.45 s (0.9-1.67)"
