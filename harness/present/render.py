"""Templates of `harness/present/templates/` to text."""

from __future__ import annotations

import re
from typing import Any

import jinja2


def render(template: str, **content: Any) -> str:
    """As `filled`; the text ends in one line break and has no two empty lines in a row."""
    return re.sub(r"\n{3,}", "\n\n", filled(template, **content)).strip() + "\n"


def filled(template: str, **content: Any) -> str:
    """`template` with `content`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("harness.present"),
        autoescape=template.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**content)
