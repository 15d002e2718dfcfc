"""The league at a glance: bytes at one length, the longest sequence, and whose gradients are right."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from harness.cells.league import OURS, Task, league, peers
from harness.cells.units import length_text
from harness.present import drawing
from harness.present.pages.league import GB, GIB, SHOWN, fitting, of_place
from harness.records.league import Record, Step, committed, committed_path
from harness.records.published import look_up
from harness.records.table import NOT_SIMULATED, Results


def draw(_: Results) -> Figure:
    """The figure of the committed records, whatever the results are."""
    return of_records(committed(), str(committed_path()))


def of_records(found: dict[str, Record], source: str) -> Figure:
    """A row per stack, fewest bytes first. `source` says where the records `found` are."""
    model, gpus = SHOWN
    shown = {name: of_place(found, name, model, gpus) for name in peers()}
    shown = {name: of for name, of in shown.items() if fitting(*of)}
    order = sorted(shown, key=lambda name: _rank(fitting(*shown[name])))
    figure = Figure(figsize=(11, 0.42 * max(len(order), 3) + 2.2), layout="constrained")
    held, longest, gate = figure.subplots(1, 3, sharey=True, width_ratios=[4, 4, 3])
    for place, name in enumerate(order):
        lengths, search = shown[name]
        colour = drawing.WHEEL[0] if name in OURS else drawing.GREY
        at = lengths.get(LENGTH)
        if at and at.verdict == "fits" and at.step:
            gib = at.step.allocated_bytes / GIB
            drawing.point(held, gib, place, colour, "predicted", f"{gib:.1f}")
        elif at:
            drawing.words(held, 1, place, at.verdict, drawing.FAINT)
        for gib in _published(name, model, gpus):
            drawing.point(held, gib, place - 0.22, drawing.INK, "published")
        tokens = max(step.seqlen for step in fitting(lengths, search))
        at_least = "" if search and search.step else "at least "
        said = f"{at_least}{length_text(tokens)}"
        drawing.point(longest, tokens, place, colour, "predicted", said)
        _judge(gate, found, name, place)
    held.set_xlabel(f"GiB of a GPU, allocated at {length_text(LENGTH)}")
    held.set_xlim(left=0)
    gate.set_xlabel("gradients, by case of the gate")
    gate.set_xticks(range(len(CASES)), CASES, rotation=20)
    gate.set_xlim(-0.6, len(CASES) - 0.4)
    _tokens_on(longest)
    held.set_yticks(range(len(order)), [peers()[name].title for name in order])
    held.set_ylim(len(order) - 0.4, -0.6)
    if not order:
        drawing.say(held, NOT_SIMULATED)
    handles = [
        drawing.handle("ours", drawing.WHEEL[0], "predicted"),
        drawing.handle("others", drawing.GREY, "predicted"),
        drawing.handle("published", drawing.INK, "published"),
    ]
    title = (
        f"{model} on {gpus} x {league().hardware}: who holds how much, how long, and is it right"
    )
    return drawing.frame(figure, source, title, handles, NOTE)


def _judge(axes: Axes, found: dict[str, Record], name: str, place: int) -> None:
    """Write for each case whether a peer's gradients are right."""
    for column, case in enumerate(CASES):
        record = found.get(Task(peer=name, what="gate", case=case).key)
        verdict = record.verdict if record else "not run"
        axes.text(
            column,
            place,
            verdict,
            ha="center",
            va="center",
            fontsize=7.5,
            color=INKS.get(verdict, drawing.FAINT),
            bbox={"facecolor": "white", "linewidth": 0, "pad": 1},
        )


def _rank(steps: list[Step]) -> tuple[float, int]:
    """Fewest bytes at the length of the figure first; where it does not fit, longest first."""
    held = [step.allocated_bytes for step in steps if step.seqlen == LENGTH]
    return min(held, default=math.inf), -max(step.seqlen for step in steps)


def _published(name: str, model: str, gpus: int) -> list[float]:
    """Published GiB of a peer at the length of the figure."""
    return [
        look_up(claim.table, claim.row, column).value * GB / GIB
        for claim in peers()[name].published
        if (claim.model, claim.gpus, claim.seqlen) == (model, gpus, LENGTH)
        for quantity, column in claim.columns.items()
        if quantity == "allocated_bytes"
    ]


def _tokens_on(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: length_text(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("longest sequence, tokens")


LENGTH = 2**20
CASES = list(league().gate.cases)
INKS = {"right": "#1a7f37", "wrong": "#b3261e"}
NOTE = (
    "Every stack's own script and documented settings, on phantom devices: bf16 weights, AdamW with states on the device, one "
    "sample, PyTorch's flash attention. Stacks that keep fp32 master weights hold more at rest. Gradients: one step in fp32 on "
    "CPU ranks against the stock model in fp64; one rank without labels, packed documents, accumulation."
)
"""What the rows have in common."""
