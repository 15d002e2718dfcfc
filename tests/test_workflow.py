"""The Snakefile, without running a cell."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from harness.cells.experiment import load_experiment
from harness.processes.launch import num_nodes

ROOT = Path(__file__).parents[1]
ANSWERED = {"Specify a conda environment or container for each rule.:"}
"""Advice of the linter that a comment at the top of the Snakefile answers."""


SNAKEMAKE = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]


def snakemake(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run Snakemake on the project's Snakefile from `folder`."""
    return subprocess.run(
        [*SNAKEMAKE, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def test_dry_run_lists_every_cell(tmp_path: Path) -> None:
    """`snakemake -n` lists every run before anything runs."""
    for name in ("experiments", "harness", "profiles"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = snakemake("-n", "--config", "experiments=smoke", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for key in load_experiment(ROOT / "experiments" / "smoke.yaml").cells():
        assert key in done.stdout


@pytest.mark.parametrize("name", ["gpu_single", "gpu_node"])
def test_experiments_for_a_gpu_are_listed_without_one(tmp_path: Path, name: str) -> None:
    """Every cell is a job if it is requested by name. A cell of several nodes starts torchrun on each."""
    for folder in ("experiments", "harness", "profiles"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    done = snakemake("-n", "-p", "--config", f"experiments={name}", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    cells = load_experiment(ROOT / "experiments" / f"{name}.yaml").cells()
    assert all(key in done.stdout for key in cells)
    nodes = [num_nodes(cell) for cell in cells.values()]
    assert done.stdout.count("srun --nodes=4 ") == nodes.count(4)


def test_the_script_for_a_gpu_runs_experiments_that_exist() -> None:
    """Every step names an existing file, and bash can parse the script."""
    script = ROOT / "experiments" / "measure_gpu.sh"
    named = set(re.findall(r"\bgpu_\w+", script.read_text()))
    assert named >= {"gpu_single", "gpu_kernels", "gpu_longer", "gpu_flash_attn"}
    assert all((ROOT / "experiments" / f"{name}.yaml").is_file() for name in named)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


def test_the_default_sweep_needs_no_gpu(tmp_path: Path) -> None:
    """A cell of world `cuda` only runs if it is requested."""
    for folder in ("experiments", "harness", "profiles"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    done = snakemake("-n", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "gpu_" not in done.stdout


def test_the_profile_for_slurm_differs_in_where_cells_run() -> None:
    """It resumes and continues after failures as the default profile does."""
    default, slurm = (
        yaml.safe_load((ROOT / "profiles" / name / "config.yaml").read_text())
        for name in ("default", "slurm")
    )
    shared = ["keep-going", "rerun-incomplete", "rerun-triggers"]
    assert {key: slurm[key] for key in shared} == {key: default[key] for key in shared}
    assert slurm["executor"] == "slurm"


def test_parsing_imports_no_torch() -> None:
    """Cells expand quickly enough for a dry run."""
    code = (
        "import sys; from pathlib import Path; from harness.cells.experiment import load_experiment; "
        "[load_experiment(p) for p in Path('experiments').glob('*.yaml')]; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_every_advice_of_the_linter_is_followed_or_answered() -> None:
    """`snakemake --lint` reports only what the Snakefile answers."""
    done = snakemake("--lint")
    lines = (done.stdout + done.stderr).splitlines()
    given = {line.strip().removeprefix("* ") for line in lines if line.startswith("    * ")}
    assert given == ANSWERED


ONE_CELL = """
question: Does a run that was killed go on?
source: none
base: {model: tiny-llama, seqlen: 1_024, world: cpu}
sweeps: [{axes: {method: [baseline]}}]
"""


@pytest.mark.parametrize(
    ("whom", "end"),
    [
        ("parent", signal.SIGKILL),
        ("snakemake", signal.SIGKILL),
        ("snakemake", signal.SIGTERM),
        ("snakemake", signal.SIGINT),
    ],
)
def test_a_killed_sweep_ends_all_jobs_and_the_next_one_resumes(
    tmp_path: Path, whom: str, end: signal.Signals
) -> None:
    """A signal ends Snakemake or its parent: no job remains, and no lock blocks the next run."""
    for folder in ("harness", "profiles"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "experiments").mkdir()
    path = tmp_path / "experiments" / "one.yaml"
    path.write_text(ONE_CELL)
    (key,) = load_experiment(path).cells()
    target = f"results/cells/one/{key}.json"
    asked = ["--cores", "1", "--config", "experiments=one", "--", target]
    tied = f"{sys.executable} -m harness.processes.tied $$ {' '.join([*SNAKEMAKE, *asked])} & wait"
    shell = subprocess.Popen(
        ["bash", "-c", tied], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log = tmp_path / "results" / "logs" / "one" / f"{key}.log"
    while not log.exists():  # a job creates it first
        assert shell.poll() is None
        time.sleep(0.01)
    started = psutil.Process(shell.pid).children(recursive=True)
    assert len(started) >= 2, "Snakemake and the cell"
    (first,) = psutil.Process(shell.pid).children()
    os.kill(shell.pid if whom == "parent" else first.pid, end)
    shell.wait(60)
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive
    if end is signal.SIGKILL:
        assert list((tmp_path / ".snakemake" / "locks").iterdir()), "it had locked the folder"

    done = snakemake("--cleanup-shadow", *asked, folder=tmp_path)  # takes the lock, runs nothing
    assert done.returncode == 0, done.stderr
