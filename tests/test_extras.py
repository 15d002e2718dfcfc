"""A missing package is named with its extra."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from alst_impl.config import Spec
from alst_impl.engines.base import load_engine
from alst_impl.planners.base import load_planner
from harness.cells.cell import make_cell
from harness.predict.flexsp import published_cluster, published_cost
from harness.run.measure import measure_to

ROOT = Path(__file__).parents[1]
SETTINGS = {"model": "tiny-llama", "seqlen": 64, "method": "baseline", "world": "cpu"}


def test_the_command_line_names_its_extra() -> None:
    """Without the extra `harness` there is one line and exit code 2."""
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['pandas', 'psutil'])); sys.argv = ['alst', 'cells']; "
        "from harness.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    said = "alst: the command line needs pandas, psutil: pip install 'alst-bench[harness]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def test_an_engine_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without DeepSpeed, a cell that needs it is refused before anything runs. Other engines still work."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    path = tmp_path / "record.json"
    with pytest.raises(
        ValueError, match=r"'zero' needs deepspeed: pip install 'alst-bench\[zero\]'"
    ):
        measure_to(path, make_cell(SETTINGS), tmp_path, force=False)
    assert not path.exists()
    load_engine(Spec(name="fsdp2")).require()


def test_a_planner_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without scipy, `flexsp` is refused in one line. Other planners still work."""
    monkeypatch.setitem(sys.modules, "scipy", None)
    cluster, cost = published_cluster("GPT-7B", 192), published_cost("GPT-7B")
    with pytest.raises(
        ValueError, match=r"'flexsp' needs scipy: pip install 'alst-bench\[flexsp\]'"
    ):
        load_planner(Spec(name="flexsp")).plan([100], cluster, cost)
    load_planner(Spec(name="single")).plan([100], cluster, cost)
