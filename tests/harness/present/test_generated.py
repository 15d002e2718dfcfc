"""The README, the pages of `results/reference/` and their figures, from committed records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from samples import cell, gpu_sweep, searched, sweep

from harness.cells import paths
from harness.commands import present
from harness.judge.claims import Verdict
from harness.present import drawing, pictures
from harness.present.figures.base import draw
from harness.present.generated import documents, pages, path_of, readme_blocks, with_blocks
from harness.present.lengths import beside_published, plain, shortened, together
from harness.present.pages.base import Committed, Kept, load
from harness.records.table import Results

ROOT = Path(__file__).parents[3]
README = ROOT / "README.md"


def kept(*results: Results) -> Committed:
    """Committed results that were written by hand."""
    return Committed([Kept(paths.REFERENCE / "cpu" / r.name, r) for r in results])


@pytest.fixture(scope="module")
def everything() -> Committed:
    """What is committed, and a record of every forecast that is not."""

    def whole(k: Kept) -> Kept:
        if k not in c.forecasts:
            return k
        made = {key: searched(of, of.train.seqlen) for key, of in k.results.cells.items()}
        return replace(
            k, results=replace(k.results, measurements={**made, **k.results.measurements})
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        c = load()
    return Committed([whole(k) for k in c.kept])


def test_blocks_are_replaced_between_their_markers() -> None:
    """What a person wrote around a block stays."""
    text = "a\n<!-- begin: x -->\nold\n<!-- end: x -->\nb"
    assert with_blocks(text, {"x": "new"}) == "a\n<!-- begin: x -->\nnew\n<!-- end: x -->\nb"


def test_a_block_without_markers_is_an_error() -> None:
    """Generated text never vanishes unseen."""
    with pytest.raises(ValueError, match="begin: x"):
        with_blocks("nothing", {"x": "new"})


@pytest.mark.parametrize("results", [[], [sweep()], [sweep(), gpu_sweep()]], ids=len)
def test_readme_has_every_block(results: list[Results]) -> None:
    """The README takes what is generated, with records and without."""
    with_blocks(README.read_text(), readme_blocks(kept(*results)))


def test_generated_files_are_in_step_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """`alst report --readme` would change nothing."""
    monkeypatch.chdir(ROOT)
    assert present.report(check=True) == 0


def test_the_readme_is_short(everything: Committed) -> None:
    """At most 8 KB and 150 lines, as it is and with a record of every cell that needs no device."""
    later = documents(everything, README.read_text())[paths.README]
    for text in (README.read_text(), later):
        assert len(text.encode()) <= 8 * 1024
        assert len(text.splitlines()) <= 150


@pytest.mark.parametrize("name", pages())
@pytest.mark.parametrize("results", [[], [sweep()], [sweep(), gpu_sweep()]], ids=len)
def test_a_page_copes_with_few_records(name: str, results: list[Results]) -> None:
    """It has a heading, no hole, and rows for the README whose page exists."""
    page = pages()[name]
    text = page.page(kept(*results))
    assert text.startswith("# ")
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert "None" not in text
    assert all(what and result for what, result in page.summary(kept(*results)))


@pytest.mark.parametrize("name", pages())
def test_the_index_names_every_page(name: str) -> None:
    """A page that nobody can find is not one."""
    index = pages()["records"].page(kept(sweep()))
    assert path_of(name).name in index or name == "records"


def test_pages_cope_with_a_record_of_every_forecast(everything: Committed) -> None:
    """Every published number is judged then, but FlexSP's of lengths that are not at hand; every reason stands once."""
    text = pages()["claims"].page(everything)
    lines = [line for line in text.splitlines() if line.startswith("| all |")]
    assert lines
    numbers = [e for e in everything.evidence if not e.is_ours]
    assert len(numbers) > 80
    judged, absent, fitted = (int(lines[0].split("|")[place]) for place in (2, -3, -2))
    assert judged + absent + fitted == len(numbers)
    assert absent == sum(e.verdict is Verdict.NOT_MEASURED for e in everything.claims["flexsp"])
    missed = [e for e in numbers if e.missed]
    reasons = {e.ruled_out for e in missed if e.ruled_out}
    assert reasons
    assert all(text.count(reason) == 1 for reason in reasons)
    unexplained = [e for e in missed if not e.ruled_out]
    assert text.count("Nothing was ruled out yet") == bool(unexplained)


def phantom(method: str, tokens: int, gpus: int = 8, **options: object) -> Results:
    """One cell that looked for the longest sequence of Llama-8B."""
    settings = {"world": "phantom", "engine": "fsdp2", "hardware": "h100-80gb", "dtype": "bfloat16"}
    of = cell(method, gpus, 1_000, options, model="llama3.1-8b", **settings)
    return Results(f"{method}{tokens}", "q", "s", [], {of.key: of}, {of.key: searched(of, tokens)})


def test_the_headline_shows_published_and_predicted_lengths_apart() -> None:
    """Stars and hollow marks; each has its entry in the legend."""
    drawn = draw("longest_sequences", together([phantom("alst", 5_800_000)]))
    points = [line for axes in drawn.axes for line in axes.get_lines()]
    hollow = [line for line in points if line.get_markerfacecolor() == "white"]
    stars = [line for line in points if line.get_marker() == "*"]
    assert [line.get_xdata()[0] for line in hollow] == [5_800_000]
    assert len(stars) == len(points) - 1
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == [
        "published",
        "predicted, our alst",
    ]


def test_the_headline_without_a_prediction_says_so() -> None:
    """Published lengths stand alone."""
    drawn = draw("longest_sequences", together([sweep()]))
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["published"]
    assert "not simulated" in drawn.get_supxlabel()


def test_of_each_method_the_plain_and_the_longest_exact_length_are_shown() -> None:
    """On 8 GPUs; an ablation stands for no method, and near gradients are in the table alone."""
    found = beside_published(
        [
            phantom("layerwise", 6_000_000),
            phantom("layerwise", 8_000_000, every=2),
            phantom("layerwise", 9_000_000, every=4),
            phantom("layerwise", 11_000_000, eight_bits=True),
            phantom("alst", 7_000_000, tile_mlp=False),
            phantom("alst", 5_000_000),
            phantom("alst", 1_000_000, gpus=2),
        ]
    )
    ours = [each.tokens for each in found if not each.is_published]
    assert ours == [5_000_000, 6_000_000, 8_000_000, 9_000_000, 11_000_000]
    short = [each.tokens for each in shortened(found) if not each.is_published]
    assert short == [5_000_000, 6_000_000, 9_000_000]
    assert {m: [e.tokens for e in s.values()] for m, s in plain(found).items()} == {
        "alst": [5_000_000],
        "chunked": [],
        "layerwise": [6_000_000],
    }


def test_a_figure_is_known_by_what_it_shows() -> None:
    """Its points and words, whatever the size of its pixels."""
    one, other = (together([phantom("alst", n)]) for n in (5_000_000, 5_100_000))
    same = pictures.fingerprint(draw("longest_sequences", one))
    assert pictures.fingerprint(draw("longest_sequences", one)) == same
    assert pictures.fingerprint(draw("longest_sequences", other)) != same
    assert same.encode() in pictures.png(draw("longest_sequences", one), dpi=20)


def test_a_method_has_one_colour_in_every_figure() -> None:
    """Series of a figure differ; grey belongs to what others are compared with."""
    both = drawing.palette(["baseline", "mst", "layerwise", "layerwise stream=True", "alst"])
    assert len(set(both.values())) == 5
    assert both["baseline"] == drawing.GREY
    alone = drawing.palette(["layerwise every=4", "alst"])
    assert alone["alst"] == both["alst"]
    assert alone["layerwise every=4"] == both["layerwise"]
    assert list(both) == ["baseline", "mst", "layerwise", "layerwise stream=True", "alst"]
