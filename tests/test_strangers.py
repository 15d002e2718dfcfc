"""Files and names of others: they leave no folder and run nothing."""

from __future__ import annotations

import ast
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from alst_impl.config import Spec, TrainConfig
from alst_impl.models import hf_config, materialize, published
from alst_impl.plugin import load
from harness.cells import paths
from harness.cells.cell import make_cell
from harness.cells.hardware import Hardware, load_hardware
from harness.present.figures.base import draw
from harness.records.table import Results

ROOT = Path(__file__).parents[1]
PATHS = ("../x", "/etc/x", "a/b", "..", ".", "", "a\\b/../c", "x\0y")
UNSAFE = {
    "eval",
    "exec",
    "pickle.load",
    "pickle.loads",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "marshal.loads",
    "os.system",
    "os.popen",
}


@pytest.mark.parametrize("name", PATHS)
def test_a_name_stays_in_its_folder(name: str) -> None:
    """A path is no name of an experiment, a plug-in, a figure or hardware, and none gets into the name of a record."""
    with pytest.raises(ValueError, match="no name of an experiment"):
        paths.experiment(name)
    with pytest.raises(ValueError, match="unknown"):
        load("alst_impl.methods", Any, Spec(name=name))
    with pytest.raises(ValueError, match="unknown"):
        draw(name, Results("n", "q", "s", [], {}, {}))
    row = load_hardware("h100-80gb").model_dump()
    with pytest.raises(ValueError, match="name"):
        Hardware.model_validate({**row, "name": name})


def test_a_record_is_named_in_its_folder(tmp_path: Path) -> None:
    """Whatever its model is called."""
    model = tmp_path / "..own model=$(id)" / "config.json"
    model.parent.mkdir()
    model.write_text(json.dumps(published("tiny-llama")))
    key = make_cell({"model": str(model), "method": "baseline", "seqlen": 64}).key
    assert Path(key).name == key
    assert not set(key) & set("/\\ $()")


def test_code_that_came_with_a_model_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto_map` names a module beside the configuration, which is never imported."""
    fields = {**published("tiny-llama"), "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    monkeypatch.chdir(tmp_path)
    found = hf_config(TrainConfig(model=str(tmp_path), method="baseline", seqlen=8))
    assert type(found).__module__.startswith("transformers.")
    assert "evil" not in sys.modules


class Evil:
    """Makes a file where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def test_pickled_weights_beside_others_are_not_read(tmp_path: Path) -> None:
    """Those in safetensors are."""
    folder, trace = tmp_path / "model", tmp_path / "trace"
    materialize(TrainConfig(model="tiny-llama", method="baseline", seqlen=8)).save_pretrained(
        folder
    )
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Evil(trace)))
    materialize(TrainConfig(model=str(folder), method="baseline", seqlen=8))
    assert not trace.exists()


def test_nothing_is_unpickled_or_evaluated() -> None:
    """No file of the packages calls what runs text or files of others; weights of PyTorch are not loaded at all."""
    for package in ("alst_impl", "harness"):
        for path in (ROOT / package).rglob("*.py"):
            calls = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))
            for call in calls:
                name = ast.unparse(call.func)
                assert name not in UNSAFE, f"{path}:{call.lineno}"
                given = {each.arg for each in call.keywords}
                assert name != "torch.load" or "weights_only" in given, f"{path}:{call.lineno}"
                assert not given & {"trust_remote_code", "allow_pickle"}, f"{path}:{call.lineno}"
                shell = [k.value for k in call.keywords if k.arg == "shell"]
                assert not shell, f"{path}:{call.lineno}"


def test_the_clock_on_the_wall_dates_records_alone() -> None:
    """Durations and limits are of a clock that never jumps."""
    dating = {
        "harness/records/provenance.py",
        "harness/league/runs.py",
        "harness/commands/present.py",
    }
    for package in ("alst_impl", "harness"):
        for path in (ROOT / package).rglob("*.py"):
            calls = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))
            names = {ast.unparse(call.func) for call in calls}
            assert "time.time" not in names, path
            wall = {name for name in names if name.endswith(("datetime.now", "utcnow", "today"))}
            assert not wall or str(path.relative_to(ROOT)) in dating, path
