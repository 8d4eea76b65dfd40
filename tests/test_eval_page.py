"""The demo page: the numbers it should have, everything inside, nothing fetched."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from vlmattn.eval import demo, models, page, plots, summary
from vlmattn.eval.benchmarks import scenes
from vlmattn.scenes import names

SPECS = ("none", "fastv(keep=0.11, before_layer=2)", "uniform(keep=0.11)")


class Addresses(HTMLParser):
    """Collects everything a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        loads = {"src", "srcset", "href", "data", "poster", "action", "xlink:href"}
        self.found += [value or "" for name, value in attrs if name in loads]
        assert tag not in ("script", "iframe", "link"), tag


def fetched(text: str) -> list[str]:
    parser = Addresses()
    parser.feed(text)
    return [address for address in parser.found if not address.startswith(("data:", "#"))]


def content(**more: object) -> page.Content:
    example = page.Example("Where is <it>?", "north", [page.Answer("none", "north", True)], Image.new("RGB", (4, 4)))
    values = {
        "title": "T",
        "lead": ["first"],
        "columns": ["method", "accuracy"],
        "rows": [["none", "84.2 (81.0-87.1)"]],
        "table_notes": ["note"],
        "section": page.Section("S", "about <it>", ["method", "accuracy"], [["var", "71.5 (70.0-73.0)"]]),
        "plot": plots.accuracy_plot([("g", [plots.Point("none", "none", 144, 84.2, (81.0, 87.1))])]),
        "examples": [example],
        "examples_note": "chosen",
        "commands": [("again", "vlmattn demo")],
        "about": {"torch": "2"},
    }
    return page.Content(**{**values, **more})  # type: ignore[arg-type]


def test_page_is_self_contained_and_escapes_text() -> None:
    text = page.render(content())
    assert fetched(text) == []
    assert "84.2" in text and "81.0-87.1" in text
    assert "71.5" in text and "about &lt;it&gt;" in text
    assert "Where is &lt;it&gt;?" in text and "<it>" not in text
    assert text.count("data:image/png;base64,") == 1
    assert "url(http" not in text and "@import" not in text


def test_plot_is_the_same_every_time_and_carries_no_metadata() -> None:
    first, second = content().plot, content().plot
    assert first == second and first.startswith("<svg") and "<metadata" not in first
    assert re.match(r"<svg[^>]*viewBox", first) and not re.match(r"<svg[^>]* width=", first)


def test_a_page_with_a_missing_value_is_an_error_not_a_hole() -> None:
    from jinja2 import UndefinedError

    broken = content(examples=[{"question": "q"}])
    with pytest.raises(UndefinedError):
        page.render(broken)


@pytest.fixture(scope="module")
def result() -> demo.Result:
    with models.quiet():
        return demo.measure(models.load(names()[0]), 6, SPECS)


def test_demo_page_has_every_number_of_its_table(result: demo.Result, tmp_path: Path) -> None:
    text = page.write(demo.content(result, result, demo.make_examples(result)), tmp_path / "demo.html").read_text()
    assert fetched(text) == []
    for row, place in zip(result.pope_rows, result.scenes_rows, strict=True):
        assert row.label in text
        assert f"{100 * row.score['mean_accuracy']:.1f}" in text and f"{100 * row.score['mean_f1']:.1f}" in text
        assert all(f"{100 * place.score['tasks'][task]['accuracy']:.1f}" in text for task in scenes.TASKS)
        assert summary.bytes_text(row.cost["kv_bytes"]) in text
    for word in (
        "claim nothing about any real",
        "vlmattn eval",
        result.pope.sha256,
        result.loaded.fingerprint,
        "torch",
    ):
        assert word in text
    assert text.count("data:image/png;base64,") == len(scenes.TASKS)
    assert not list(tmp_path.glob(".*"))


def test_demo_tables_fit_and_agree_with_the_formula(result: demo.Result) -> None:
    answers, cost = demo.terminal_tables(result)
    assert answers.row_count == cost.row_count == len(SPECS)
    full, fastv, uniform = (row.cost for row in result.pope_rows)
    assert full["average_visual_tokens"] == full["visual_tokens"] == 144
    assert fastv["visual_per_layer"] == [144, 144, 16, 16, 16, 16]
    assert uniform["visual_per_layer"] == [16] * 6
    assert full["kv_bytes"] == full["kv_bytes_full"] == uniform["kv_bytes_full"]
    per_token = full["kv_bytes"] / full["prompt_tokens"]
    assert uniform["kv_bytes"] == pytest.approx(full["kv_bytes"] - 128 * per_token)


def test_examples_tell_the_answers_and_draw_a_panel_per_method(result: demo.Result) -> None:
    for example in demo.make_examples(result, SPECS[1:]):
        assert [answer.label for answer in example.answers] == list(SPECS)
        assert example.picture.width > 3 * 300
