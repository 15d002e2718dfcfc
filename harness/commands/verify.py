"""`alst verify`: compares every gradient of a method with the stock model in fp64."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from psutil import virtual_memory
from rich.console import Console
from rich.table import Table

from alst_impl.config import DType, LabelMask, Spec, TrainConfig
from alst_impl.layout import sizes
from alst_impl.methods.base import layouts, load_method, step_samples
from alst_impl.models import canonical, described, field
from harness.cells.cell import Cell, make_cell
from harness.cells.units import bytes_text
from harness.cells.worlds import TRAITS, World
from harness.commands.live import CellLine
from harness.commands.options import core_spec, parsed
from harness.commands.request import Seqlen
from harness.commands.run import DEFAULT_RESULTS, truth_cache
from harness.gate.verdict import exactness, same_mask
from harness.records.record import Measurement, Outcome, Readings
from harness.run.measure import measure
from harness.run.ranks import probed, require_memory

Pairs = list[str] | None
Pattern = Annotated[
    str | None,
    typer.Option(
        metavar="NAME:KEY=VALUE,...",
        show_default="all keys before a query",
        help="Keys that a query sees, as in `alst predict`; the stock model gets the same mask.",
    ),
]
Model = Annotated[str, typer.Option(help="A published configuration, or a path to a config.json.")]
Overrides = Annotated[
    Pairs,
    typer.Option(
        metavar="KEY=VALUE",
        show_default="none",
        help="Any field of the model's configuration, such as num_key_value_heads=2; repeatable.",
    ),
]
Method = Annotated[str, typer.Option(help="A file in alst_impl/methods/.")]
Options = Annotated[
    Pairs,
    typer.Option(
        metavar="KEY=VALUE",
        show_default="the method's own",
        help="Any option of the method, such as tiles=4; repeatable.",
    ),
]
Engine = Annotated[
    Literal["plain", "zero", "fsdp2"], typer.Option(help="Owner of parameters and optimizer.")
]
EngineOptions = Annotated[
    Pairs,
    typer.Option(
        metavar="KEY=VALUE",
        show_default="the engine's own",
        help="Any option of the engine, such as stage=2 of zero; repeatable.",
    ),
]
Sp = Annotated[int, typer.Option(min=1, help="Ranks that share one sample.")]
Cp = Annotated[int, typer.Option(min=1, help="Places of a ring; each place has sp ranks.")]
Pp = Annotated[int, typer.Option(min=1, help="Stages of a pipeline.")]
Dp = Annotated[int, typer.Option(min=1, help="Data-parallel groups; each has sp x cp x pp ranks.")]
Batch = Annotated[int, typer.Option(min=1, help="Samples per micro-batch.")]
Accumulation = Annotated[
    int, typer.Option(min=1, help="Micro-batches, each with another number of valid tokens.")
]
Mask = Annotated[LabelMask, typer.Option(help="Labels that carry no loss.")]
Documents = Annotated[
    int, typer.Option(min=1, help="Documents packed into a sample, of unequal lengths.")
]
Dtype = Annotated[DType, typer.Option(help="Of parameters and activations.")]
Seed = Annotated[int, typer.Option(min=0, help="Of weights and data.")]
InWorld = Annotated[World, typer.Option(help="World that executes the step.")]
Probes = Annotated[
    bool,
    typer.Option(
        "--probes",
        help="Also test what needs no reference: causality, leakage between documents, shards, tiles.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ResultsFolder = Annotated[Path, typer.Option(help="Folder whose .cache keeps truths.")]


def verify(
    model: Model = "tiny-llama",
    override: Overrides = None,
    method: Method = "alst",
    option: Options = None,
    engine: Engine = "zero",
    engine_option: EngineOptions = None,
    sp: Sp = 1,
    cp: Cp = 1,
    pp: Pp = 1,
    dp: Dp = 1,
    seqlen: Seqlen = 256,
    batch: Batch = 1,
    accumulation: Accumulation = 1,
    mask: Mask = "none",
    documents: Documents = 1,
    pattern: Pattern = None,
    dtype: Dtype = "float32",
    seed: Seed = 0,
    world: InWorld = "cpu",
    probes: Probes = False,
    as_json: AsJson = False,
    results: ResultsFolder = DEFAULT_RESULTS,
) -> int:
    """Compare every gradient of one step with the stock model, run in one process in fp64.

    Exit code 0: all are right; 1: a gradient is wrong, a probe fails or the method did nothing; 2: cannot be run.

    Example: alst verify --method alst --model tiny-llama --sp 2 --dp 2 --engine zero --json
    """
    degrees = {"dp": dp, "pp": pp, "cp": cp, "sp": sp}
    of_method = parsed(option or [])
    cell = make_cell(
        {
            "model": canonical(model),
            "overrides": parsed(override or [], "--override"),
            "method": {"name": method, **_offered(method, degrees), **of_method},
            "engine": {"name": engine, **parsed(engine_option or [], "--engine-option")},
            "world_size": math.prod(degrees.values()),
            "seqlen": seqlen,
            "batch_size": batch,
            "accumulation": accumulation,
            "attention": core_spec("sdpa", pattern),
            "dtype": dtype,
            "seed": seed,
            "data": {"mask": mask, "documents": documents},
            "world": world,
            "hardware": _hardware(world),
            **ONE_COMPARED_STEP,
        }
    )
    _check(cell, degrees, probes)
    return _report(cell, _measure(cell, results), probes, as_json)


FP64_BYTES = 8
ONE_COMPARED_STEP = {"warmup": 0, "steps": 0, "gate": True, "timed": False}


def _check(cell: Cell, degrees: dict[str, int], probes: bool) -> None:
    """Raise `ValueError` unless a sample has a label, the method makes `degrees` of its ranks, and can be probed if
    asked, and unless this machine can hold the truth.
    """
    if cell.train.seqlen < 2:
        raise ValueError(f"--seqlen {cell.train.seqlen}: no token has a next one; use 2 or more")
    made = sizes(layouts(cell.train))
    if made != degrees:
        name, ranks = cell.train.method.name, cell.train.world_size
        raise ValueError(f"method '{name}' makes {made} of {ranks} ranks, not {degrees}")
    if probes and (cell.traits.gpus or degrees["pp"] > 1):
        raise ValueError(
            f"--probes runs on CPU ranks without a pipeline, not in world '{cell.world}' with pp "
            f"({degrees['pp']}); leave it out"
        )
    require_memory(cell)
    _check_size(cell.train)


def _check_size(train: TrainConfig) -> None:
    """Raise `ValueError` if this machine cannot hold the truth."""
    from harness.predict.depth import structure  # which imports torch

    held = virtual_memory().total
    tokens = train.batch_size * train.seqlen
    logits = 2 * FP64_BYTES * tokens * field(described(train.model, train.overrides), "vocab_size")
    samples = FP64_BYTES * train.seqlen * step_samples(train)
    if logits + samples > held:
        raise ValueError(
            f"--seqlen {train.seqlen} --batch {train.batch_size} --accumulation {train.accumulation}: the truth holds "
            f"logits in fp64 and all samples, {bytes_text(logits + samples)}, and this machine has {bytes_text(held)}; take "
            "fewer tokens"
        )
    needed = 2 * FP64_BYTES * structure(train).num_parameters
    if needed > held:
        raise ValueError(
            f"--model {train.model}: the truth holds weights and gradients in fp64, {bytes_text(needed)}, and this "
            f"machine has {bytes_text(held)}; take fewer layers of it, such as --override num_hidden_layers=2"
        )


def _report(cell: Cell, measurement: Measurement, probes: bool, as_json: bool) -> int:
    """Print the comparison, and the probes if asked; the exit code."""
    if measurement.readings is None or measurement.readings.gate is None:
        print(f"alst: {measurement.outcome}: {measurement.detail}", file=sys.stderr)
        return 1 if measurement.outcome is Outcome.NAN_LOSS else 2
    answer = _answer(cell, measurement.readings)
    if probes:
        answer["probes"] = [finding.model_dump() for finding in probed(cell)]
    if as_json:
        print(json.dumps(answer))
    else:
        _print(answer)
    if measurement.detail:
        print(f"alst: {measurement.outcome}: {measurement.detail}", file=sys.stderr)
    found = [finding["passed"] for finding in answer.get("probes", [])]
    return 0 if answer["passed"] and all(found) else 1


def _hardware(world: World) -> str:
    """The hardware row of the device that runs the cell."""
    if not TRAITS[world].gpus:
        return "cpu"
    from harness.devices.machine import known_device
    from harness.devices.nvml import library

    return known_device(library())[0]


def _offered(method: str, degrees: dict[str, int]) -> dict[str, int]:
    """Degrees above 1 as options of `method`; dp is none. Raises `ValueError` if it has no such option."""
    wanted = {axis: n for axis, n in degrees.items() if axis != "dp" and n > 1}
    fields = sorted(type(load_method(Spec(name=method))).model_fields)
    for axis, n in wanted.items():
        if axis not in fields:
            raise ValueError(
                f"--{axis} {n}: method '{method}' has no option '{axis}'; "
                f"its options are: {', '.join(fields) or 'none'}"
            )
    return wanted


def _measure(cell: Cell, results: Path) -> Measurement:
    """Run the cell, with a live line on stderr."""
    truth_cache(results).mkdir(parents=True, exist_ok=True)  # now, not after minutes
    with CellLine(Console(stderr=True), cell, 1, 1) as line:
        return measure(cell, truth_cache(results), line.hear)


def _answer(cell: Cell, readings: Readings) -> dict[str, Any]:
    gate = readings.gate
    assert gate is not None
    counters = readings.evidence
    exact = exactness(gate, cell.train) or "exact within the dtype"
    return {
        "passed": gate.passed,
        "cell": cell.model_dump(mode="json"),
        "loss": {"ours": gate.loss, "truth": gate.truth_loss},
        "worst": gate.worst.model_dump(),
        "exactness": "; ".join(filter(None, (exact, same_mask(cell.train)))),
        "parameters": [parameter.model_dump() for parameter in gate.parameters],
        # The smallest count of all ranks shows a rank that did nothing.
        "evidence": {name: min(c[name] for c in counters) for name in counters[0]},
    }


def _print(answer: dict[str, Any]) -> None:
    console = Console()
    table = Table("parameter")
    table.add_column("ratio - 1", justify="right")
    table.add_column("1 - cosine", justify="right")
    for row in answer["parameters"]:
        if row["ratio"] is None:
            off = f"off by {row['error_norm']:.0e}" if row["error_norm"] else "zero"
            table.add_row(row["parameter"], "zero", off)
        else:
            table.add_row(row["parameter"], f"{row['ratio'] - 1:+.1e}", f"{1 - row['cosine']:+.1e}")
    console.print(table)
    console.print("worst:", answer["worst"]["parameter"])
    console.print(answer["exactness"])
    console.print("loss:", answer["loss"])
    console.print("evidence, least over ranks:", answer["evidence"])
    for finding in answer.get("probes", []):
        said = "holds" if finding["passed"] else "BROKEN"
        console.print(f"{finding['probe']}: {said}; {finding['detail']}", highlight=False)
    console.print("passed" if answer["passed"] else "WRONG", style="bold")
