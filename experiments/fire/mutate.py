"""Makes mutants of ops, gate and judge, edits of one place each, and runs the tests that should notice them.

    python experiments/fire/mutate.py --help

`mutants.yaml` says which tests judge which module. The tool, cosmic-ray, has the kinds of edits and makes them.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer

from harness.records import mutants, record
from harness.records.mutants import Campaign, Judged, Mutant, Trial, count, gaps
from harness.records.provenance import checkout

try:
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names
except ImportError:
    sys.exit("mutate.py needs cosmic-ray, which is not installed; pip install 'cosmic-ray>=8.3,<9'")

ROOT = Path(__file__).resolve().parents[2]
FRESH = Path("results") / "mutants.json"
CONTEXT = multiprocessing.get_context("fork")
FACTOR = 5
"""How many times as long as without a mutant tests may run."""
LEAST_LIMIT_S = 90.0
"""The shortest time that they may."""
ELSEWHERE = 99
"""Exit code of a fork that would not import the copy."""
Place = tuple[str, int]
"""Name of an operator, and an occurrence."""


def main(
    *,
    per_module: Annotated[int, typer.Option(min=1, help="Most mutants of a module.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    only: Annotated[
        list[str] | None, typer.Option(help="Modules whose path has this in it; may be repeated.")
    ] = None,
    to: Annotated[Path, typer.Option(help="The record.")] = FRESH,
) -> None:
    """Make a random sample of mutants of every module of mutants.yaml, each in a copy of this checkout, and test each.

    The record is written after each mutant. A second call goes on from there: it leaves out killed mutants of modules
    and tests that are as they were. Tests that do not end in five times their usual time notice the mutant, too. Exit
    code 0: each mutant is noticed, or named in mutants.yaml as one that computes the same; 1: one is neither.

    Example: python experiments/fire/mutate.py --per-module 2 --only ops/memory
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leaves nothing
    table = mutants.judged(ROOT / mutants.TABLE)
    begun = _begun(to, seed, per_module)
    trials = begun.trials
    for trials in _tried(begun, table, only or [""]):
        record.write_text(to, _text(begun.model_copy(update={"trials": trials})))
    for gap in gaps(trials, table):
        print(gap.mutant.diff)
    found = count(trials, table)
    print(", ".join(f"{number} {name.replace('_', ' ')}" for name, number in found))
    raise typer.Exit(found.survived > 0)


def _tried(begun: Campaign, table: dict[str, Judged], only: list[str]) -> Iterator[list[Trial]]:
    """After each mutant, the trials of the sample that were made, in its order."""
    importlib.import_module("harness.processes.preload")  # libraries, for all forks
    before = {_name(trial.mutant): trial for trial in begun.trials}
    made = {name: trial for name, trial in before.items() if trial.mutant.module in table}
    place = {module: index for index, module in enumerate(table)}
    with copied() as copy:
        for module in (m for m in table if any(part in m for part in only)):
            drawn = sample((copy / module).read_text(), module, begun)
            made = {n: t for n, t in made.items() if t.mutant.module != module or t.mutant in drawn}
            for mutant in drawn:
                name = _name(mutant)
                made[name] = _trial(copy, mutant, table[module], before.get(name))
                yield sorted(
                    made.values(),
                    key=lambda t: (place[t.mutant.module], t.mutant.line, _name(t.mutant)),
                )


def _begun(path: Path, seed: int, per_module: int) -> Campaign:
    """The campaign at `path`, if it is of the same sample."""
    tool = f"cosmic-ray {version('cosmic-ray')}"
    found = checkout()
    fresh = Campaign(
        tool=tool, seed=seed, per_module=per_module, commit=found.commit if found else None
    )
    held = mutants.read(path)
    same = held is not None and (held.tool, held.seed, held.per_module) == (tool, seed, per_module)
    return fresh.model_copy(update={"trials": held.trials}) if same and held else fresh


def _name(mutant: Mutant) -> str:
    return mutant.model_dump_json()


def _text(campaign: Campaign) -> str:
    return campaign.model_dump_json(indent=1) + "\n"


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of the checkout's files that git does not ignore, for the time of the context."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory(prefix="mutants") as folder:
        for name in filter(None, names.split("\0")):
            if (ROOT / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, Path(folder) / name)
        yield Path(folder).resolve()


def sample(source: str, module: str, of: Campaign) -> list[Mutant]:
    """Mutants of `source` at random places, no two at the same, in the order of the places.

    A place is drawn first, then an edit there: else most edits would be of one operator by another.
    """
    draw = random.Random(f"{of.seed} {module}")
    places = sorted(_places(source).items())
    draw.shuffle(places)
    found: list[Mutant] = []
    for (line, _), edits in places:
        if len(found) == of.per_module:
            break
        operator, occurrence = draw.choice(edits)
        changed = mutate_code(source, get_operator(operator)(), occurrence)
        if changed is not None and _is_other(source, changed):
            diff = difflib.unified_diff(
                source.splitlines(), changed.splitlines(), module, module, n=1, lineterm=""
            )
            found.append(
                Mutant(
                    module=module,
                    operator=operator.removeprefix("core/"),
                    occurrence=occurrence,
                    line=line,
                    diff="\n".join(diff),
                )
            )
    return sorted(found, key=lambda mutant: mutant.line)


def _places(source: str) -> dict[tuple[int, int], list[Place]]:
    """Places of `source` that can be edited, and the edits of each."""
    found: dict[tuple[int, int], list[Place]] = {}
    nodes = [*ast_nodes(get_ast(source))]
    for name in operator_names():
        kind = get_operator(name)
        if not kind.arguments():
            positions = (at for node in nodes for at, _ in kind().mutation_positions(node))
            for occurrence, at in enumerate(positions):
                found.setdefault(at, []).append((name, occurrence))
    return found


def _is_other(source: str, changed: str) -> bool:
    """Whether `changed` is another program. What the type checker alone reads does not make it one."""
    try:
        return _bare(source) != _bare(changed)
    except SyntaxError:
        return False


def _bare(source: str) -> str:
    """The syntax of `source` without annotations and tests for the type checker."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.test = ast.Constant(None)
    return ast.dump(tree)


def _trial(copy: Path, mutant: Mutant, by: Judged, before: Trial | None) -> Trial:
    """`mutant` under its tests, in `copy`; what was found before, if that holds still."""
    path = copy / mutant.module
    source = path.read_text()
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    as_before = before and (before.source, before.tests) == (digest, by.tests)
    if before and as_before and before.outcome != "survived":
        return before
    limit = max(LEAST_LIMIT_S, FACTOR * usual_s(copy, tuple(by.tests)))
    changed = mutate_code(source, get_operator(f"core/{mutant.operator}")(), mutant.occurrence)
    assert changed is not None, "it was drawn from this source"
    try:
        path.write_text(changed)
        begin = time.monotonic()
        ended = run_tests(copy, by.tests, limit)
    finally:
        path.write_text(source)
    outcome: Literal["killed", "timed out", "survived"] = "killed"
    if ended is None or ended == 0:
        outcome = "timed out" if ended is None else "survived"
    seconds = round(time.monotonic() - begin, 1)
    print(f"{mutant.module}:{mutant.line}: {mutant.operator}: {outcome}, {seconds} s", flush=True)
    return Trial(mutant=mutant, source=digest, tests=by.tests, outcome=outcome, seconds=seconds)


@cache
def usual_s(copy: Path, tests: tuple[str, ...]) -> float:
    """Seconds of `tests` without a mutant. Raises `ValueError` if they fail: then a failure would prove nothing."""
    begin = time.monotonic()
    if run_tests(copy, list(tests), None) != 0:
        raise ValueError(f"tests {', '.join(tests)} fail without a mutant; mend them first")
    return time.monotonic() - begin


def run_tests(copy: Path, tests: list[str], limit_s: float | None) -> int | None:
    """Exit code of pytest with `tests` of `copy`; None if they did not end in time. Nothing that they start is left."""
    with tempfile.TemporaryDirectory(prefix="mutant", ignore_cleanup_errors=True) as scratch:
        process = CONTEXT.Process(target=_pytest, args=(copy, tests, scratch))
        process.start()
        try:
            process.join(limit_s)
            assert process.exitcode != ELSEWHERE, "it would test code without the mutant"
            return process.exitcode
        finally:
            assert process.pid is not None, "it was started"
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()


def _pytest(copy: Path, tests: list[str], scratch: str) -> None:
    """Body of a fork, which has imported all libraries, so that it soon begins; it imports our packages from `copy`."""
    os.setsid()
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    # A file of bytecode could be of a mutant of the same second.
    own = {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": scratch}
    os.environ |= own
    sys.dont_write_bytecode, tempfile.tempdir = True, scratch
    for name, module in list(sys.modules.items()):
        if name != "__main__" and Path(getattr(module, "__file__", None) or "/").is_relative_to(
            ROOT
        ):
            del sys.modules[name]
    sys.path[:] = [str(copy), *(path for path in sys.path if Path(path).resolve() != ROOT)]
    for package in ("alst_impl", "harness"):
        found = importlib.util.find_spec(package)
        if found is None or found.origin != f"{copy}/{package}/__init__.py":
            os._exit(ELSEWHERE)
    os.chdir(copy)
    options = ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", "-W", "ignore"]
    options += ["-m", "not phantom and not slow"]
    code = pytest.main([*options, *(f"tests/{test}" for test in tests)])
    os._exit(code)


if __name__ == "__main__":
    typer.run(main)
