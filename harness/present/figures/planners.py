"""Time of global batches by planner, as a multiple of that of `flexsp`: published and predicted."""

from __future__ import annotations

from matplotlib.figure import Figure

from harness.cells.units import ratio_text
from harness.present import drawing
from harness.present.pages.planners import PLANNERS, by_case
from harness.records.replays import PATH, committed
from harness.records.table import NOT_SIMULATED, Results


def draw(_: Results) -> Figure:
    """A panel per model and context, a row per planner: of the committed replay, whatever the results are."""
    cases = by_case(committed())
    panels = drawing.panels(list(cases) or [()], across=2, width=4.2, height=2.0)
    colours = drawing.palette(["flexsp", *PLANNERS])
    for case, axes in panels.axes.items():
        axes.set_xlim(0.9, 2.0)
        if not cases:
            drawing.say(axes, NOT_SIMULATED)
            continue
        axes.set_title(f"{case[0]}, documents up to {case[1]}K", loc="left")
        found = list(cases[case].values())
        for place, each in enumerate(found):
            if each.published_ratio is not None:
                ratio = each.published_ratio
                drawing.point(axes, ratio, place - 0.22, drawing.INK, "published")
            colour, text = colours[each.planner], ratio_text(each.ratio)
            drawing.point(axes, each.ratio, place + 0.12, colour, "predicted", text)
        axes.axvline(1, color=drawing.FAINT, linewidth=1)
        axes.set_yticks(range(len(found)), [each.planner for each in found])
        axes.set_ylim(len(found) - 0.4, -0.6)
    drawing.label_lowest(panels, "time of an iteration, flexsp = 1")
    kinds: list[drawing.Kind] = ["published", "predicted"]
    handles = [drawing.handle(kind, drawing.INK, kind) for kind in kinds]
    title = "Wikipedia's documents on 64 A100-40GB, by planner"
    return drawing.frame(panels.figure, str(PATH), title, handles, NOTE)


NOTE = (
    "Global batches of 512 documents, under the cost model of FlexSP's authors. Published times are bars of a figure. "
    "megatron: dynamic context parallelism of Megatron Core; single: the best degree of each batch; best_fit: the same, "
    "packed as BatchAda; static: one degree for all batches."
)
