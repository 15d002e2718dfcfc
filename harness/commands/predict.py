"""`alst predict`, `alst search`: will it fit, and how long a sequence does? No GPU needed."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from alst_impl.config import Spec
from alst_impl.methods.base import load_method
from alst_impl.models import field, published
from harness.cell import Cell, make_cell
from harness.commands.options import parsed
from harness.plain import bytes_text, bytes_value, options_text, seconds_text
from harness.prediction import LIMITS, Cost, Holding, Prediction, SearchResult, Simulated

if TYPE_CHECKING:
    from harness.tracker import Allocation

PATIENCE_S = 5.0
"""What takes longer shows that it is alive."""
SHOWN = 30
"""Rows of `--explain`; the rest is added up."""
WIDE = 180
"""Columns of `--explain`."""

Model = Annotated[
    str, typer.Argument(help="A published configuration by name, or a path to any config.json.")
]
Method = Annotated[str, typer.Option(help="A file in alst_impl/methods/.")]
Gpus = Annotated[int, typer.Option(min=1, help="Accelerators, over all nodes.")]
HardwareName = Annotated[
    str, typer.Option("--hardware", help="A row of harness/hardware.py, or a YAML file with one.")
]
HostMemory = Annotated[
    str | None,
    typer.Option(show_default="the hardware's", help="Of one node, such as 4TB or 1900GiB."),
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="KEY=VALUE",
        show_default="the method's own",
        help="Any option of the method; repeatable. sp, then cp, is by default the largest legal degree.",
    ),
]
OffloadParameters = Annotated[
    bool, typer.Option("--offload-parameters", help="Parameter shards in host memory, too.")
]
Kernel = Annotated[
    Literal["flash_attention_2", "flash_attention_3"],
    typer.Option(help="Core attention whose scratch counts."),
]
WorldName = Annotated[
    Literal["sim", "phantom"],
    typer.Option(
        help="What runs the step: a model of CUDA on fake tensors, or PyTorch's own CUDA build on phantom devices "
        "(`make phantom` fetches it)."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def predict(
    model: Model,
    seqlen: Annotated[int, typer.Option(min=1, help="Tokens of one sample.")],
    method: Method = "alst",
    gpus: Gpus = 8,
    hardware: HardwareName = "h100-80gb",
    host_memory: HostMemory = None,
    option: Options = None,
    offload_parameters: OffloadParameters = False,
    kernel: Kernel = "flash_attention_2",
    world: WorldName = "sim",
    explain: Annotated[
        bool, typer.Option("--explain", help="List what is alive at the peak, with source lines.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Predict memory, limits, FLOPs and step time of one training step, without a GPU.

    World sim counts live tensors and kernel scratch on a simulated step and models the allocator. World
    phantom runs the step of PyTorch's CUDA build, whose allocator counts. Time is modelled in both.
    bf16, one sample per sp ranks, checkpointed layers, parameters sharded by engine fsdp2,
    optimizer states on the host; in world phantom parameters and gradients, too.

    Example: alst predict llama3.1-8b --method alst --gpus 8 --seqlen 3_700_000 --hardware h100-80gb
    """
    cell = cell_of(
        model,
        seqlen,
        method,
        gpus,
        hardware,
        host_memory,
        option,
        offload_parameters,
        kernel,
        world,
    )
    hush_transformers()
    if world == "phantom":
        _show_forecast(forecast_of(cell), cell, explain, as_json)
        return
    from harness.forecast import setting
    from harness.predict import as_json as plain
    from harness.predict import explained, longer, with_slope
    from harness.predict import predict as bare

    with patience(f"simulating a step of {cell.label}"):
        of = setting(cell)
        prediction, trace = explained(of, explain=explain)
        prediction = with_slope(of, prediction, bare(longer(of), slope=False))
    alive = trace.live[trace.peak] if explain else []
    if as_json:
        answer = plain(prediction)
        if explain:
            answer["alive_at_peak"] = [_row(allocation) for allocation in alive]
        print(json.dumps(answer))
        return
    console = wide_console()
    _print_prediction(console, cell, prediction)
    if explain:
        _print_overhead(console, prediction)
        _print_alive(console, trace.peak, alive)


def search(
    model: Model,
    method: Method = "alst",
    gpus: Gpus = 8,
    hardware: HardwareName = "h100-80gb",
    host_memory: HostMemory = None,
    option: Options = None,
    offload_parameters: OffloadParameters = False,
    kernel: Kernel = "flash_attention_2",
    world: WorldName = "sim",
    as_json: AsJson = False,
) -> None:
    """Find the longest sequence that fits, the shortest that does not, and the limit it meets.

    In world phantom what does not fit has met the out-of-memory of PyTorch's own allocator.

    Example: alst search llama3.1-8b --method alst --gpus 8 --hardware h100-80gb
    """
    cell = cell_of(
        model, GUESS, method, gpus, hardware, host_memory, option, offload_parameters, kernel, world
    )
    hush_transformers()
    if world == "phantom":
        found = forecast_of(searching(cell)).search
        assert found is not None
        if as_json:
            print(found.model_dump_json())
        else:
            _print_search(wide_console(), cell, found)
        return
    from harness.forecast import setting
    from harness.predict import search as find

    with patience(f"searching the longest sequence of {model} {method} x{gpus}"):
        result = find(setting(cell))
    if as_json:
        print(result.model_dump_json())
    else:
        _print_search(wide_console(), cell, result)


GUESS = 1_048_576
"""Where a search begins."""


def cell_of(
    model: str,
    seqlen: int,
    method: str,
    gpus: int,
    hardware: str,
    host_memory: str | None,
    option: list[str] | None = None,
    offload_parameters: bool = False,
    kernel: str = "flash_attention_2",
    world: str = "sim",
) -> Cell:
    """The checked cell of what was asked for. Raises `ValueError` in words."""
    options = parsed(option or [])
    fields = published(model)
    offered = type(load_method(Spec(name=method))).model_fields
    if "sp" in offered:
        left = max(gpus // _degree(options, "cp"), 1)
        options = {"sp": math.gcd(left, field(fields, "num_attention_heads")), **options}
    if "cp" in offered:
        options = {"cp": max(gpus // _degree(options, "sp"), 1), **options}
    simulation: dict[str, Any] = {
        "offload_parameters": offload_parameters,
        "kernel": kernel,
        "host_memory_bytes": None if host_memory is None else bytes_value(host_memory),
    }
    engine: str | dict[str, Any] = "fsdp2"
    if world == "phantom":
        engine = {"name": "fsdp2", "offload": True}
        simulation |= {"offload_parameters": False, "search": False}
    return make_cell(
        {
            "model": model,
            "method": {"name": method, "options": options},
            "engine": engine,
            "seqlen": seqlen,
            "world_size": gpus,
            "dtype": "bfloat16",
            "world": world,
            "hardware": hardware,
            "simulation": simulation,
        }
    )


def searching(cell: Cell) -> Cell:
    """`cell`, asking for its longest sequence, too."""
    assert cell.simulation is not None
    return cell.model_copy(
        update={"simulation": cell.simulation.model_copy(update={"search": True})}
    )


def forecast_of(cell: Cell) -> Simulated:
    """What a phantom device says of `cell`. Raises `ValueError` for what cannot run, `RuntimeError` for what failed."""
    from harness import client

    doing = {"now": f"{cell.label} on a phantom device"}

    def heard(event: dict[str, Any]) -> None:
        doing["now"] = f"{cell.label}: {event.get('doing', 'starting')}"

    with patience(lambda: doing["now"]):
        ending = client.submit(
            "harness.fits:execute",
            {"cell": cell.model_dump(mode="json")},
            1,
            cell.timeout_s,
            heard,
            accelerator="phantom",
        )
    if ending.how == "finished":
        return Simulated(**ending.results[0]["simulated"])
    said = f"{ending.error or ending.how}: {ending.message}"
    if ending.error == "ValueError":
        raise ValueError(ending.message)
    raise RuntimeError(f"{cell.label} on a phantom device: {said}")


def _degree(options: dict[str, Any], name: str) -> int:
    """The given option `name`, or 1. Raises `ValueError` for what is no number of ranks."""
    given = options.get(name, 1)
    if not isinstance(given, int) or given < 1:
        raise ValueError(f"--option {name}={given}: a number of ranks is 1 or more")
    return given


def hush_transformers() -> None:
    """Its advice on configurations is not about what was asked; errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()


@contextmanager
def patience(doing: str | Callable[[], str]) -> Iterator[None]:
    """On stderr, from `PATIENCE_S` on: what is done, and for how long on a terminal."""
    told = doing if callable(doing) else lambda: doing
    console = Console(stderr=True)
    begin = time.monotonic()
    done = threading.Event()

    def show() -> None:
        if done.wait(PATIENCE_S):
            return
        if not console.is_terminal:
            console.print(f"alst: {told()} ...", highlight=False, soft_wrap=True)
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
    console.width = max(console.width, 100)  # a narrower terminal wraps rather than hides
    return console


def _print_prediction(console: Console, cell: Cell, p: Prediction) -> None:
    table = Table(title=_title(cell) + f", {cell.train.seqlen:,} tokens", title_justify="left")
    for heading, justify in (("bytes of one GPU", "left"), ("", "right"), ("", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for category, nbytes in sorted(p.by_category.items(), key=lambda item: -item[1]):
        table.add_row(category, bytes_text(nbytes), "")
    table.add_section()
    if p.live_bytes is not None and p.scratch_bytes is not None:
        table.add_row("live tensors", bytes_text(p.live_bytes), "counted")
        table.add_row("kernel scratch", bytes_text(p.scratch_bytes), "from a table of kernels")
        table.add_row("allocated", bytes_text(p.allocated_bytes), "their sum, at its largest")
        table.add_row("overhead", bytes_text(p.overhead_bytes), "modelled")
    elif p.reserved_bytes is not None:
        outside = p.total_bytes - p.reserved_bytes
        table.add_row("allocated", bytes_text(p.allocated_bytes), "by PyTorch's allocator")
        table.add_row("reserved", bytes_text(p.reserved_bytes), "by PyTorch's allocator")
        table.add_row("outside the allocator", bytes_text(outside), "from published readings")
    table.add_row("total", bytes_text(p.total_bytes), "modelled; what NVML reads", style="bold")
    table.add_section()
    table.add_row("host memory of a node", bytes_text(p.host_bytes), "counted; states modelled")
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
    console.print(f"step: {seconds_text(p.step_seconds_modelled)} (modelled)", highlight=False)


def _show_forecast(found: Simulated, cell: Cell, explain: bool, as_json: bool) -> None:
    """What a phantom device says, as JSON or as tables."""
    assert found.prediction is not None
    if as_json:
        answer = found.prediction.model_dump(mode="json")
        if explain:
            answer["alive_at_peak"] = [each.model_dump(mode="json") for each in found.holdings]
        print(json.dumps(answer))
        return
    console = wide_console()
    _print_prediction(console, cell, found.prediction)
    if explain:
        _print_holdings(console, found.holdings)


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
    console.width = WIDE  # cut by no terminal: lines are there to be found in the source
    console.print(table, soft_wrap=True)


def _print_cost(console: Console, p: Prediction, cost: Cost, ranks: int) -> None:
    """What the method itself computes and moves, and the least time that takes."""
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


def _print_overhead(console: Console, p: Prediction) -> None:
    """What the overhead consists of, as far as it has names."""
    from harness.predict import OUTSIDE_BYTES, OUTSIDE_TERMS

    table = Table(title="overhead, modelled", title_justify="left", box=None, show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    fragments = p.overhead_bytes - OUTSIDE_BYTES
    table.add_row(bytes_text(fragments), "reserved but not allocated: rounding and fragmentation")
    for name, nbytes in OUTSIDE_TERMS.items():
        table.add_row(bytes_text(nbytes), name)
    rest = OUTSIDE_BYTES - sum(OUTSIDE_TERMS.values())
    table.add_row(bytes_text(rest), "not taken apart; with the three above fitted on NVML readings")
    console.print(table)


def _title(cell: Cell) -> str:
    train = cell.train
    method = ", ".join([train.method.name, *options_text(train.method.options)])
    return f"{train.model}, {method}, {train.world_size} x {cell.hardware}"


def _print_search(console: Console, cell: Cell, result: SearchResult) -> None:
    table = Table(title=_title(cell), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("longest that fits", f"{result.longest_tokens:,} tokens", style="bold")
    table.add_row("shortest that does not", f"{result.shortest_failing_tokens:,} tokens")
    table.add_row("limit", f"{LIMITS[result.limit]} ({result.limit})")
    table.add_row("simulated steps", str(result.evaluations))
    console.print(table)


def _row(allocation: Allocation) -> dict[str, Any]:
    return {
        "operator": allocation.operator,
        "shape": list(allocation.shape),
        "dtype": allocation.dtype,
        "bytes": allocation.nbytes,
        "category": allocation.category,
        "line": allocation.location,
    }


def _print_alive(console: Console, phase: str, alive: list[Allocation]) -> None:
    table = Table(title=f"alive at the peak, in {phase}", title_justify="left", box=None)
    table.add_column("bytes", justify="right", no_wrap=True)
    for heading in ("operator", "shape", "dtype", "category", "line"):
        table.add_column(heading, no_wrap=True)
    for a in alive[:SHOWN]:
        shape = " x ".join(map(str, a.shape))
        operator = a.operator.removeprefix("aten::")
        table.add_row(bytes_text(a.nbytes), operator, shape, a.dtype, a.category, a.location or "")
    rest = alive[SHOWN:]
    if rest:
        table.add_row(bytes_text(sum(a.nbytes for a in rest)), f"{len(rest)} smaller ones")
    console.width = WIDE  # cut by no terminal: lines are there to be found in the source
    console.print(table, soft_wrap=True)
