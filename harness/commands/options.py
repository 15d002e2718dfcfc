"""Options of methods, engines and models as they are written on the command line."""

from __future__ import annotations

import re
from typing import Any

import typer
import yaml

from alst_impl.config import Spec, tokens


def parsed(pairs: list[str], flag: str = "--option") -> dict[str, Any]:
    """Options from `key=value`, values read as YAML. Raises `ValueError` that names `flag`."""
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise ValueError(f"{flag} {pair}: write key=value, such as tile_mlp=false")
        try:
            options[key] = yaml.safe_load(text)
        except (
            yaml.YAMLError,
            ValueError,
            RecursionError,
        ):  # ValueError: a date such as 2024-13-45
            raise ValueError(f"{flag} {pair}: the value is not YAML; quote it") from None
    return options


def core_spec(kernel: str, pattern: str | None) -> Spec:
    """Core attention `kernel`, with the `pattern` that text such as `window:window=4096,global_tokens=64` names."""
    if pattern is None:
        return Spec(name=kernel)
    name, _, text = pattern.partition(":")
    options = parsed(text.split(",") if text else [], "--pattern")
    return Spec(name=kernel, options={"pattern": {"name": name, **options}})


def share(text: str | float) -> float:
    """A share from 0 to 0.9, such as `0.05` or `5%`, as an option's parser."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)(%?)", str(text).strip())
    value = float(found[1]) / (100 if found[2] else 1) if found else 1.0
    if value > 0.9:
        raise typer.BadParameter(f"'{text}' is not a share from 0 to 0.9; write such as 0.05 or 5%")
    return value


def length(text: str | int) -> int:
    """A length as `alst_impl.config.tokens` takes it, as an option's parser."""
    try:
        return tokens(str(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
