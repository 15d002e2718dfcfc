"""Mutants: the table of what judges them, and the committed sample."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from harness.records.mutants import (
    PATH,
    Campaign,
    Equivalent,
    Judged,
    Mutant,
    Trial,
    count,
    gaps,
    judged,
    read,
)

ROOT = Path(__file__).parents[3]
FOLDERS = ("alst_impl/ops", "harness/gate", "harness/judge")
TABLE = judged()
MODULES = [
    path.relative_to(ROOT).as_posix()
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "__init__.py"
]
DIFF = "--- a.py\n+++ a.py\n@@ -1,3 +1,3 @@\n def f():\n-    return a - b\n+    return a + b\n"


def test_every_module_is_judged() -> None:
    """By the table, in no other place."""
    assert sorted(TABLE) == sorted(MODULES)


@pytest.mark.parametrize("test", sorted({test for by in TABLE.values() for test in by.tests}))
def test_what_judges_is_a_test(test: str) -> None:
    file, _, name = test.partition("::")
    path = ROOT / "tests" / file
    assert path.exists()
    if name:
        tree = ast.parse(path.read_text())
        known = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name.partition("[")[0] in known


@pytest.mark.parametrize("module", [module for module, by in TABLE.items() if by.equivalent])
def test_lines_whose_mutants_compute_the_same_are_there(module: str) -> None:
    """A reason is for the code as it is."""
    source = " ".join((ROOT / module).read_text().split())
    for each in TABLE[module].equivalent:
        assert " ".join(each.line.split()) in source
        assert each.becomes != each.line


def _trial(outcome: str, diff: str = DIFF) -> Trial:
    mutant = Mutant(module="a.py", operator="Op", occurrence=0, line=2, diff=diff)
    return Trial.model_validate(
        {"mutant": mutant, "source": "0", "tests": [], "outcome": outcome, "seconds": 1.0}
    )


def test_survivors_are_gaps_unless_they_compute_the_same() -> None:
    other = DIFF.replace("a + b", "a * b")
    trials = [_trial(outcome) for outcome in ("killed", "timed out", "survived")]
    trials.append(_trial("survived", other))
    same = Equivalent(line="return a - b", becomes="return a + b", reason="b is 0")
    table = {"a.py": Judged(tests=[], equivalent=[same])}
    assert gaps(trials, table) == trials[3:]
    assert dict(count(trials, table)) == {
        "made": 4,
        "killed": 1,
        "timed_out": 1,
        "equivalent": 1,
        "survived": 1,
    }
    assert gaps(trials, {}) == trials[2:]


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    """In a line that names it; none at all is no error."""
    assert read(tmp_path / "none.json") is None
    path = tmp_path / "mutants.json"
    path.write_text('{"seed": 0}')
    with pytest.raises(ValueError, match=r"mutants\.json is no record of mutants"):
        read(path)


def test_the_committed_sample_is_of_every_folder() -> None:
    """At least sixty mutants, of which one in ten at most is not noticed."""
    campaign = read(ROOT / PATH)
    assert isinstance(campaign, Campaign)
    assert len(campaign.trials) >= 60
    assert len(gaps(campaign.trials, TABLE)) <= len(campaign.trials) / 10
    made = {trial.mutant.module for trial in campaign.trials}
    assert made <= set(TABLE)
    assert all(any(module.startswith(folder) for module in made) for folder in FOLDERS)
