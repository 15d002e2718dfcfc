"""Every committed file that is generated from the records: blocks of the README, pages and figures."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from alst_impl.plugin import names
from harness.cells import paths
from harness.present import pictures
from harness.present.figures.base import draw
from harness.present.grids.base import Grid
from harness.present.lengths import together
from harness.present.pages.base import Committed, load
from harness.records.record import write_text

INDEX = paths.REFERENCE / "README.md"
HEADLINE = paths.REFERENCE / "longest.png"
"""Published lengths beside ours."""
PLANNERS = paths.REFERENCE / "planners.png"
"""Published times of global batches beside ours."""
LEAGUE = paths.REFERENCE / "league.png"
"""Stacks of others beside our own methods."""


def renew(*, write: bool) -> list[Path]:
    """The generated files that are not what the committed records say; `write` makes them so.

    Raises `ValueError` without a README or without committed records.
    """
    if not paths.README.is_file():
        raise ValueError(f"no {paths.README} here; run it in the root of a checkout")
    c = load()
    changed = []
    for path, text in documents(c, paths.README.read_text()).items():
        if not path.is_file() or path.read_text() != text:
            changed.append(path)
            if write:
                write_text(path, text)
    for path, make in figures(c).items():
        figure = make()
        if not path.is_file() or pictures.fingerprint(figure).encode() not in path.read_bytes():
            changed.append(path)
            if write:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(pictures.png(figure))
    return changed


def documents(c: Committed, readme: str) -> dict[Path, str]:
    """The text of every generated file; `readme` is the README as it is."""
    made = {path_of(name): page.page(c) for name, page in pages().items()}
    return {paths.README: with_blocks(readme, readme_blocks(c)), **made}


def figures(c: Committed) -> dict[Path, Callable[[], Figure]]:
    """What draws each generated figure."""
    lengths = together(k.results for k in c.forecasts)
    of_experiments = {k.image: partial(draw, k.figure, k.results) for k in c.kept if k.figure}
    return {
        HEADLINE: partial(draw, "longest_sequences", lengths),
        PLANNERS: partial(draw, "planners", lengths),
        LEAGUE: partial(draw, "league", lengths),
        **of_experiments,
    }


def pages() -> dict[str, Any]:
    """The module of each page by its name."""
    package = "harness.present.pages"
    return {name: importlib.import_module(f"{package}.{name}") for name in names(package)}


def path_of(page: str) -> Path:
    """Where a page lies; a forge shows page `records` for the folder."""
    return INDEX if page == "records" else paths.REFERENCE / f"{page}.md"


def readme_blocks(c: Committed) -> dict[str, str]:
    """The README's generated blocks: the headline, and the summaries of all pages."""
    rows = [
        [what, result, f"[{name}]({path_of(name)})"]
        for name, page in pages().items()
        for what, result in page.summary(c)
    ]
    return {
        "headline": f"![Longest sequences of Llama-8B, published and predicted]({HEADLINE})",
        "summary": Grid(["what", "result", "page"], rows).markdown(),
    }


def with_blocks(text: str, blocks: dict[str, str]) -> str:
    """`text` with what is between each pair of markers replaced.

    Raises `ValueError` where a block has no markers.
    """
    for name, content in blocks.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        if not re.search(f"{begin}.*{end}", text, re.DOTALL):
            raise ValueError(f"{paths.README}: no '{begin}' followed by '{end}'")
        before, _, rest = text.partition(begin)
        after = rest.partition(end)[2]
        text = f"{before}{begin}\n{content}\n{end}{after}"
    return text
