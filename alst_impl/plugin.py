"""Plug-ins by file name: the name in a YAML is the file name, so there is no registry."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import TypeVar, cast

from pydantic import ValidationError

from alst_impl.config import Frozen, Spec

T = TypeVar("T", bound=Frozen)


@cache
def names(package: str) -> list[str]:
    """Names of the plug-ins of `package`: its modules except `base`."""
    paths = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(paths) if m.name != "base")


def load(package: str, base: Callable[..., T], spec: Spec, kind: str | None = None) -> T:
    """The one subclass of `base` in module `package.<spec.name>`, made from `spec.options`.

    Raises `ValueError` for an unknown name or option, naming the known ones. `kind` is what users call the
    plug-in; None for the package's name.
    """
    if spec.name not in names(package):
        kind = kind or package.rsplit(".", 1)[-1].removesuffix("s")
        raise ValueError(f"unknown {kind} '{spec.name}'; use one of {', '.join(names(package))}")
    module = importlib.import_module(f"{package}.{spec.name}")
    parent = cast(
        "type[T]", base
    )  # a Callable above, because mypy takes no abstract class for a type
    (cls,) = (
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, parent) and c.__module__ == module.__name__
    )
    try:
        return cls(**spec.options)
    except ValidationError as error:
        raise ValueError(explain(error, f"'{spec.name}'", sorted(cls.model_fields))) from None


def squeezed(name: str) -> str:
    """`name` without what is forgiven in it: case, spaces, `-` and `_`."""
    return re.sub(r"[\s_-]", "", name).lower()


def nearest(name: str, known: Iterable[str]) -> str:
    """Words that offer the `known` names that are like `name`, or else all of them."""
    plain = {squeezed(each): each for each in known}
    near = [plain[each] for each in difflib.get_close_matches(squeezed(name), plain)]
    return f"use {' or '.join(near)}" if near else f"use one of {', '.join(plain.values())}"


def explain(error: ValidationError, where: str, known: list[str]) -> str:
    """One line for a failed validation: each key with its value and rule, then the known keys."""
    parts = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "(whole)"
        value = item["input"]
        shown = f" = {value!r}" if isinstance(value, str | int | float | bool) else ""
        parts.append(f"{key}{shown}: {item['msg'].removeprefix('Value error, ')}")
    listing = f" (known keys: {', '.join(known)})" if known else ""
    return f"{where}: {'; '.join(parts)}{listing}"
