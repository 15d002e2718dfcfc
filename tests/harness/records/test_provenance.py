"""What a record says of the code that made it, in a checkout of the test's own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from harness.records.provenance import checkout

FILES = ("harness/records/provenance.py", "alst_impl/config.py", "notes.txt", ".gitignore")


def git(folder: Path, *arguments: str) -> None:
    """Run git in `folder`, as somebody."""
    somebody = ["-c", "user.name=n", "-c", "user.email=e@example.com", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *somebody, *arguments], check=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A clean checkout that ignores `*.log`."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("*.log\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "all")
    return tmp_path


@pytest.mark.parametrize("folder", ["alst_impl/methods", "harness/present/figures", "experiments"])
def test_code_that_git_does_not_know_is_not_clean(root: Path, folder: str) -> None:
    """The commit of a record holds the method, the metric and the experiment that made it."""
    (root / folder).mkdir(parents=True)
    (root / folder / "ignored.log").touch()
    found = checkout(root)
    assert found is not None
    assert found.changed == []
    (root / folder / "mine.py").touch()
    found = checkout(root)
    assert found is not None
    assert found.changed == [f"{folder}/mine.py"]


def test_a_changed_file_is_not_clean_and_a_new_note_is(root: Path) -> None:
    """Outside of what decides a result only files that git knows count."""
    (root / "more.txt").touch()
    (root / "notes.txt").write_text("changed")
    found = checkout(root)
    assert found is not None
    assert found.changed == ["notes.txt"]


def test_the_checkout_of_something_else_is_none(root: Path) -> None:
    """A package that is installed inside another project's checkout is not of that project's commit."""
    git(root, "rm", "--quiet", "--cached", "harness/records/provenance.py")
    git(root, "commit", "--quiet", "--message", "not ours")
    assert checkout(root) is None
