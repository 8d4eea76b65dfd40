"""The pages in a real browser: they run, sort, fit, fetch nothing, and do not run what a model said."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import page_runs
import pytest
from PIL import Image

from vlmattn.eval import bench, compare, page, views

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
EVIL = ("<script>window.pwned=1</script>", "<img src=x onerror=window.pwned=1>", '"><svg onload=window.pwned=1>')


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'vlmattn[dev]'")
    if CHROMIUM is None:
        pytest.skip("needs Chromium on the PATH (Debian: apt install chromium)")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@dataclass
class Opened:
    """A page in the browser and everything it complained about or asked for."""

    view: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def column(self, number: int, table: int = 0) -> list[str]:
        """First line of the cells of a column, top to bottom."""
        script = f"""[...document.querySelectorAll("table")[{table}].tBodies[0].rows]
            .map(row => row.cells[{number}].firstChild.textContent.trim())"""
        return list(self.view.evaluate(script))

    def fits(self, width: int) -> bool:
        """Whether the page is not wider than a window of that width."""
        self.view.set_viewport_size({"width": width, "height": 800})
        return bool(self.view.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))


def open_page(browser: Any, path: Path, **options: Any) -> Opened:
    view = browser.new_context(**options).new_page()
    opened = Opened(view)
    view.on("console", lambda message: opened.complaints.append(f"{message.type}: {message.text}"))
    view.on("pageerror", lambda error: opened.complaints.append(str(error)))
    view.on("request", lambda request: opened.requests.append(request.url))
    view.goto(path.as_uri())
    view.wait_for_load_state("load")
    return opened


def assert_harmless(opened: Opened) -> None:
    """Nothing complained, nothing was asked for but the page, nothing foreign ran, every image is there."""
    assert opened.complaints == []
    assert [url for url in opened.requests[1:] if not url.startswith("data:")] == []
    assert opened.view.evaluate("window.pwned") is None
    widths = opened.view.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert widths and all(widths)


def number(value: float | None, *small: str) -> page.Cell:
    return page.Cell(page.DASH, small) if value is None else page.Cell(f"{value:g}", small, value)


def name(text: str) -> page.Cell:
    return page.Cell(text, value=text)


def content(evil: str = "", rows: int = 5) -> page.Page:
    values = (84.2, 9.5, None, 100.0, -3.0)[:rows]
    roles = ("baseline", "", "none", "control", "")
    body = [
        page.Row([name(f"m{index}{evil}"), number(value, f"80.1 to 87.3{evil}"), name(f"x{10 - index}")], roles[index])
        for index, value in enumerate(values)
    ]
    example = page.Example(
        f"Is there a dog?{evil}",
        f"yes{evil}",
        [page.Answer(f"none{evil}", f"yes{evil}", True), page.Answer("fastv", f"no\n\x00{evil}", False)],
        [page.Picture([f"scene.png{evil}", "144 tokens"], Image.new("RGB", (30, 20), "red"))],
        task=f"random{evil}",
        missing=f"not found{evil}",
    )
    columns = [
        page.Column(f"method{evil}", number=False),
        page.Column(f"F1{evil}", "%"),
        page.Column("x", number=False),
    ]
    return page.Page(
        f"Title{evil}",
        [f"First{evil}", f"second{evil}"],
        [
            page.Table(f"Table{evil}", columns, body, f"text{evil}", [f"note{evil}"]),
            page.Table("Folded", columns, [page.Row(body[0].cells, invalid=f"why{evil}", notes=[evil])], folded=True),
            page.Prose(f"Prose{evil}", [f"text{evil}"], [f"point{evil}"], warning=True),
            page.Gallery(f"Flips{evil}", [example], [f"how{evil}"]),
            page.Commands("Again", [(f"do{evil}", f"vlmattn{evil}")]),
            page.Facts("Facts", {f"model{evil}": f"x{evil}"}),
        ],
    )


@pytest.fixture
def sheet(browser: Any, tmp_path: Path) -> Opened:
    return open_page(browser, page.write(content(), tmp_path / "page.html"))


def test_a_click_on_a_head_sorts_up_then_down_then_as_written(sheet: Opened) -> None:
    written = sheet.column(1)
    assert written == ["84.2", "9.5", page.DASH, "100", "-3"]
    head = sheet.view.locator("thead th", has_text="F1").first
    assert head.get_attribute("aria-sort") == "none"
    for order, expected in (
        ("ascending", ["-3", "9.5", "84.2", "100", page.DASH]),
        ("descending", ["100", "84.2", "9.5", "-3", page.DASH]),
        ("none", written),
    ):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == order
        assert sheet.column(1) == expected
    assert sheet.complaints == []


def test_rows_move_as_a_whole_and_text_sorts_as_people_read_it(sheet: Opened) -> None:
    sheet.view.locator("thead button", has_text="x").first.click()
    assert sheet.column(2) == ["x6", "x7", "x8", "x9", "x10"]
    assert sheet.column(0) == ["m4", "m3", "m2", "m1", "m0"]
    assert sheet.view.locator("tr.baseline th").inner_text().split() == ["m0", "baseline"]


def test_only_one_column_is_marked_as_sorted(sheet: Opened) -> None:
    for text in ("F1", "method"):
        sheet.view.locator("thead button", has_text=text).first.click()
    marks = sheet.view.evaluate('[...document.querySelector("thead").rows[0].cells].map(head => head.ariaSort)')
    assert marks == ["ascending", "none", "none"]


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_the_keyboard_sorts(sheet: Opened, key: str) -> None:
    for _ in range(30):
        sheet.view.keyboard.press("Tab")
        if sheet.view.evaluate('document.activeElement.textContent.startsWith("F1")'):
            break
    sheet.view.keyboard.press(key)
    assert sheet.column(1) == ["-3", "9.5", "84.2", "100", page.DASH]


def test_without_scripts_the_table_is_there_and_has_no_dead_buttons(browser: Any, tmp_path: Path) -> None:
    opened = open_page(browser, page.write(content(), tmp_path / "page.html"), java_script_enabled=False)
    assert opened.view.locator("table button").count() == 0
    assert opened.view.locator("tbody").first.inner_text().count("80.1 to 87.3") == 5


def test_a_table_of_one_row_has_nothing_to_sort(sheet: Opened) -> None:
    assert sheet.view.locator("table").nth(1).locator("button").count() == 0


@pytest.mark.parametrize("evil", EVIL)
def test_what_a_model_said_is_shown_and_does_not_run(browser: Any, tmp_path: Path, evil: str) -> None:
    opened = open_page(browser, page.write(content(evil), tmp_path / "page.html"))
    assert_harmless(opened)
    assert opened.view.locator("script").count() == 1
    assert opened.view.locator(".answers").inner_text().count(evil) == 3
    assert opened.view.title() == f"Title{evil}"
    assert opened.view.evaluate("document.images[0].alt").count(evil) == 2


def test_the_policy_stops_a_script_that_slipped_in_all_the_same(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    text = page.render(content())
    for evil in EVIL:
        text = text.replace("</body>", f"{evil}</body>")
    path.write_text(text, encoding="utf-8")
    opened = open_page(browser, path)
    assert opened.view.evaluate("window.pwned") is None
    assert any("Content Security Policy" in complaint for complaint in opened.complaints)


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_the_window(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    long = "fastv(keep=0.111111, before_layer=2) + " * 4 + "x" * 300
    opened = open_page(browser, page.write(content(long), tmp_path / "page.html"), color_scheme=scheme)
    assert opened.fits(width)
    assert_harmless(opened)


@pytest.fixture(scope="module", params=["sweep", "comparison"])
def whole(request: pytest.FixtureRequest, browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """A page of made-up runs whose specs, answers, questions, labels and image names are hostile."""
    folder = tmp_path_factory.mktemp("page")
    evil = EVIL[0] + EVIL[1]
    asked, rows, runs = page_runs.make_sweep(evil)
    if request.param == "sweep":
        return open_page(browser, views.write_sweep(folder, asked, rows, runs, {"note": evil}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "open_pictures", lambda pictures: page_runs.photo)
        return open_page(browser, views.write_comparison(folder / "page.html", compare.compare(runs)))


def test_a_whole_page_is_harmless_and_shows_what_was_said(whole: Opened) -> None:
    assert_harmless(whole)
    assert whole.view.locator("script").count() == 1
    assert f"yes. {EVIL[0]}" in whole.view.inner_text("body")
    assert whole.view.evaluate("document.images.length") > 12


def test_a_whole_page_sorts_by_numbers_with_dashes_last(whole: Opened) -> None:
    heads = whole.view.locator("table").first.locator("thead button")
    heads.nth(1).click()
    values = whole.column(1)
    numbers = [float(value) for value in values if value != page.DASH]
    assert numbers == sorted(numbers) and len(set(numbers)) > 2
    assert values[len(numbers) :] == [page.DASH] * (len(values) - len(numbers))
    heads.nth(1).click()
    assert [float(value) for value in whole.column(1) if value != page.DASH] == numbers[::-1]
    assert whole.complaints == []


@pytest.mark.parametrize("width", [1280, 400])
def test_a_whole_page_fits_the_window(whole: Opened, width: int) -> None:
    assert whole.fits(width)


def test_every_table_of_a_whole_page_opens_and_sorts(whole: Opened) -> None:
    whole.view.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    for button in whole.view.locator("thead button").all():
        button.click()
    assert whole.complaints == []
