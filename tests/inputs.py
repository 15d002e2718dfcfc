"""Runs wrong input: what a command answers, in this process or in one of its own, and what it leaves behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.__main__ import main
from harness.records.fire import Case, Level

ROOT = Path(__file__).parents[1]
LIMIT_S = 20
import_module("harness.predict.depth")  # torch and transformers, for which no command then waits
"""Within which wrong input is answered."""


class Late(BaseException):
    """A command has not answered, whatever errors it expects."""


@dataclass(frozen=True)
class Answer:
    """What a command answered."""

    code: int | None
    out: str
    err: str


def prepare(folder: Path, level: Level, case: Case) -> None:
    """Write the input of `case` to `folder`."""
    name = case.file or level.file
    if name is None:
        return
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if path.parent != folder and level.run.startswith("verify"):
        shutil.copy(ROOT / "alst_impl/models/tiny-llama.json", path.parent / "config.json")
    if case.folder:
        path.mkdir()
    elif case.link is not None:
        path.symlink_to(case.link)
    elif case.hex is not None:
        path.write_bytes(bytes.fromhex(case.hex))
    else:
        path.write_text(case.text * case.times if case.text is not None else _changed(level, case))


def _changed(level: Level, case: Case) -> str:
    """The level's valid document as `case` changes it."""
    valid = level.valid
    document: Any = json.loads(json.dumps(valid))
    if isinstance(valid, str):
        load = json.loads if valid.endswith(".json") else yaml.safe_load
        document = load((ROOT / valid).read_text())
    for keys in [*case.set, *case.drop]:
        *outer, last = keys.split(".")
        holder = document
        for key in outer:
            holder = holder[key]
        if keys in case.set:
            holder[last] = case.set[keys]
        else:
            del holder[last]
    assert level.file is not None
    return json.dumps(document) if level.file.endswith(".json") else yaml.safe_dump(document)


def answer(folder: Path, name: str, level: Level, case: Case) -> Answer:
    """What the command says to `case` in `folder`."""
    if case.shell is not None:
        return _in_shell(folder, case)
    with pytest.MonkeyPatch.context() as patch, _limit():
        patch.chdir(folder)
        patch.setenv("COLUMNS", "100")
        patch.delenv("CI", raising=False)
        patch.setattr(sys, "argv", ["alst", *shlex.split(case.run or level.run or name)])
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as ended:
                code = ended.code
        assert isinstance(code, int | None)
        return Answer(code, out.getvalue(), err.getvalue())


def _in_shell(folder: Path, case: Case) -> Answer:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    environment.pop("CI", None)
    for name, value in case.env.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    command = f'alst() {{ {shlex.quote(sys.executable)} -m harness "$@"; }}; {case.shell}'
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=LIMIT_S,
        check=False,
    )
    return Answer(done.returncode, done.stdout.decode(), done.stderr.decode())


@contextlib.contextmanager
def _limit() -> Iterator[None]:
    """Raise `Late` where a command takes longer than `LIMIT_S`."""

    def late(*_: object) -> None:
        raise Late(f"no answer within {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def contents(folder: Path) -> dict[str, int | str]:
    """Everything in `folder`, by path: sizes of files, targets of links."""
    found: dict[str, int | str] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = str(path.readlink())
        else:
            found[name] = path.stat().st_size if path.is_file() else "/"
    return found
