"""`alst verify`: every gradient of a method against the stock model, whole, in fp64."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from alst_impl.config import DType, LabelMask, Spec
from alst_impl.methods.base import load_method
from harness.cells.cell import Cell, make_cell
from harness.cells.worlds import TRAITS, World
from harness.commands.live import CellLine
from harness.commands.options import parsed
from harness.commands.run import DEFAULT_RESULTS, truth_cache
from harness.gate.verdict import exactness
from harness.records.record import Measurement, Outcome, Readings
from harness.run.measure import measure
from harness.run.ranks import probed

Engine = Literal["plain", "zero", "fsdp2"]


def verify(
    model: Annotated[
        str, typer.Option(help="A published configuration, or a path to a config.json.")
    ] = "tiny-llama",
    heads: Annotated[
        int | None, typer.Option(min=1, show_default="the model's own", help="Query heads.")
    ] = None,
    kv_heads: Annotated[
        int | None, typer.Option(min=1, show_default="the model's own", help="Key/value heads.")
    ] = None,
    method: Annotated[str, typer.Option(help="A file in alst_impl/methods/.")] = "alst",
    engine: Annotated[Engine, typer.Option(help="Owner of parameters and optimizer.")] = "zero",
    zero_stage: Annotated[
        int | None, typer.Option(min=1, max=3, show_default="3", help="Of engine zero.")
    ] = None,
    sp: Annotated[int, typer.Option(min=1, help="Ranks that share one sample.")] = 1,
    cp: Annotated[int, typer.Option(min=1, help="Places of a ring of such ranks.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Stages of a pipeline.")] = 1,
    dp: Annotated[int, typer.Option(min=1, help="Groups of all these ranks.")] = 1,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens of one sample.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Samples per micro-batch.")] = 1,
    accumulation: Annotated[
        int, typer.Option(min=1, help="Micro-batches, of unequal valid-token counts.")
    ] = 1,
    tiles: Annotated[
        int | None,
        typer.Option(min=1, show_default="the method's own", help="Tiles of everything tiled."),
    ] = None,
    offload: Annotated[
        bool | None,
        typer.Option(
            "--offload/--no-offload",
            show_default="the method's own",
            help="Checkpointed layer inputs in host memory.",
        ),
    ] = None,
    mask: Annotated[LabelMask, typer.Option(help="Labels that carry no loss.")] = "none",
    documents: Annotated[
        int, typer.Option(min=1, help="Documents packed into a sample, of unequal lengths.")
    ] = 1,
    probes: Annotated[
        bool,
        typer.Option(
            "--probes",
            help="Probe what needs no reference, too: causality, leakage between documents, shards, tiles.",
        ),
    ] = False,
    dtype: Annotated[DType, typer.Option(help="Of parameters and activations.")] = "float32",
    seed: Annotated[int, typer.Option(min=0, help="Of weights and data.")] = 0,
    world: Annotated[World, typer.Option(help="What executes it.")] = "cpu",
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", show_default="none", help="Any option of the method; repeatable."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    results: Annotated[
        Path, typer.Option(help="Folder whose .cache keeps truths.")
    ] = DEFAULT_RESULTS,
) -> int:
    """Compare every gradient of one step with the stock model run whole, in one process, in fp64.

    Exit code 0: all right; 1: a gradient is wrong, a probe fails or the method did nothing; 2: cannot be run.

    Example: alst verify --method alst --model tiny-llama --sp 2 --dp 2 --engine zero --json
    """
    degrees = {"dp": dp, "pp": pp, "cp": cp, "sp": sp}
    options = {
        **_offered(method, {axis: n for axis, n in degrees.items() if axis != "dp" and n > 1}),
        **_offered(method, {"tiles": tiles, "offload": offload}),
        **parsed(option or []),
    }
    cell = make_cell(
        {
            "model": model,
            "overrides": _given({"num_attention_heads": heads, "num_key_value_heads": kv_heads}),
            "method": {"name": method, **options},
            "engine": _engine(engine, zero_stage),
            "world_size": math.prod(degrees.values()),
            "seqlen": seqlen,
            "batch_size": batch,
            "accumulation": accumulation,
            "dtype": dtype,
            "seed": seed,
            "data": {"mask": mask, "documents": documents},
            "world": world,
            "hardware": _hardware(world),
            "warmup": 0,
            "steps": 0,
            "gate": True,
            "timed": False,
        }
    )
    made = load_method(cell.train.method).degrees(cell.train.world_size)
    if made != degrees:
        ranks = cell.train.world_size
        raise ValueError(f"method '{method}' makes {made} of {ranks} ranks, not {degrees}")
    if probes and (TRAITS[world].gpus or degrees["cp"] * degrees["pp"] > 1):
        raise ValueError(
            f"--probes knows CPU ranks in dp and sp, not world '{world}' or {degrees}; leave it out"
        )
    measurement = _measure(cell, results)
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
    """The row of what runs the cell."""
    if not TRAITS[world].gpus:
        return "cpu"
    from harness.devices.machine import known_device
    from harness.devices.nvml import library

    return known_device(library())[0]


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _engine(name: str, zero_stage: int | None) -> dict[str, Any]:
    if name != "zero" and zero_stage is not None:
        raise ValueError(
            f"--zero-stage {zero_stage} is for --engine zero, not {name}; leave it out"
        )
    return {"name": name, **_given({"stage": zero_stage})}


def _offered(method: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values that were given, if `method` has these options."""
    fields = sorted(type(load_method(Spec(name=method))).model_fields)
    for key, value in _given(values).items():
        if key not in fields:
            raise ValueError(
                f"--{key} {value}: method '{method}' has no option '{key}'; "
                f"its options are: {', '.join(fields) or 'none'}"
            )
    return _given(values)


def _measure(cell: Cell, results: Path) -> Measurement:
    """Run the cell, with a live line on stderr."""
    with CellLine(Console(stderr=True), cell, 1, 1) as line:
        return measure(cell, truth_cache(results), line.hear)


def _answer(cell: Cell, readings: Readings) -> dict[str, Any]:
    gate = readings.gate
    assert gate is not None
    counters = [evidence.model_dump() for evidence in readings.evidence]
    return {
        "passed": gate.passed,
        "cell": cell.model_dump(mode="json"),
        "loss": {"ours": gate.loss, "truth": gate.truth_loss},
        "worst": gate.worst.model_dump(),
        "exactness": exactness(gate, cell.train) or "exact within the dtype",
        "parameters": [parameter.model_dump() for parameter in gate.parameters],
        # The least busy rank: one that did nothing must show.
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
