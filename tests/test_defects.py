"""The suite detects every planted defect: the cell or the tests that should catch it fail.

A defect is an edit of the source in a copy. Ranks, or a forked process that runs tests, import the copy.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Literal

import pytest

from harness.cells import paths
from harness.cells.cell import Cell
from harness.cells.experiment import load_experiment
from harness.commands.defects import own
from harness.commands.run import truth_cache
from harness.judge.defects import Defect, plant, read_catches, read_defects
from harness.records.record import Outcome
from harness.run.measure import measure

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
RAN = 100
"""Added to pytest's exit code, so that a crash of the process is not taken for a failed test."""

DEFECTS = read_defects(ROOT / paths.DEFECTS)
TESTED = {name: defect for name, defect in DEFECTS.items() if defect.tests}
UNWRITTEN = "the last tile is dropped"
"""This defect leaves memory unwritten. What lies there may be NaN, which is found before gradients are compared."""
CAUGHT = {catch.defect: catch for catch in read_catches(ROOT / paths.CAUGHT)}


def test_the_matrix_has_caught_every_defect_that_gradients_show() -> None:
    """`alst defects` has found a cell for each, at least fifteen."""
    assert list(CAUGHT) == [name for name in DEFECTS if name not in TESTED]
    assert len(CAUGHT) >= 15


def _cells(defect: Defect) -> list[tuple[str, Cell]]:
    """Cells that may catch `defect`: the one that it names, or those of the matrix."""
    if defect.cell is not None:
        return [(label, cell) for label, cell, _ in own(defect)]
    work = load_experiment(ROOT / paths.experiment("correctness")).matrix_cells()
    return [(row.label, cell) for row, cell in work]


def test_cells_that_defects_name_pass_without_them(shared: Path) -> None:
    """Otherwise their failures would prove nothing; `test_matrix.py` shows the same of the matrix."""
    named = {label: cell for defect in DEFECTS.values() for label, cell, _ in own(defect)}
    assert named
    for cell in named.values():
        assert measure(cell, truth_cache(shared)).outcome is Outcome.OK


@pytest.mark.parametrize("name", CAUGHT)
def test_the_cell_that_caught_a_defect_fails(name: str, tmp_path: Path, shared: Path) -> None:
    """It fails as when the defect was found."""
    (cell,) = [cell for label, cell in _cells(DEFECTS[name]) if label == CAUGHT[name].cell]
    m = measure(cell, truth_cache(shared), sources=plant(DEFECTS[name], tmp_path))
    by_chance = {Outcome.NAN_LOSS, Outcome.WRONG_GRADIENT} if name == UNWRITTEN else set()
    assert m.outcome in {Outcome(CAUGHT[name].outcome), *by_chance}, m.detail
    assert m.outcome is not Outcome.OK


def _run_tests(package: str, tests: list[str], output: str, scratch: str) -> None:
    """Body of a forked process: exits with `RAN` + pytest's code, and writes pytest's output to `output`."""
    with Path(output).open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.path.insert(0, package)
    os.chdir(ROOT)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    # The packages without the defect have been imported, and with them what tests share.
    own = [ROOT / folder for folder in ("alst_impl", "harness", "tests")]
    for name, module in list(sys.modules.items()):
        path = Path(getattr(module, "__file__", None) or "/")
        if any(path.is_relative_to(folder) for folder in own):
            del sys.modules[name]
    for name in (folder.name for folder in Path(package).iterdir() if not folder.is_symlink()):
        assert importlib.import_module(name).__file__ == f"{package}/{name}/__init__.py"
    options = ["-q", "--assert=plain", "-p", "no:cacheprovider", f"--basetemp={scratch}"]
    options += ["-W", "ignore"]  # forked ranks inherit the filter, and libraries warn
    code = pytest.main([*tests, *options])
    sys.stdout.flush()
    os._exit(RAN + code)


def run_tests(tmp_path: Path, defect: Defect) -> str:
    """Run the defect's tests on a copy with the defect. Returns "passed" or "failed"."""
    package, output = plant(defect, tmp_path / "package"), tmp_path / "output"
    tests = [f"tests/{defect.package}/{test}" for test in defect.tests]
    arguments = (str(package), tests, str(output), str(tmp_path / "scratch"))
    process = CONTEXT.Process(target=_run_tests, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the chosen tests did not end"
    text = output.read_text()
    outcomes = {RAN + pytest.ExitCode.OK: "passed", RAN + pytest.ExitCode.TESTS_FAILED: "failed"}
    assert process.exitcode in outcomes, text
    return outcomes[process.exitcode]


@pytest.mark.parametrize("package", ["alst_impl", "harness"])
def test_the_chosen_tests_pass_without_a_defect(
    package: Literal["alst_impl", "harness"], tmp_path: Path
) -> None:
    """Otherwise their failures would prove nothing."""
    tests = {test for d in TESTED.values() if d.package == package for test in d.tests}
    whole = Defect(package=package, file="__init__.py", edits=[], tests=sorted(tests))
    assert run_tests(tmp_path, whole) == "passed", (tmp_path / "output").read_text()


@pytest.mark.parametrize("name", TESTED)
def test_tests_catch_a_defect_that_no_gradient_shows(tmp_path: Path, name: str) -> None:
    """The chosen tests fail with the defect."""
    assert run_tests(tmp_path, TESTED[name]) == "failed", (tmp_path / "output").read_text()
