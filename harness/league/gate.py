"""Runs one step of a peer's script on CPU ranks, and compares its loss and every gradient with the truth."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from alst_impl.config import TrainConfig
from alst_impl.models import materialize
from harness.cells import league
from harness.cells.cell import Cell, make_cell
from harness.cells.grid import merge
from harness.cells.league import Task
from harness.gate.gradients import compare
from harness.gate.truths import Truth, samples_of
from harness.gate.verdict import (
    TOLERANCES,
    explain_failure,
    noise_floor,
    precision,
    scales,
    used,
)
from harness.league.scripts import command, environment
from harness.processes import client
from harness.records.league import FRESH, Gradient, Verdict
from harness.records.record import Gate
from harness.run.ranks import prepare

LIMIT_S = 300


def judged(task: Task, cache: Path) -> tuple[Verdict, str, Gradient | None]:
    """The verdict on the gradients of `task`, why in a line, and the numbers. `cache` is the folder of truths."""
    cell = cell_of(task)
    ending = prepare([cell], cache, client.ignore, doubts=False)
    if ending.how != "finished":
        return "cannot run", f"the truth could not be computed: {ending.message}", None
    ((truth,),) = ending.results
    log = FRESH / f"{task.key}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="league-") as scratch:
        folder = Path(scratch)
        made = folder / "gradients.safetensors"
        with log.open("w") as file:
            ended = _run(task, cell, folder, made, file.fileno())
        if ended is None:
            return "cannot run", f"the step did not end within {LIMIT_S} s", None
        if ended or not made.is_file():
            return "cannot run", _first_error(log) or f"ended with exit code {ended}", None
        gradients = load_file(made)
    loss = float(gradients.pop("loss"))
    gate = compare(gradients, loss, Truth(**truth), cell.train)
    found = gradient_of(gate, cell.train)
    if gate.passed:
        return "right", "", found
    if not found.wrong_parameters:
        return (
            "wrong",
            f"loss {gate.loss} instead of {gate.truth_loss}; its gradients are right",
            found,
        )
    return "wrong", explain_failure(gate, cell.train), found


def cell_of(task: Task) -> Cell:
    """The cell whose model, samples and truth a case of the gate has."""
    gating = league.league().gate
    return make_cell(merge(gating.cell, gating.cases[task.case]))


def gradient_of(gate: Gate, train: TrainConfig) -> Gradient:
    """What a record keeps of a comparison."""
    worst, rounding, scale = gate.worst, precision(train), scales(gate.parameters)
    shares = [
        used(p, TOLERANCES[rounding], noise_floor(p, scale[p.parameter], rounding))
        for p in gate.parameters
    ]
    finite = worst.error_norm is not None and worst.truth_norm
    return Gradient(
        loss=gate.loss if math.isfinite(gate.loss) else None,
        truth_loss=gate.truth_loss,
        worst=worst.parameter,
        error=(worst.error_norm or 0.0) / (worst.truth_norm or 1.0) if finite else None,
        ratio=worst.ratio,
        cosine=worst.cosine,
        wrong_parameters=sum(share > 1 for share in shares),
        parameters=len(gate.parameters),
    )


def _run(task: Task, cell: Cell, folder: Path, made: Path, log: int) -> int | None:
    """Exit code of the step; None if it was stopped after `LIMIT_S`."""
    train = cell.train
    materialize(train).float().save_pretrained(folder / "model")
    save_file(samples_of(train, 0), folder / "samples.safetensors")
    peer = league.peers()[task.peer]
    ranks = peer.gate_ranks or (league.league().gate.ranks if peer.sequence_parallel else 1)
    arguments = [
        *("--model", str(folder / "model"), "--seqlen", str(train.seqlen), "--steps", "1"),
        *("--accumulation", str(train.accumulation)),
        *("--samples", str(folder / "samples.safetensors"), "--gradients", str(made)),
        *(["--packed"] if train.data.packed else []),
    ]
    process = subprocess.Popen(
        command(task, ranks, *arguments),
        env=environment(task, folder),
        cwd=folder,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        return process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _first_error(log: Path) -> str:
    """What the first rank that failed says in `log`, or else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    named = (
        re.fullmatch(r"(?:\[rank\d+\]: )?((?:\w+\.)*\w*(?:Error|Exception)\b.*)", line)
        for line in lines
    )
    said = next((found[1] for found in named if found), None)
    return (said or (lines or [""])[-1])[:300]
