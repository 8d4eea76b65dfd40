"""The renderer, and the demo's page: the numbers it should have, everything inside, nothing fetched."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from vlmattn.eval import demo, models, page, plots, tabular
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
        assert tag not in ("iframe", "object", "embed", "base", "form"), tag


def fetched(text: str) -> list[str]:
    parser = Addresses()
    parser.feed(text)
    return [address for address in parser.found if not address.startswith(("data:", "#"))]


def content(*sections: page.Section) -> page.Page:
    graph = plots.Graph("g", "cost", "%", [plots.Point("none", "none", 144, 84.2, (81.0, 87.1), "baseline")])
    example = page.Example(
        "Where is <it>?",
        "north",
        [page.Answer("none", "north", True), page.Answer("caption", "", None)],
        [page.Picture(["none"], Image.new("RGB", (4, 4)))],
    )
    row = page.Row([page.Cell("none", value="none"), page.Cell("84.2", ["81.0 to 87.1"], 84.2)], "baseline")
    parts = (
        page.Table("T", [page.Column("method", number=False), page.Column("accuracy", "%")], [row], notes=["note"]),
        page.Plot("P", plots.draw([graph])),
        page.Gallery("G", [example]),
        page.Commands("C", [("again", 'vlmattn demo --methods "a"')]),
        page.Facts("F", {"torch": "2"}),
        *sections,
    )
    return page.Page("Title", ["first", "second <it>"], parts)


def test_page_is_self_contained_and_escapes_text() -> None:
    text = page.render(content())
    assert text.startswith("<!doctype html>")
    assert fetched(text) == []
    assert "84.2" in text and "81.0 to 87.1" in text
    assert "second &lt;it&gt;" in text
    assert "Where is &lt;it&gt;?" in text and "<it>" not in text
    assert text.count('src="data:image/png;base64,') == 1
    assert "url(http" not in text and "@import" not in text
    assert "(no text)" in text


def test_the_policy_allows_the_one_script_by_its_hash_and_nothing_from_elsewhere() -> None:
    text = page.render(content())
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.S)
    rules = dict(rule.split(" ", 1) for rule in html.unescape(policy).split("; "))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:" and "http" not in policy


def test_cells_carry_what_sorting_goes_by() -> None:
    cells = [page.Cell("84.2", value=84.2), page.Cell(page.DASH), page.Cell("x", value='a"b')]
    columns = [page.Column("method", number=False)] + [page.Column(name) for name in "abc"]
    text = page.render(content(page.Table("S", columns, [page.Row([page.Cell("m", value="m"), *cells])])))
    assert '<td class="number" data-value="84.2">' in text
    assert '<td class="number"><span>\u2013</span>' in text
    assert 'data-value="a&#34;b"' in text


def test_rows_are_marked() -> None:
    columns = [page.Column("method", number=False), page.Column("score")]
    rows = [page.Row([page.Cell(role)], role) for role in ("baseline", "control", "none")]
    rows.append(page.Row([page.Cell("m"), page.Cell("1", struck=True)], invalid="it <broke>", notes=["note"]))
    text = page.render(content(page.Table("S", columns, rows)))
    assert 'class="baseline"' in text and '<span class="tag">control</span>' in text
    assert '<td class="number struck"><span>1</span>' in text
    assert '<span class="tag">invalid</span>' in text and "it &lt;broke&gt;" in text


def test_the_same_content_gives_the_same_bytes() -> None:
    assert page.render(content()) == page.render(content())
    svg = next(part.svg for part in content().sections if isinstance(part, page.Plot))
    assert svg.startswith("<svg") and "<metadata" not in svg and not re.match(r"<svg[^>]* width=", svg)


def test_a_page_with_a_missing_value_is_an_error_not_a_hole() -> None:
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError):
        page.render(content(page.Gallery("G", [{"question": "q"}])))  # type: ignore[list-item]


@pytest.fixture(scope="module")
def result() -> demo.Result:
    with models.quiet():
        return demo.measure(models.load(names()[0]), 6, SPECS)


def test_demo_page_has_every_number_of_its_table(result: demo.Result, tmp_path: Path) -> None:
    text = page.write(demo.content(result, result), tmp_path / "demo.html").read_text()
    assert fetched(text) == []
    for row in result.rows:
        assert row.label in text
        for key in demo.METRICS:
            assert f"<span>{100 * row.score['values'][key]:.1f}</span>" in re.sub(r'<span class="\w+">', "<span>", text)
        assert tabular.bytes_text(row.cost["kv_bytes"]) in text
    for word in (
        "claim nothing about any real",
        "vlmattn eval",
        result.bench.sha256,
        result.loaded.fingerprint,
        "torch",
    ):
        assert word in text
    assert text.count('src="data:image/') == len(demo.PLACES) * len(SPECS)
    assert not list(tmp_path.glob(".*"))


def test_demo_tables_fit_and_agree_with_the_formula(result: demo.Result) -> None:
    answers, cost = demo.terminal_tables(result)
    assert answers.row_count == cost.row_count == len(SPECS)
    full, fastv, uniform = (row.cost for row in result.rows)
    assert full["average_visual_tokens"] == full["visual_tokens"] == 144
    depth = result.loaded.model.config.get_text_config().num_hidden_layers
    assert fastv["visual_per_layer"] == [144, 144] + [16] * (depth - 2)
    assert uniform["visual_per_layer"] == [16] * depth
    assert full["kv_bytes"] == full["kv_bytes_full"] == uniform["kv_bytes_full"]
    per_token = full["kv_bytes"] / full["prompt_tokens"]
    assert uniform["kv_bytes"] == pytest.approx(full["kv_bytes"] - 128 * per_token)


def test_demo_rows_are_compared_with_the_unpruned_model(result: demo.Result) -> None:
    base, *others = result.rows
    assert base.role == "baseline" and not base.versus
    assert all(set(demo.METRICS) <= set(row.versus) for row in others)
    assert len(demo.lead(result)) == len(SPECS)


def test_examples_tell_the_answers_and_draw_a_panel_per_method(result: demo.Result) -> None:
    found = demo.examples(result, SPECS[1:])
    assert [example.task for example in found] == list(demo.PLACES)
    for example in found:
        assert [answer.label for answer in example.answers] == list(SPECS)
        assert [picture.title[0] for picture in example.pictures[1:]] == list(SPECS[1:])
        assert example.answers[0].right


def test_an_example_under_every_method_tells_which_tokens_stayed(result: demo.Result) -> None:
    titles = [picture.title[-1] for picture in demo.examples(result, SPECS[1:])[0].pictures[1:]]
    assert titles == ["before layer 2: 16 of 144 kept", "before the first layer: 16 of 144 kept"]
