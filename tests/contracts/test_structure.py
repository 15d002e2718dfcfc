"""Bounds that keep both packages readable: a module fits a few screens, a function one, a class one idea."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = sorted(f for package in ("alst_impl", "harness") for f in (ROOT / package).rglob("*.py"))
TREES = {str(f.relative_to(ROOT)): ast.parse(f.read_text(), type_comments=True) for f in FILES}

LINES_OF_MODULE = 400
LINES_OF_FUNCTION = 60
MEDIAN_LINES_OF_FUNCTION = 8
METHODS_OF_CLASS = 15
IGNORED_TYPES = 20

Function = (ast.FunctionDef, ast.AsyncFunctionDef)


def lines(node: ast.AST) -> int:
    """Number of lines of a definition."""
    assert isinstance(node, ast.stmt)
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def definitions(kind: type[ast.AST] | tuple[type[ast.AST], ...]) -> list[tuple[str, ast.AST]]:
    """All definitions of a `kind`, each with its place."""
    return [
        (f"{file}: {getattr(node, 'name', '')}", node)
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, kind)
    ]


def test_modules_are_short() -> None:
    long = {str(f): n for f in FILES if (n := f.read_text().count("\n")) > LINES_OF_MODULE}
    assert not long


def test_functions_are_short() -> None:
    found = {place: lines(node) for place, node in definitions(Function)}
    assert not {place: n for place, n in found.items() if n > LINES_OF_FUNCTION}
    assert statistics.median(found.values()) <= MEDIAN_LINES_OF_FUNCTION


def test_classes_have_few_methods() -> None:
    found = {
        place: sum(isinstance(part, Function) for part in node.body)
        for place, node in definitions(ast.ClassDef)
        if isinstance(node, ast.ClassDef)
    }
    assert not {place: n for place, n in found.items() if n > METHODS_OF_CLASS}


def test_worlds_are_compared_by_name_only_in_their_own_package() -> None:
    """Elsewhere code asks a world for its traits, so a new world is one new file."""
    compared = [
        place
        for place, node in definitions(ast.Compare)
        if isinstance(node, ast.Compare)
        and any(isinstance(op, ast.Eq | ast.NotEq) for op in node.ops)
        and ast.unparse(node.left).split(".")[-1] == "world"
        and not place.startswith("harness/worlds/")
    ]
    assert not compared


def test_few_types_are_ignored() -> None:
    """Places where mypy is told to look away, as Python's parser finds them."""
    assert sum(len(tree.type_ignores) for tree in TREES.values()) <= IGNORED_TYPES
