"""Figures of the committed records, looked at as a reader would."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import yaml
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from samples import cell, cuda_cell, cuda_measurement, measurement, searched, sweep

from harness.present import drawing
from harness.present.figures.base import draw
from harness.records.table import Results, committed, source_line

ROOT = Path(__file__).parents[3]


def shown() -> list[tuple[str, str]]:
    """Every committed experiment with each of its figures."""
    names = sorted({folder.name for folder in ROOT.glob("results/reference/*/*/")})
    texts = {name: (ROOT / "experiments" / f"{name}.yaml").read_text() for name in names}
    return [(n, figure) for n in names for figure in yaml.safe_load(texts[n]).get("figures", [])]


@cache
def recorded(name: str) -> Results:
    """The committed results of an experiment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return committed(Path("experiments") / f"{name}.yaml")[0][1]


@pytest.mark.parametrize(("name", "figure"), shown(), ids=str)
def test_nothing_is_cut_and_no_panel_is_empty(name: str, figure: str) -> None:
    """The legend is within the figure, words beside points are within their frames, each panel has data, and no two
    entries of the legend differ by colour alone.
    """
    drawn = draw(figure, recorded(name))
    FigureCanvasAgg(drawn).draw()
    legend = drawn.legends[0].get_window_extent()
    assert legend.x1 <= drawn.bbox.x1
    assert all(axes.has_data() for axes in drawn.axes)
    assert not [words for axes in drawn.axes for words in crossing(axes)]
    marks = [mark for entry in drawn.legends[0].get_lines() if (mark := shape(entry))]
    assert len(marks) == len(set(marks))


def shape(line: Line2D) -> tuple[str, bool] | None:
    """Marker, and whether it is hollow; None for a line without marks."""
    hollow = line.get_markerfacecolor() == "white"
    return None if line.get_marker() in {"", "None"} else (str(line.get_marker()), hollow)


def crossing(axes: Axes) -> list[str]:
    """Words that cross the left or right side of a frame."""
    frame, texts = axes.get_window_extent(), [text for text in axes.texts if text.get_text()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    return [words for words, box in boxes if box.x0 < frame.x0 or box.x1 > frame.x1]


def test_words_that_would_cross_a_frame_are_seen() -> None:
    """The check above is able to fail."""
    figure = Figure()
    axes = figure.subplots()
    drawing.point(axes, 1.0, 0.0, drawing.INK, "measured", "many words beside a point at the edge")
    axes.set_xlim(0, 1)
    FigureCanvasAgg(figure).draw()
    assert crossing(axes)
    drawing.frame(figure, sweep(), "title", [])
    FigureCanvasAgg(figure).draw()
    assert not crossing(axes)


def test_a_long_legend_takes_more_lines() -> None:
    """Nine methods stand in a legend that is no wider than the figure."""
    figure = Figure(figsize=(5.6, 4), layout="constrained")
    figure.subplots()
    handles = [
        drawing.handle(f"a method with a long name {n}", drawing.INK, "measured") for n in range(9)
    ]
    drawing.frame(
        figure, sweep(), "A title that is as long as it is wide of the mark, or longer", handles
    )
    FigureCanvasAgg(figure).draw()
    assert figure.legends[0].get_window_extent().x1 <= figure.bbox.x1


def test_methods_of_one_length_stand_in_rows() -> None:
    """A row per method: no two share a height, and their marks differ by shape."""
    methods = ["baseline", "deepspeed_alst", "alst", "layerwise"]
    records = [measurement(cell(method)) for method in methods]
    by_key = {m.cell.key: m for m in records}
    results = Results("one", "q", "s", [], {key: m.cell for key, m in by_key.items()}, by_key)
    (axes,) = draw("peak_memory", results).axes
    marks = [line for line in axes.get_lines() if len(line.get_xdata()) == 1]
    assert len({line.get_ydata()[0] for line in marks}) == len(methods)
    assert len({line.get_marker() for line in marks}) == len(methods)
    assert [text.get_text() for text in axes.get_yticklabels()] == methods


def test_each_colour_has_a_shape_of_its_own() -> None:
    """Series can be told apart without colours; a star is published and nothing else."""
    assert len(set(drawing.SHAPES.values())) == len(drawing.WHEEL) + 1
    assert "*" not in drawing.SHAPES.values()
    assert drawing.mark("published", drawing.WHEEL[0])["marker"] == "*"


def test_a_figure_of_simulated_cells_names_what_was_simulated() -> None:
    """Not the processor that ran the simulation. Measured cells name their machine."""
    of = cell("alst", 1, world="phantom", engine="fsdp2", hardware="h100-80gb")
    line = source_line(Results("n", "q", "s", [], {of.key: of}, {of.key: searched(of)}))
    assert "simulated H100-80GB" in line
    assert "CPU" not in line
    assert "Sample CPU @ 1 GHz" in source_line(sweep())


def test_the_headline_is_of_one_hardware() -> None:
    """It is that of the longest sequence, its name is in the title, and other cells are left out."""
    lengths = {"h200-141gb": [32_768], "h100-80gb": [32_768, 131_072]}
    cells = [cuda_cell(seqlen=n, hardware=name) for name, ns in lengths.items() for n in ns]
    by_key = {each.key: cuda_measurement(each) for each in cells}
    drawn = draw("headline", Results("n", "q", "s", [], {c.key: c for c in cells}, by_key))
    assert "H100-80GB" in drawn.legends[0].get_title().get_text()
    (line,) = [line for line in drawn.axes[0].get_lines() if line.get_marker() != "X"]
    assert list(line.get_xdata()) == [32_768, 131_072]


@pytest.mark.parametrize("figure", ["mlp_tiles", "loss_tiles"])
def test_published_peaks_say_what_they_are(figure: str) -> None:
    """Each star has words with its number, clear of the line through it, and the note explains where it comes from."""
    drawn = draw(figure, recorded("paper_parts"))
    FigureCanvasAgg(drawn).draw()
    stars = [line for axes in drawn.axes for line in axes.get_lines() if line.get_marker() == "*"]
    said = [text for text in drawn.axes[0].texts if text.get_text().startswith("published")]
    assert len(said) == len(stars) > 0
    assert all("GiB" in text.get_text() for text in said)
    for text, star in zip(said, stars, strict=True):
        (_, height) = drawn.axes[0].transData.transform(star.get_xydata()[0])
        assert text.get_window_extent().y0 > height
    assert "published" in drawn.get_supxlabel().lower()


def test_loss_parity_shows_the_runs_that_it_names() -> None:
    """Every entry of the legend is drawn, and gradients that were not compared have no panel."""
    drawn = draw("loss_parity", recorded("cpu_sweep"))
    colours = {line.get_color() for axes in drawn.axes for line in axes.get_lines()}
    assert {line.get_color() for line in drawn.legends[0].get_lines()} <= colours
    assert len(drawn.axes) == 4


def test_a_token_that_costs_nothing_has_its_place() -> None:
    """Two lengths may differ by less than nothing, by rounding; the axis is logarithmic."""
    of = cell("chunked", 1, world="phantom", engine="fsdp2", hardware="h100-80gb")
    m = searched(of)
    assert m.simulated is not None
    assert m.simulated.prediction is not None
    less = m.simulated.prediction.model_copy(update={"bytes_per_local_token": -90.0})
    m = m.model_copy(update={"simulated": m.simulated.model_copy(update={"prediction": less})})
    drawn = draw("methods", Results("n", "q", "s", [], {of.key: of}, {of.key: m}))
    assert "0 B" in [text.get_text() for text in drawn.axes[1].texts]


def test_a_figure_of_steps_says_so_where_there_are_only_searches() -> None:
    """Bytes by option come from single steps: without any, one frame says that none was simulated."""
    of = cell("alst", 1, world="phantom", engine="fsdp2", hardware="h100-80gb")
    (axes,) = draw(
        "bytes_by_option", Results("n", "q", "s", [], {of.key: of}, {of.key: searched(of)})
    ).axes
    assert [text.get_text() for text in axes.texts] == ["not simulated"]
