"""Cells -> records -> tables -> figures -> report. `snakemake -n` lists every run."""

# Advice of `snakemake --lint` that is answered, not followed: "Specify a conda environment or
# container for each rule". One Python environment, declared in pyproject.toml, serves every rule.

import os
import sys
from pathlib import Path

from harness.cells.experiment import load_experiment
from harness.cells.league import tasks
from harness.league.packages import inputs
from harness.processes.launch import command, num_nodes
from harness.records.sources import code_files
from harness.processes.tied import unlock

# A run that was killed leaves a lock behind; its jobs ended with it.
unlock(Path(".snakemake"))

# Sweeps to run: `--config experiments=smoke`, several with commas between. By default the
# CPU sweep and the parts of the paper's step; other questions are asked for by name, so that `make` stays short,
# those for a GPU (`gpu_...`) among them, and matrices are run by `alst matrix` on warm ranks.
asked = str(config.get("experiments", ""))
loaded = [load_experiment(path) for path in sorted(Path("experiments").glob("*.yaml"))]
by_name = {experiment.name: experiment for experiment in loaded}
# The league runs scripts, not cells: `experiments=league` alone, or beside experiments.
LEAGUE = "league" in asked.split(",")
if asked:
    names = [name for name in asked.split(",") if name != "league"]
    EXPERIMENTS = {name: by_name[name] for name in names}
else:
    left_out = {
        "smoke",
        "chunked",
        "decomposition",
        "decomposition_cpu",
        "longest",
        "layerwise_cpu",
        "patterns_cpu",
        "peers",
        "loss_parity",
        "methods",
        "methods_cpu",
        "paper_ablation",
        "paper_mst",
        "paper_scaling",
        "seq1f1b",
        "step_times",
    }
    EXPERIMENTS = {
        name: e
        for name, e in by_name.items()
        if name not in left_out and not name.startswith("gpu_") and e.matrix is None
    }
CELLS = {name: experiment.cells() for name, experiment in EXPERIMENTS.items()}
ALST = f"'{sys.executable}' -m harness"
FIGURES = sorted(map(str, Path("harness/present/figures").glob("*.py")))
TIED = f"exec '{sys.executable}' -m harness.processes.tied {os.getpid()}"
PRESENTED = sorted(
    str(path)
    for path in Path("harness/present").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
)


def records(wildcards):
    return [
        f"results/cells/{wildcards.name}/{key}.json" for key in CELLS[wildcards.name]
    ]


def drawn(name):
    return [
        f"results/figures/{name}/{figure}.svg" for figure in EXPERIMENTS[name].figures
    ]


CORES_PER_GPU = 8


def threads(wildcards):
    """A timed cell has the machine for itself, and every one on a GPU; others share it."""
    cell = CELLS[wildcards.name][wildcards.key]
    # On a cluster each job has its own share.
    if workflow.resource_settings.cores is None:
        return CORES_PER_GPU * max(gpus(wildcards), 1)
    alone = cell.timed or cell.world == "cuda"
    return workflow.cores if alone else cell.num_processes


def gpus(wildcards):
    cell = CELLS[wildcards.name][wildcards.key]
    return cell.num_processes if cell.world == "cuda" else 0


def nodes(wildcards):
    return num_nodes(CELLS[wildcards.name][wildcards.key])


def launcher(wildcards):
    """What stands for `alst`: on several nodes, torchrun on each of them. It ends with this process."""
    return f"{TIED} {command(CELLS[wildcards.name][wildcards.key], sys.executable)}"


def minutes(wildcards):
    """A cell's own limit, twice for the truth that comes first, and some to start."""
    return 2 * CELLS[wildcards.name][wildcards.key].timeout_s // 60 + 10


def code_of(wildcards):
    """A prediction is of the code that made it; what was measured stays."""
    cell = CELLS[wildcards.name][wildcards.key]
    return [str(path) for path in code_files()] if cell.traits.forecast else []


wildcard_constraints:
    name="|".join(EXPERIMENTS) or "-",
    key="[^/]+",
    figure="[^/]+",


localrules:
    all,


rule all:
    input:
        # Named one by one, so that a record that was removed is measured again.
        [f"results/cells/{name}/{key}.json" for name in CELLS for key in CELLS[name]],
        [drawn(name) for name in EXPERIMENTS],
        expand("results/tables/{name}.csv", name=EXPERIMENTS),
        "results/report.html" if EXPERIMENTS else [],
        "results/league/league.md" if LEAGUE else [],


rule cell:
    input:
        code_of,
    output:
        "results/cells/{name}/{key}.json",
    log:
        "results/logs/{name}/{key}.log",
    # In the order of the YAML, so that cells that are compared run one after the other.
    priority: lambda w: -list(CELLS[w.name]).index(w.key)
    threads: threads
    resources:
        timed=lambda w: int(CELLS[w.name][w.key].timed),
        gpu=gpus,
        nodes=nodes,
        runtime=minutes,
    params:
        alst=launcher,
    message:
        "{wildcards.name}: {wildcards.key}"
    shell:
        "{params.alst} cell experiments/{wildcards.name}.yaml {wildcards.key} 2> {log}"


rule table:
    input:
        records,
        "harness/records/metrics.py",
        "harness/records/table.py",
    output:
        "results/tables/{name}.csv",
    log:
        "results/logs/{name}/table.log",
    params:
        alst=f"{TIED} {ALST}",
    message:
        "{wildcards.name}: table"
    shell:
        "{params.alst} table {wildcards.name} > {log} 2>&1"


rule figure:
    input:
        records,
        "harness/records/metrics.py",
        FIGURES,
        "harness/present/drawing.py",
        "harness/records/table.py",
    output:
        "results/figures/{name}/{figure}.svg",
        "results/figures/{name}/{figure}.png",
    log:
        "results/logs/{name}/{figure}.log",
    params:
        alst=f"{TIED} {ALST}",
    message:
        "{wildcards.name}: figure {wildcards.figure}"
    shell:
        "{params.alst} figures {wildcards.name} {wildcards.figure} > {log} 2>&1"


rule report:
    input:
        expand("results/tables/{name}.csv", name=EXPERIMENTS),
        PRESENTED,
    output:
        "results/report.html",
    log:
        "results/logs/report.log",
    params:
        alst=f"{TIED} {ALST}",
        names=" ".join(EXPERIMENTS),
    message:
        "report"
    shell:
        "{params.alst} report {params.names} > {log} 2>&1"


rule task:
    input:
        lambda wildcards: inputs(tasks()[wildcards.key].peer) if LEAGUE else [],
    output:
        "results/league/{key}.json",
    log:
        "results/logs/league/{key}.log",
    # Lengths before the search that starts from them.
    priority: lambda w: -list(tasks()).index(w.key)
    params:
        alst=f"{TIED} {ALST}",
    message:
        "league: {wildcards.key}"
    shell:
        "{params.alst} league {wildcards.key} > {log} 2>&1"


rule league:
    input:
        [f"results/league/{key}.json" for key in tasks()],
    output:
        "results/league/league.md",
    log:
        "results/logs/league/page.log",
    params:
        alst=f"{TIED} {ALST}",
    message:
        "league: page"
    shell:
        "{params.alst} league --page > {log} 2>&1"
