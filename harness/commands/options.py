"""Options of methods, engines and models as they are written on the command line."""

from __future__ import annotations

from typing import Any

import typer
import yaml

from alst_impl.config import tokens


def parsed(pairs: list[str], flag: str = "--option") -> dict[str, Any]:
    """Options from `key=value`, values read as YAML. Raises `ValueError` that names `flag`."""
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise ValueError(f"{flag} {pair}: write key=value, such as tile_mlp=false")
        try:
            options[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"{flag} {pair}: the value is not YAML; quote it") from None
    return options


def length(text: str | int) -> int:
    """A length as `alst_impl.config.tokens` takes it, as an option's parser."""
    try:
        return tokens(str(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
