"""Wrong input: one clear line with value, rule and way out, the documented exit code, and nothing written."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from inputs import answer, contents, prepare

from harness.records.fire import Case, faults, inputs, strangers

LEVELS = inputs()
PROOFS = [*faults().values(), *strangers().values()]
CASES = [(level, name) for level, kind in LEVELS.items() for name in kind.cases]
ACCEPTED = {
    "experiments": "cells bad.yaml",
    "hardware": "phantom --hardware bad.yaml -- true",
    "records": "compare records records",
}
"""Level -> a command that soon answers to its valid document."""


@pytest.mark.parametrize(("level", "name"), CASES, ids=[f"{level}: {n}" for level, n in CASES])
def test_wrong_input_is_refused(level: str, name: str, tmp_path: Path) -> None:
    """In one line that names the value, the rule and a way out; no traceback, and nothing is written."""
    kind = LEVELS[level]
    case = kind.cases[name]
    prepare(tmp_path, kind, case)
    before = contents(tmp_path)
    found = answer(tmp_path, name, kind, case)
    assert found.code == case.code, found
    assert [line for line in found.err.splitlines() if "alst: " in line] == found.err.splitlines()
    assert len(found.err.splitlines()) == bool(case.says), found.err
    assert all(word in found.err for word in case.says), found.err
    if case.shell is None:
        assert not found.out
        assert contents(tmp_path) == before


@pytest.mark.parametrize("level", ACCEPTED)
def test_the_valid_document_is_accepted(level: str, tmp_path: Path) -> None:
    """Otherwise the refusals of what differs from it would prove nothing."""
    valid = Case(says=[], run=ACCEPTED[level])
    prepare(tmp_path, LEVELS[level], valid)
    assert not answer(tmp_path, level, LEVELS[level], valid).err


def test_every_level_that_users_write_is_there() -> None:
    """With at least 150 inputs in all."""
    assert len(CASES) >= 150
    assert set(LEVELS) == {
        "commands",
        "configurations",
        "environments",
        "experiments",
        "hardware",
        "records",
        "weights",
    }


@pytest.mark.parametrize(
    "test", sorted({test for proof in PROOFS for test in proof.tests}), ids=str
)
def test_what_the_page_names_is_a_test(test: str) -> None:
    """A fault or a stranger without a test is not on the page."""
    file, _, name = test.partition("::")
    tree = ast.parse((Path(__file__).parent / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
