"""Text of records in a CSV file that a spreadsheet opens. Imports no torch."""

from __future__ import annotations

import re

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""How a cell begins that a spreadsheet computes."""
NUMBER = re.compile(r"[+-]?[0-9][0-9.,]*(e[+-]?[0-9]+)?[ %A-Za-z/]*", re.IGNORECASE)
"""A number with its unit, which may begin so."""


def inert(value: object) -> object:
    """`value`; text that a spreadsheet would compute gets an apostrophe in front, which makes it text there."""
    if isinstance(value, str) and value.startswith(FORMULA) and not NUMBER.fullmatch(value):
        return f"'{value}"
    return value
