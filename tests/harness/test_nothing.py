"""A verdict without records does not pass: every command prints one line and exits with code 2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from harness.__main__ import main
from harness.cells import paths
from harness.records import record

CLAIMED = """question: q
source: s
base: {model: tiny-llama, seqlen: 1_000, world: phantom, engine: fsdp2, hardware: h100-80gb}
sweeps:
  - axes:
      _row:
        - method: {name: alst}
          claim: {id: one, table: told, row: {name: ours}, columns: {longest_tokens: tokens}}
"""
PLANTED = "one: {file: step.py, edits: [{old: a, new: b}], tests: [test_step.py]}\n"


def refusal(
    arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """The line with which `alst` exits with code 2."""
    monkeypatch.setattr(sys, "argv", ["alst", *arguments.split()])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    (line,) = err.splitlines()
    return line


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with no experiments shipped with the code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CI", raising=False)
    return tmp_path


COMMANDS = (
    "claims",
    "compare results/reference results/cells",
    "confirm told",
    "defects",
    "reference told --partial",
    "report",
    "report told",
    "report --check",
    "report --readme",
    "summary",
    "summary told",
)


@pytest.mark.parametrize("arguments", COMMANDS)
def test_outside_a_checkout_no_verdict_passes(
    arguments: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A job in the wrong folder fails."""
    assert refusal(arguments, monkeypatch, capsys)
    assert not any(folder.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("claims", ["none of 1 published numbers", "--run"]),
        ("defects", ["defects.yaml", "make test"]),
        ("reference told --partial", ["no record of", "make"]),
        ("report", ["no records", "make"]),
        ("report told", ["told", "make"]),
        ("report --check", ["results/reference", "alst reference"]),
        ("summary", ["no records", "make"]),
        ("summary told", ["told", "make"]),
        ("run experiments/none.yaml", ["no cells", "sweeps"]),
    ],
)
def test_a_checkout_without_records_passes_no_verdict(
    arguments: str,
    words: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Published numbers do not count as ours, and an empty folder has none."""
    record.write_text(paths.experiment("told"), CLAIMED)
    record.write_text(paths.experiment("none"), "question: q\nsource: s\n")
    if arguments.startswith("claims"):
        paths.experiment("none").unlink()
    record.write_text(
        paths.published("told"), "name,tokens,source,source_locator\nours,1000,a paper,Table 1\n"
    )
    record.write_text(paths.DEFECTS, PLANTED)
    record.write_text(paths.README, "nothing generated\n")
    paths.cells("told").mkdir(parents=True)
    line = refusal(arguments, monkeypatch, capsys)
    assert all(word in line for word in words), line
