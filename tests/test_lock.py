"""requirements.lock, and the layout of an installed wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked() -> list[Requirement]:
    """The requirements in the lock file."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def test_the_lock_pins_everything_that_is_declared() -> None:
    """Every dependency and extra has one pinned release per Python version, within its range. `make
    update` renews them.
    """
    pinned: dict[str, set[str]] = {}
    for line in locked():
        (version,) = line.specifier
        pinned.setdefault(line.name, set()).add(version.version)
    extras = PROJECT["optional-dependencies"].values()
    for wanted in map(Requirement, chain(PROJECT["dependencies"], *extras)):
        if wanted.name != PROJECT["name"]:
            for version in pinned[wanted.name.lower()]:
                assert wanted.specifier.contains(version), (wanted.name, version)
    assert pinned["torch"] == {"2.13.0"}, "whose CPU build satisfies it, too"


def test_the_lock_serves_as_constraints_from_any_index() -> None:
    """It only has exact pins, as pip's constraints require: no extras, options or URLs."""
    assert all([s.operator for s in line.specifier] == ["=="] for line in locked())
    assert not any(line.extras or line.url for line in locked())


def test_experiments_are_found_outside_a_checkout(tmp_path: Path) -> None:
    """With an installed wheel in an empty folder, experiments, published numbers and defects are found."""
    for package in ("alst_impl", "harness"):
        shutil.copytree(ROOT / package, tmp_path / "site" / package)
    shutil.copytree(ROOT / "experiments", tmp_path / "site" / "harness" / "experiments")
    program = (
        "from pathlib import Path; from harness.cells import experiment, paths\n"
        "from harness.judge import defects\n"
        "from harness.records import published\n"
        "assert not Path('experiments').exists()\n"
        "found = {p.stem: experiment.load_experiment(p) for p in paths.experiments()}\n"
        "assert experiment.load_experiment(Path('experiments/smoke.yaml')) == found['smoke']\n"
        "assert found['correctness'].rows and published.records()\n"
        "assert defects.read_defects(paths.DEFECTS) and defects.read_catches(paths.CAUGHT)\n"
        "Path('experiments').mkdir(); Path('experiments/own.yaml').write_text('')\n"
        "assert [p.name for p in paths.experiments()] == ['own.yaml'] and published.records()\n"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {"PYTHONPATH": str(tmp_path / "site")}
    subprocess.run([sys.executable, "-c", program], cwd=empty, env=environment, check=True)
