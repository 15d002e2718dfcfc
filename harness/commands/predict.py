"""`alst predict`, `alst search`: whether a step fits, and the longest sequence that does. Needs no GPU."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from harness.cells.cell import Cell, host_memory_bytes
from harness.cells.hardware import load_hardware
from harness.cells.prediction import LIMITS, Cost, Holding, Prediction, SearchResult, Simulated
from harness.cells.units import bytes_text, length_text, options_text, seconds_text
from harness.commands.options import parsed
from harness.commands.request import Request, Seqlen, States, about, asking

PATIENCE_S = 5.0
"""Time after which a running task shows its progress."""
LONGEST_SILENCE_S = 60.0
"""Longest time between two lines about it where there is no terminal."""
SHOWN = 30
"""Rows of `--explain` that are shown."""
WIDE = 180
"""Columns of `--explain`."""

Method = Annotated[str, typer.Option(help="A file in alst_impl/methods/.")]
Gpus = Annotated[int, typer.Option(min=1, help="Accelerators, over all nodes.")]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="KEY=VALUE",
        show_default="the method's own",
        help="Any option of the method; repeatable. By default sp, then cp, is the largest legal degree.",
    ),
]
Where = Annotated[
    States,
    typer.Option(
        "--states",
        help="Where parameters, gradients and optimizer states live, and where the update runs.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@asking
def predict(
    request: Request,
    seqlen: Seqlen,
    method: Method = "alst",
    gpus: Gpus = 8,
    option: Options = None,
    states: Where = "host",
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", help="List the tensors that are alive at the peak, with source lines."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Predict memory, limits, FLOPs and step time of one training step, without a GPU.

    PyTorch's own CUDA build (`make phantom` fetches it) runs the step on a phantom device, where memory is real and
    arithmetic is not. Its allocator counts the bytes. Memory outside the allocator and time are modelled.
    Layers are checkpointed. The time is counted work over the speeds that published steps reached.

    Example: alst predict llama3.1-8b --method alst --gpus 8 --seqlen 3_700_000 --hardware h100-80gb
    """
    cell = request.cell(seqlen, gpus, method, parsed(option or []), states)
    hush_transformers()
    found = forecast_of(cell)
    assert found.prediction is not None
    if as_json:
        answer = {**about(cell), **found.prediction.model_dump(mode="json")}
        if explain:
            answer["alive_at_peak"] = [each.model_dump(mode="json") for each in found.holdings]
        print(json.dumps(answer))
        return
    console = wide_console()
    _print_prediction(console, cell, found.prediction)
    console.print(request.assumed(cell, states), highlight=False)
    if explain:
        _print_holdings(console, found.holdings)


@asking
def search(
    request: Request,
    method: Method = "alst",
    gpus: Gpus = 8,
    option: Options = None,
    states: Where = "host",
    as_json: AsJson = False,
) -> None:
    """Find the longest sequence that fits, the shortest that does not, and the limit between them.

    A step that does not fit raised the out-of-memory error of PyTorch's allocator on a phantom device.

    Example: alst search llama3.1-8b --method alst --gpus 8 --hardware h100-80gb
    """
    cell = request.cell(GUESS, gpus, method, parsed(option or []), states)
    hush_transformers()
    found = forecast_of(searching(cell)).search
    assert found is not None
    if as_json:
        print(json.dumps({**about(cell), **found.model_dump(mode="json")}))
    else:
        console = wide_console()
        _print_search(console, cell, found)
        console.print(request.assumed(cell, states), highlight=False)


GUESS = 1_048_576
"""Length at which a search begins."""


def searching(cell: Cell) -> Cell:
    """`cell` with a search for its longest sequence."""
    assert cell.simulation is not None
    return cell.model_copy(
        update={"simulation": cell.simulation.model_copy(update={"search": True})}
    )


def forecast_of(cell: Cell) -> Simulated:
    """The forecast of `cell` by a phantom device. Raises as `on_phantom` does."""
    (found,) = on_phantom(
        "harness.predict.fits:execute", {"cell": cell.model_dump(mode="json")}, cell
    )
    return Simulated(**found["simulated"])


def on_phantom(
    entry: str, payload: dict[str, Any], cell: Cell, limit_s: float | None = None
) -> list[dict[str, Any]]:
    """The result of `entry` in a process with phantom devices; shows its progress.

    Raises `ValueError` if it cannot run or has no result in `limit_s` seconds, by default the timeout of
    `cell`; `RuntimeError` if it fails.
    """
    from harness.processes import client

    limit_s = limit_s or cell.timeout_s

    doing = {"now": f"{cell.label} on a phantom device"}

    def heard(event: dict[str, Any]) -> None:
        doing["now"] = f"{cell.label}: {event.get('doing', 'starting')}"

    with patience(lambda: doing["now"]):
        ending = client.submit(entry, payload, 1, limit_s, heard, accelerator="phantom")
    if ending.how == "finished":
        return list(ending.results)
    if ending.how == "timeout":
        raise ValueError(
            f"{cell.label}: no answer within {limit_s:,.0f} s; try again on a machine that does nothing else"
        )
    if ending.error in {"ValueError", "TooLarge"}:
        raise ValueError(ending.message)
    raise RuntimeError(
        f"{cell.label} on a phantom device: {ending.error or ending.how}: {ending.message}"
    )


def hush_transformers() -> None:
    """Silence the warnings of transformers about configurations; errors are still shown."""
    from transformers.utils import logging

    logging.set_verbosity_error()


@contextmanager
def patience(doing: str | Callable[[], str]) -> Iterator[None]:
    """After `PATIENCE_S`, show the current activity on stderr, and on a terminal the time it has taken."""
    told = doing if callable(doing) else lambda: doing
    console = Console(stderr=True)
    begin = time.monotonic()
    done = threading.Event()

    def show() -> None:
        if done.wait(PATIENCE_S):
            return
        if not console.is_terminal:
            every_s = PATIENCE_S
            console.print(f"alst: {told()} ...", highlight=False, soft_wrap=True)
            while not done.wait(every_s):
                every_s = min(2 * every_s, LONGEST_SILENCE_S)
                told_at = f"{told()}, {time.monotonic() - begin:.0f} s"
                console.print(f"alst: {told_at} ...", highlight=False, soft_wrap=True)
            return
        with console.status(told()) as status:
            while not done.wait(0.5):
                status.update(f"{told()}, {time.monotonic() - begin:.0f} s")

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def wide_console() -> Console:
    console = Console()
    console.width = max(console.width, 100)  # a narrower terminal wraps lines
    return console


def _print_prediction(console: Console, cell: Cell, p: Prediction) -> None:
    table = Table(
        title=_title(cell) + f", {length_text(cell.train.seqlen)} tokens", title_justify="left"
    )
    table.add_column("bytes of one GPU")
    table.add_column(justify="right")
    table.add_column()
    for category, nbytes in sorted(p.by_category.items(), key=lambda item: -item[1]):
        table.add_row(category, bytes_text(nbytes), "")
    table.add_section()
    reserved = p.reserved_bytes or 0
    table.add_row("allocated", bytes_text(p.allocated_bytes), "by PyTorch's allocator")
    table.add_row("reserved", bytes_text(reserved), "by PyTorch's allocator")
    outside = bytes_text(p.total_bytes - reserved)
    table.add_row("outside the allocator", outside, "from published readings")
    assert cell.simulation is not None
    usable = bytes_text(load_hardware(cell.hardware).usable_bytes)
    of_device = f"modelled; what NVML reads; of {usable}, {cell.simulation.margin:.1%} left free"
    table.add_row("total", bytes_text(p.total_bytes), of_device, style="bold")
    table.add_section()
    host = host_memory_bytes(cell)
    of_host = "" if math.isinf(host) else f"; of {bytes_text(host)}"
    counted = f"counted; states modelled{of_host}"
    table.add_row("host memory of a node", bytes_text(p.host_bytes), counted)
    if p.bytes_per_local_token is not None:
        table.add_row("slope of allocated", bytes_text(p.bytes_per_local_token), "per local token")
    console.print(table)
    verdict = "[green]fits[/]" if p.fits else f"[red]does not fit[/]: {LIMITS[p.limit]} ({p.limit})"
    console.print(verdict)
    console.print(
        f"FLOPs of a step: {p.flops.paper_formula:.3e} by the paper's formula, "
        f"{p.flops.model_causal:.3e} causal model FLOPs",
        highlight=False,
    )
    if p.cost is not None:
        _print_cost(console, p, p.cost, cell.train.world_size)
    console.print(_step_text(p), highlight=False)


def _step_text(p: Prediction) -> str:
    if p.time is None:
        return f"step: time unknown: {p.time_unknown}"
    low, high = seconds_text(p.time.low), seconds_text(p.time.high)
    spent = sorted(p.time.parts.items(), key=lambda part: -part[1])
    shares = [
        f"{part} {share:.0%}"
        for part, seconds in spent
        if (share := seconds / p.time.seconds) >= 0.01
    ]
    return (
        f"step: {seconds_text(p.time.seconds)}, between {low} and {high} (modelled); {', '.join(shares)}\n"
        f"speeds: {p.time.basis}"
    )


def _print_holdings(console: Console, held: list[Holding]) -> None:
    table = Table(title="alive at the peak", title_justify="left", box=None)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("tensors", justify="right", no_wrap=True)
    for heading in ("category", "function", "line"):
        table.add_column(heading, no_wrap=True)
    for each in held[:SHOWN]:
        table.add_row(
            bytes_text(each.nbytes),
            str(each.count),
            each.category,
            each.operator,
            each.location or "",
        )
    console.width = WIDE  # terminals do not cut lines, so that source locations stay whole
    console.print(table, soft_wrap=True)


def _print_cost(console: Console, p: Prediction, cost: Cost, ranks: int) -> None:
    """Print the FLOPs and bytes of the method itself, and the least time for them."""
    work = cost.flops * ranks
    console.print(
        f"computed: {work:.3e} FLOPs, {work / p.flops.model_causal:.2f} times what training needs; per GPU "
        f"{bytes_text(cost.device_bytes)} through matrix products and attention, "
        f"{bytes_text(cost.host_in_bytes)} from and {bytes_text(cost.host_out_bytes)} to the host, "
        f"{bytes_text(cost.link_bytes)} to other GPUs",
        highlight=False,
    )
    if p.least_seconds_modelled is not None:
        least = seconds_text(p.least_seconds_modelled)
        console.print(
            f"at the peaks of the datasheet: {least} at least (modelled)", highlight=False
        )


def _title(cell: Cell) -> str:
    train = cell.train
    method = ", ".join([train.method.name, *options_text(train.method.options)])
    return f"{train.model}, {method}, {train.world_size} x {cell.hardware}"


def _print_search(console: Console, cell: Cell, result: SearchResult) -> None:
    table = Table(title=_title(cell), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("longest that fits", f"{length_text(result.longest_tokens)} tokens", style="bold")
    table.add_row("shortest that does not", f"{length_text(result.shortest_failing_tokens)} tokens")
    table.add_row("limit", f"{LIMITS[result.limit]} ({result.limit})")
    table.add_row("steps that ran", str(result.evaluations))
    console.print(table)
