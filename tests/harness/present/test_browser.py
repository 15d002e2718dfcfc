"""The report in a browser: every committed record, on a desk and on a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from filelock import FileLock
from playwright.sync_api import Browser, Page, sync_playwright

from harness.cells import paths
from harness.present.pages.base import load
from harness.present.report import page as report_page
from harness.records.record import write_text

ROOT = Path(__file__).parents[3]
CHROMIUM = shutil.which("chromium")
DESK, PHONE = (pytest.param(width, id=f"{width} pixels") for width in (1300, 390))

pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="no chromium on the path; `make browser` installs it"
)

SORT = """() => [...document.querySelectorAll("th.number")].map(heading => {
  const rows = heading.closest("table").tBodies[0].rows;
  const values = () => [...rows].map(row => row.cells[heading.cellIndex].dataset.sort);
  const before = values();
  heading.click();
  return [heading.textContent, before, heading.ariaSort, values()];
})"""
"""Click on each heading of numbers: its name, its column before, the order that it says, its column after."""


@pytest.fixture(scope="session")
def report(shared: Path) -> Path:
    """The page of all committed records, made once for all workers of a test run."""
    path = shared / "report.html"
    with FileLock(path.with_suffix(".lock")), pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        if not path.exists():
            write_text(path, report_page(load()))
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium without a window."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--disable-gpu", "--disable-quic"]
        )
        yield chromium
        chromium.close()


@pytest.fixture(params=[DESK, PHONE])
def opened(browser: Browser, report: Path, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The report in a window of some width. A word of the console or an uncaught error fails the test."""
    page = browser.new_page(viewport={"width": request.param, "height": 850})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(report.as_uri())
    yield page
    page.close()
    assert said == []


SHORTEN = """() => {
  for (const body of document.querySelectorAll("tbody")) {
    const seen = new Set();
    for (const row of [...body.rows]) {
      const markup = row.outerHTML.replace(/>[^<]+</g, "><").replace(/ (href|data-sort)="[^"]*"/g, "");
      if (seen.has(markup)) row.remove();
      seen.add(markup);
    }
  }
}"""
"""Remove the rows of a table that differ from one before by text alone."""


def unfold(page: Page) -> None:
    """Open everything that opens on a click."""
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")


def hidden_width(page: Page, selector: str) -> list[int]:
    """By how many pixels the content of each element that `selector` finds is wider than the element."""
    widths = "all => all.map(each => each.scrollWidth - each.clientWidth)"
    found: list[int] = page.eval_on_selector_all(selector, widths)
    return found


def test_nothing_is_wider_than_the_window(opened: Page) -> None:
    """Neither as the page opens nor unfolded; the first tables show all of their columns."""
    assert hidden_width(opened, "html") == [0]
    assert hidden_width(opened, ".overview .scroll") == [0, 0]
    unfold(opened)
    assert hidden_width(opened, "html") == [0]


@pytest.mark.parametrize("opened", [DESK], indirect=True)
def test_a_click_on_its_heading_sorts_a_column_of_numbers(opened: Page) -> None:
    """In every table, by value; a second click turns the order round."""
    unfold(opened)
    moved = 0
    for _ in range(2):
        for heading, before, direction, after in opened.evaluate(SORT):
            values = [float(value) for value in after]
            assert values == sorted(values, reverse=direction == "descending"), heading
            moved += before != after
    assert moved


@pytest.mark.parametrize("opened", [DESK], indirect=True)
def test_a_filter_leaves_the_rows_with_its_words(opened: Page) -> None:
    """Whatever their case and order, and says how many there are."""
    unfold(opened)
    tables = opened.locator(".table", has=opened.get_by_role("searchbox"))
    assert tables.count()
    for table in tables.all():
        rows = [text.lower() for text in table.locator("tbody tr").all_inner_texts()]
        words = rows[-1].split()[::-1]
        table.get_by_role("searchbox").fill(" ".join(words).upper())
        wanted = [text for text in rows if all(word in text for word in words)]
        shown = table.locator("tbody tr:visible").all_inner_texts()
        assert [text.lower() for text in shown] == wanted
        status = f"{len(shown)} of {len(rows)} rows" if len(shown) < len(rows) else ""
        assert table.get_by_role("status").inner_text() == status


@pytest.mark.parametrize("opened", [DESK], indirect=True)
def test_links_lead_somewhere(opened: Page) -> None:
    """Every link inside the page to an element, every link to a record to a file."""
    links: list[str] = opened.eval_on_selector_all(
        "a[href]", "all => all.map(each => each.getAttribute('href'))"
    )
    own = {link for link in links if not urlsplit(link).scheme}
    places = {link.removeprefix("#") for link in own if link.startswith("#")}
    files = {unquote(link) for link in own if not link.startswith("#")}
    ids = opened.eval_on_selector_all("[id]", "all => all.map(each => each.id)")
    assert len(ids) == len(set(ids))
    assert places
    assert places <= set(ids)
    assert files
    assert not [name for name in files if not (ROOT / paths.RESULTS / name).is_file()]


@pytest.mark.parametrize("opened", [PHONE], indirect=True)
def test_it_is_open_to_everyone(opened: Page) -> None:
    """axe finds nothing serious or critical on a phone, with everything unfolded and a row of each kind in each table."""
    opened.evaluate(SHORTEN)
    unfold(opened)
    found = Axe().run(opened).response["violations"]
    grave = [each for each in found if each["impact"] in {"serious", "critical"}]
    assert [(each["id"], each["nodes"][0]["html"]) for each in grave] == []
