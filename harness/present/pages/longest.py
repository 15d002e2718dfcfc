"""The longest sequences of Llama-8B."""

from __future__ import annotations

from collections.abc import Iterable

from harness.cells.units import LIMITS, length_text
from harness.present.grids.base import Grid
from harness.present.lengths import Length, beside_published, plain, predicted
from harness.present.pages.base import Committed
from harness.present.render import render

HEADINGS = ["GPUs", "system", "tokens", "kind", "hardware", "host per node", "stopped by", "source"]


def page(c: Committed) -> str:
    """Published lengths beside ours, and the figures of experiments that look for lengths only."""
    found = beside_published([k.results for k in c.forecasts])
    return render(
        "longest.md",
        lengths=length_grid(found),
        absent=[method for method, sizes in plain(found).items() if not sizes],
        images=[k.shown() for k in c.forecasts if k.is_search_alone],
    )


def length_grid(lengths: Iterable[Length]) -> Grid:
    """A row per system and number of GPUs, with the source."""
    found = list(lengths)
    return Grid(HEADINGS, [_row(each) for each in found], [each.record for each in found])


def _row(each: Length) -> list[str]:
    kind = "published" if each.is_published else "predicted"
    near = "" if each.is_exact else " (gradients are near, not exact)"
    where = [each.hardware, each.host, LIMITS[each.limit] if each.limit else "", each.source]
    return [str(each.num_gpus), each.system + near, length_text(each.tokens), kind, *where]


def summary(c: Committed) -> list[tuple[str, str]]:
    """The length of each of our methods by number of GPUs, without options."""
    found = plain(predicted(k.results for k in c.forecasts))
    lengths = [f"`{method}` {_by_gpus(sizes)}" for method, sizes in found.items()]
    return [("tokens, Llama-8B, `--margin 0`, predicted", "; ".join(lengths))]


def _by_gpus(sizes: dict[int, Length]) -> str:
    if not sizes:
        return "no record yet"
    words = [f"{length_text(each.tokens)} on {n}" for n, each in sizes.items()]
    words[0] += f" GPU{'s' * (min(sizes) > 1)}"
    return ", ".join(words)
