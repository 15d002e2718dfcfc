"""YAML that people write: one reader for experiments, hardware, peers and sites. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

LARGEST_BYTES = 2**20
"""No file that a person writes is longer."""
MOST_VALUES = 1_000_000
"""Values that aliases may stand for: nested ones write billions in a few lines."""


def read_yaml(path: Path) -> Any:
    """What the YAML file at `path` says; None if it says nothing.

    Raises `ValueError`, naming `path`, for what is not YAML, for a key that a mapping has twice, and for a file or aliases
    that are too large.
    """
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_BYTES + 1)
        if len(text) > LARGEST_BYTES:
            raise ValueError(
                f"{path}: longer than {LARGEST_BYTES:,} bytes; no such file has as many"
            )
        return _parsed(path, text.decode())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; name a file that can be read") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{path}: too many nested values; write fewer levels") from None


def _parsed(path: Path, text: str) -> Any:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _check(path, node, {}) > MOST_VALUES:
            raise ValueError(
                f"{path}: its aliases stand for over {MOST_VALUES:,} values; use fewer"
            )
        return _constructed(path, loader, node)
    finally:
        loader.dispose()


def _constructed(path: Path, loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    try:
        return loader.construct_document(node)
    except ValueError as error:  # of a date such as 2024-13-45
        raise ValueError(f"{path}: not YAML: {error}; quote the value") from None


def _check(path: Path, node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many values `node` stands for, aliases written out. Raises `ValueError` for a key that stands twice."""
    if id(node) not in sizes:
        sizes[id(node)] = MOST_VALUES + 1  # of a node that holds itself
        below: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            below = node.value
        elif isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for key in (key for key in keys if keys.count(key) > 1 and key != "<<"):
                line = node.start_mark.line + 1
                raise ValueError(
                    f"{path}: key '{key}' stands twice in the mapping at line {line}; leave one out"
                )
            below = [each for pair in node.value for each in pair]
        sizes[id(node)] = 1 + sum(_check(path, each, sizes) for each in below)
    return sizes[id(node)]
