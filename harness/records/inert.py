"""Text of records in a CSV file that a spreadsheet opens. Imports no torch."""

from __future__ import annotations

import re

FORMULA = ("=", "+", "-", "@")
"""How a cell begins that a spreadsheet computes."""
BREAKS = re.compile(r"[\r\n\t]+")
"""What would begin another cell: not every writer quotes it."""
NUMBER = re.compile(r"[+-]?[0-9][0-9.,]*(e[+-]?[0-9]+)?[ %A-Za-z/]*", re.IGNORECASE)
"""A number with its unit, which may begin so."""


def inert(value: object) -> object:
    """`value`; text gets on one line, and an apostrophe in front, which makes it text there, if a spreadsheet would compute it."""
    if not isinstance(value, str):
        return value
    text = BREAKS.sub(" ", value)
    computed = text.lstrip().startswith(FORMULA) and not NUMBER.fullmatch(text)
    return f"'{text}" if computed else text
