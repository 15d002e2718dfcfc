"""Checks for packages that an extra of `alst-bench` installs. Imports none of them."""

from __future__ import annotations

from importlib.util import find_spec


def require(what: str, extra: str, *modules: str) -> None:
    """Raise `ValueError` that names `extra` unless all top-level `modules` that `what` needs are installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ValueError(f"{what} needs {', '.join(missing)}: pip install 'alst-bench[{extra}]'")
