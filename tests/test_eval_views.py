"""Pages of sweeps and comparisons: they say what the numbers say and no more, and show what turned."""

from __future__ import annotations

import dataclasses
import html
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import page_runs
import pytest
from PIL import Image

from vlmattn.errors import DataError
from vlmattn.eval import compare, flipped, page, page_tables, sentences, stats, summary, tabular, views
from vlmattn.eval.items import Benchmark
from vlmattn.eval.runs import Run

MADE = {"model": "org/model", "versions": {}, "note": {"a": [1, 2]}}


@cache
def sweep() -> tuple[Benchmark, list[summary.Row], list[Run]]:
    return page_runs.make_sweep()


@cache
def sweep_page() -> page.Page:
    bench, rows, runs = sweep()
    return views.sweep_page("runs/mine", bench, rows, runs, MADE)


@cache
def comparison() -> compare.Comparison:
    _, _, runs = sweep()
    return compare.compare(runs[:2])[0]


def plain(text: str) -> str:
    """Text of a page as a reader sees it, blanks collapsed."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text)))


def section(shown: page.Page, title: str) -> Any:
    return next(part for part in shown.sections if part.title == title)


def pair(difference: float, p_holm: float | None, better: str = "higher", key: str = "a.accuracy") -> stats.Paired:
    values: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(stats.Paired))
    values |= {"key": key, "title": key, "group": "a", "headline": True, "better": better, "percent": True}
    values |= {"first": 0.8, "second": 0.8 + difference, "difference": difference, "p": p_holm, "p_holm": p_holm}
    return stats.Paired(**values | {"test": "bootstrap", "images": 20})


def row_with(*pairs: stats.Paired, **more: Any) -> summary.Row:
    cost = {"questions": 0}
    return summary.Row("fastv", "fastv", "", {}, {}, cost, versus={entry.key: entry for entry in pairs}, **more)


def test_the_page_of_a_sweep_has_every_headline_with_its_interval_and_difference() -> None:
    _, rows, _ = sweep()
    text = plain(page.render(sweep_page()))
    for row in rows[:4]:
        for key in ("mean_accuracy", "mean_f1"):
            value, ends = row.value(key), row.intervals[key]
            assert value is not None and ends is not None
            assert f"{100 * value:.1f} {100 * ends[0]:.1f} to {100 * ends[1]:.1f}" in text
            if row.versus:
                assert tabular.difference_text(row.versus[key]) in text
    for word in ("abc123", "f00d", "vlmattn 9.9", "vlmattn compare runs/mine", "greedy, at most 8 tokens", "a 1, 2"):
        assert word in text


def test_rows_say_what_they_are() -> None:
    _, rows, runs = sweep()
    table = page_tables.accuracy_table([*rows, summary.row(runs[1], runs[0])])
    assert [row.role for row in table.rows] == ["baseline", "", "", "control", "none", ""]
    below = table.rows[4]
    assert [cell.text for cell in below.cells[1:]] == [page.DASH, page.DASH]
    assert all(cell.value is None for cell in below.cells[1:])
    assert below.notes == ["level 0.35 is below the method's floor"]
    cost = page_tables.cost_table(rows).rows[4]
    assert cost.cells[1].text == page.DASH and list(cost.cells[1].small) == ["floor 18.5"]


def test_an_invalid_row_says_why_and_only_what_collapsed_is_struck() -> None:
    _, rows, _ = sweep()
    metric = next(metric for metric in rows[1].metrics if metric.group)
    broken = [
        rows[0],
        dataclasses.replace(rows[1], invalid="captions repeat themselves", collapsed=(metric.group,)),
    ]
    assert page_tables.metric_cell(broken[1], metric).struck and not page_tables.metric_cell(rows[1], metric).struck
    assert metric.title not in sentences.sentence(broken[1], "none")
    struck = [cell.struck for cell in page_tables.accuracy_table(broken).rows[1].cells]
    assert any(struck) and not all(struck)
    assert page_tables.accuracy_table(broken).rows[1].invalid == "captions repeat themselves"
    assert page_tables.cost_table(broken).rows[1].invalid == ""
    assert "not to be compared, captions repeat themselves" in sentences.sentence(broken[1], "none")


def test_failed_questions_and_notes_stand_under_the_row_and_shared_ones_below_the_table() -> None:
    items = page_runs.questions(4)
    run = page_runs.make_run("none", items, failed=[items[0].id])
    row = dataclasses.replace(summary.row(run, role="baseline"), note="no scipy")
    other = dataclasses.replace(row, label="b", failed={}, role="method")
    table = page_tables.accuracy_table([row, other])
    assert [list(line.notes) for line in table.rows] == [["1 question failed and left out"], []]
    assert table.notes[-1] == "no scipy"


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([pair(-0.1, 0.01)], "worse than none in a.accuracy (−10.0)"),
        ([pair(0.1, 0.01)], "better than none in a.accuracy (+10.0)"),
        ([pair(0.1, 0.01, "lower")], "worse than none in a.accuracy (+10.0)"),
        ([pair(0.1, 0.01, "neither")], "different in a.accuracy (+10.0)"),
        ([pair(-0.1, 0.06)], "no difference found in 1 test"),
        ([pair(-0.1, 0.01), pair(0.3, 0.5, key="b")], "no difference found in the other 1 of 2 tests"),
        ([pair(-0.1, None)], "too few images to test a difference"),
        ([], "differences were not tested"),
    ],
)
def test_a_sentence_claims_what_a_test_says_and_nothing_else(pairs: list[stats.Paired], said: str) -> None:
    sentence = sentences.sentence(row_with(*pairs), "none")
    assert said in sentence
    claims = sum(word in sentence for word in ("worse", "better", "different in"))
    assert claims == sum(entry.p_holm is not None and entry.p_holm < 0.05 for entry in pairs)


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (
            [pair(0.12, 0.01), pair(0.1, 0.9, key="b")],
            "better than random tokens at the same layer in a.accuracy (+12.0)",
        ),
        ([pair(-0.12, 0.01)], "worse than random tokens at the same layer in a.accuracy (−12.0)"),
        ([pair(-0.12, 0.01, "lower")], "better than random tokens at the same layer in a.accuracy (−12.0)"),
        (
            [pair(0.1, 0.06), pair(-0.3, 0.06, key="b")],
            "not found better than random tokens at the same layer in any of 2 tests",
        ),
        ([pair(0.3, None)], "too few images to test it against random tokens"),
        ([], ""),
    ],
)
def test_a_sentence_tells_whether_a_method_beats_random_tokens(pairs: list[stats.Paired], said: str) -> None:
    row = row_with(control="random", versus_control={entry.key: entry for entry in pairs})
    sentence = sentences.sentence(row, "none")
    assert said in sentence and ("random" in sentence) == bool(pairs)
    better = any(entry.significant() and sentences.direction(entry) == "good" for entry in pairs)
    assert (": better than random" in sentence or "; better than random" in sentence) == better


def test_a_sentence_says_what_tests_without_a_finding_would_have_missed() -> None:
    found, weak = pair(-0.3, 0.001), dataclasses.replace(pair(0.1, 0.4, key="b"), detectable=0.114)
    told = "(differences of b below 11 points are easily missed)"
    assert told in sentences.sentence(row_with(found, weak), "none")
    assert "missed" not in sentences.sentence(row_with(dataclasses.replace(found, detectable=0.1)), "none")
    assert "missed" not in sentences.sentence(row_with(dataclasses.replace(weak, detectable=None)), "none")
    assert "missed" not in sentences.sentence(row_with(dataclasses.replace(weak, headline=False)), "none")
    both = row_with(weak, versus_control={"b": weak})
    assert sentences.sentence(both, "none").count(told) == 1
    other = dataclasses.replace(weak, detectable=0.2)
    assert "below 20 points" in sentences.sentence(row_with(weak, versus_control={"b": other}), "none")


def test_power_is_that_of_methods_from_the_best_measured_to_the_worst() -> None:
    _, rows, _ = sweep()
    metric = summary.metrics(rows, headline=True)[0]

    def seen(row: summary.Row, detectable: float | None) -> summary.Row:
        tested = dataclasses.replace(row.versus[metric.key], detectable=detectable)
        return dataclasses.replace(row, versus={**row.versus, metric.key: tested})

    def power(*shares: float | None) -> list[str]:
        shown = [rows[0], *map(seen, rows[1:4], shares)]
        return [note for note in page_tables.accuracy_table(shown).notes if note.startswith("Power")]

    assert [row.role for row in rows[1:4]] == ["method", "method", "control"]
    (note,) = power(0.04, 0.09, 0.5)
    assert "with 20 images" in note and "of 4 to 9 points or more" in note and "50" not in note
    (note,) = power(None, 0.09, 0.5)
    assert "of 9 points or more between" in note
    assert power(None, None, 0.5) == []


def test_column_heads_say_how_many_images_a_metric_is_about() -> None:
    _, rows, _ = sweep()
    heads = [column.small for column in page_tables.accuracy_table(rows).columns[1:]]
    assert heads == ["%, 20 images"] * len(heads)
    fewer = dataclasses.replace(rows[1], images={key: count - 1 for key, count in rows[1].images.items()})
    assert page_tables.accuracy_table([rows[0], fewer]).columns[1].small == "%, 19 to 20 images"
    assert page_tables.accuracy_table([dataclasses.replace(rows[0], images={})]).columns[1].small == "%"


def test_the_page_has_a_table_against_random_tokens_where_rows_were_tested() -> None:
    bench, rows, runs = sweep()
    titles = [part.title for part in sweep_page().sections]
    assert "Against random tokens at the same layer" not in titles
    tested = [rows[0], summary.row(runs[1], runs[0], control=runs[3]), *rows[2:]]
    shown = views.sweep_page("o", bench, tested, runs, {})
    table = section(shown, "Against random tokens at the same layer")
    (line,) = table.rows
    assert line.cells[0].text == "fastv(keep=0.1)" and line.notes == ["against random(keep=0.1)"]
    for cell, metric in zip(line.cells[1:], summary.metrics(rows, headline=True), strict=True):
        pair = tested[1].versus_control[metric.key]
        assert cell.value == pair.difference > 0 and cell.text == tabular.difference_text(pair)
        assert cell.tone == ("good" if pair.significant() else "")
    assert [column.small for column in table.columns[1:]] == ["points, 20 images"] * (len(table.columns) - 1)
    assert "random tokens at the same layer" in next(text for text in shown.lead if text.startswith("fastv"))


def test_milliseconds_have_no_exponent() -> None:
    assert [tabular.milliseconds(value) for value in (0.01234, 5.678, 999.4, 999.6, 2140.3)] == [
        "0.0123", "5.68", "999", "1000", "2140"]  # fmt: skip


def test_what_leaves_the_cache_alone_is_said() -> None:
    _, rows, _ = sweep()
    row = next(row for row in rows if row.label == "vhr")
    assert "vhr: no token dropped; " in sentences.sentence(row, "none")
    cut = dataclasses.replace(row, cost={**row.cost, "kv_bytes": 0.3 * row.cost["kv_bytes_full"]})
    assert "vhr: no token dropped in the prefill, 30 % of the KV cache left after it; " in sentences.sentence(
        cut, "none"
    )


def test_the_lead_of_a_sweep_names_what_was_found() -> None:
    _, rows, runs = sweep()
    lead = sentences.sweep_lead(sweep()[0], rows, runs[0])
    assert lead[0].startswith("org/model answered 120 questions about 20 images (made up) under none, and again under")
    assert "2 methods and 1 control" in lead[0]
    worse, same = lead[2:]
    assert worse.startswith("fastv(keep=0.1): 4 of 36 visual tokens a layer, 11 % of the prefill MACs; worse than none")
    shown = f"{100 * rows[2].versus['mean_f1'].detectable:.2g}"  # type: ignore[operator]
    assert same == (
        "vhr: no token dropped; no difference found in 5 tests "
        f"(differences of mean F1 below {shown} points are easily missed)."
    )


@pytest.mark.parametrize(("model", "warned"), [("scenes-llava", True), ("org/model", False)])
def test_only_embedded_models_carry_the_warning(model: str, warned: bool) -> None:
    items = page_runs.questions(4)
    run = page_runs.make_run("none", items, model=model)
    shown = views.sweep_page("o", page_runs.make_bench(items), [summary.row(run, role="baseline")], [run], {})
    assert ("claim nothing about any real" in page.render(shown)) == warned


def test_a_sweep_of_one_run_is_a_page_without_comparisons() -> None:
    items = page_runs.questions(4)
    run = page_runs.make_run("none", items)
    shown = views.sweep_page("o", page_runs.make_bench(items), [summary.row(run, role="baseline")], [run], {})
    assert [part.title for part in shown.sections] == [
        "Accuracy",
        "Cost",
        "Every number",
        "How it was run",
        "Do it again",
    ]
    assert "against" not in shown.title and "vlmattn compare" not in page.render(shown)
    with pytest.raises(DataError, match="at least one run"):
        views.sweep_page("o", page_runs.make_bench(items), [], [], {})


def test_flips_are_counted_by_direction_by_yes_and_no_and_by_task() -> None:
    _, _, runs = sweep()
    flips = compare.find_flips(*runs[:2])
    table = flipped.table([flipped.Side("fastv", runs[0], runs[1], flips)])
    counts = {column.title: cell.text for column, cell in zip(table.columns, table.rows[0].cells, strict=True)}
    lost = Counter(flip.direction for flip in flips)
    assert counts["lost"] == str(lost["lost"]) and counts["won"] == str(lost["won"])
    turned = Counter((flip.first_verdict, flip.direction) for flip in flips)
    assert counts["yes → no"] == f"{turned['yes', 'lost']} + {turned['yes', 'won']}"
    assert counts["no → yes"] == f"{turned['no', 'lost']} + {turned['no', 'won']}"
    assert sum(int(part) for group in page_runs.GROUPS for part in counts[group].split(" + ")) == len(flips)


def test_tasks_without_a_changed_answer_have_no_column() -> None:
    items = page_runs.questions(4)
    wrong = [item.id for item in items if item.group == "popular"][:3]
    base, run = page_runs.make_run("none", items), page_runs.make_run("a", items, wrong)
    table = flipped.table([flipped.Side("a", base, run, compare.find_flips(base, run))])
    titles = [column.title for column in table.columns]
    assert table.title == "Changed answers" and titles[-1] == "popular"
    assert not {"random", "adversarial"} & set(titles)


def sides() -> list[flipped.Side]:
    items = page_runs.questions(20)
    ids = [item.id for item in items]
    base = page_runs.make_run("none", items, ids[1::10])
    runs = [page_runs.make_run(name, items, wrong) for name, wrong in (("a", ids[::2]), ("b", ids[::5]))]
    return [flipped.Side(run.label, base, run, compare.find_flips(base, run)) for run in runs]


def test_examples_are_spread_over_runs_tasks_and_directions_and_the_same_every_time() -> None:
    chosen = flipped.pick(sides(), 12)
    assert [(side.label, flip.id) for side, flip in chosen] == [
        (side.label, flip.id) for side, flip in flipped.pick(sides(), 12)
    ]
    assert Counter(side.label for side, _ in chosen) == {"a": 6, "b": 6}
    assert set(Counter(flip.group for _, flip in chosen).values()) == {4}
    assert {flip.direction for _, flip in chosen} == {"lost", "won"}
    assert len({flip.id for _, flip in chosen}) == 12


def test_every_flip_is_picked_once_when_there_is_room_and_none_without() -> None:
    everything = sides()
    chosen = flipped.pick(everything, 1000)
    assert len(chosen) == sum(len(side.flips) for side in everything)
    assert len({(side.label, flip.id) for side, flip in chosen}) == len(chosen)
    assert flipped.pick(everything, 0) == flipped.pick([], 5) == []


def test_an_example_shows_both_answers_the_image_and_the_kept_tokens() -> None:
    _, _, runs = sweep()
    flip = next(flip for flip in compare.find_flips(*runs[:2]) if flip.direction == "lost")
    shown = flipped.example(flipped.Side("fastv(keep=0.1)", runs[0], runs[1], [flip]), flip, page_runs.photo)
    assert [(answer.label, answer.text, answer.right) for answer in shown.answers] == [
        ("none", flip.first_text, True),
        ("fastv(keep=0.1)", flip.second_text, False),
    ]
    whole, kept = shown.pictures
    assert kept.title == ["fastv(keep=0.1)", "before layer 2: 4 of 36 kept"]
    before, after = np.asarray(whole.image), np.asarray(kept.image)
    assert (after[50:70, 50:70] == before[50:70, 50:70]).all(), "token 7, second row and column, is as it was"
    assert (after[90:110, 90:110].max() < 100) and np.ptp(after[100, 100]) == 0, "token 14 is dim and grey"


def test_several_stages_have_a_picture_each_and_a_run_without_pruning_has_none() -> None:
    items = page_runs.questions(2)
    stages = [("uniform(keep=0.5)", 0, range(18)), ("fastv(keep=0.1)", 2, [3])]
    first, second = page_runs.make_run("vhr", items), page_runs.make_run("both", items, [items[0].id], stages=stages)
    side = flipped.Side("both", first, second, compare.find_flips(first, second))
    shown = flipped.example(side, side.flips[0], page_runs.photo)
    assert [picture.title for picture in shown.pictures[1:]] == [
        ["both", "uniform(keep=0.5)", "before the first layer: 18 of 36 kept"],
        ["both", "fastv(keep=0.1)", "before layer 2: 1 of 36 kept"],
    ]


@pytest.mark.parametrize(
    ("pictures", "reason"),
    [
        ({"folder": "/nowhere/at/all"}, "/nowhere/at/all, is not there any more"),
        (None, "the run does not say where its images are"),
    ],
)
def test_a_comparison_whose_images_are_gone_says_so(tmp_path: Path, pictures: Any, reason: str) -> None:
    items = page_runs.questions(4)
    info = {"pictures": pictures} if pictures else {}
    runs = [page_runs.make_run(name, items, wrong, info=info) for name, wrong in (("a", ()), ("b", [items[0].id]))]
    text = views.write_comparison(tmp_path / "page.html", compare.compare(runs)).read_text()
    assert reason in plain(text) and "data:image" not in text


def test_a_comparison_finds_images_in_their_folder(tmp_path: Path) -> None:
    items = page_runs.questions(2)
    for name in {item.image for item in items}:
        page_runs.photo(name).save(tmp_path / name)
    info = {"pictures": {"folder": str(tmp_path)}}
    runs = [page_runs.make_run(name, items, wrong, info=info) for name, wrong in (("a", ()), ("b", [items[0].id]))]
    (tmp_path / "1.png").unlink()
    text = views.write_comparison(tmp_path / "page.html", compare.compare(runs)).read_text()
    assert text.count("data:image/") == 1


def test_the_page_of_a_comparison_has_its_tests() -> None:
    found = comparison()
    shown = views.comparison_page([found])
    table = section(shown, "Differences")
    tested = [entry for entry in found.paired if entry.headline or entry.p_holm is not None]
    assert [row.cells[0].text for row in table.rows] == [entry.title for entry in tested]
    for row, entry in zip(table.rows, tested, strict=True):
        assert row.cells[3].value == entry.difference and row.cells[4].value == entry.p
        assert (row.cells[3].tone == "bad") == entry.significant() == row.cells[3].text.endswith("*")
    assert any(row.cells[3].tone for row in table.rows)
    assert shown.lead[1].startswith("fastv(keep=0.1):") and "worse than none" in shown.lead[1]
    assert not any(part.title == "Accuracy" for part in shown.sections)


def test_several_comparisons_share_a_table_and_name_their_own() -> None:
    _, _, runs = sweep()
    shown = views.comparison_page(compare.compare(runs[:3]))
    titles = [part.title for part in shown.sections]
    assert titles[:3] == ["Accuracy", "Differences: fastv(keep=0.1) against none", "Differences: vhr against none"]
    assert shown.title == "pope on org/model: 2 runs against none"
    assert [row.role for row in section(shown, "Accuracy").rows] == ["baseline", "", ""]
    with pytest.raises(DataError, match="two runs or more"):
        views.comparison_page([])


def test_questions_left_out_of_a_comparison_are_told() -> None:
    items = page_runs.questions(4)
    runs = [page_runs.make_run("a", items), page_runs.make_run("b", items, failed=[items[3].id])]
    assert any("1 question" in sentence for sentence in views.comparison_page(compare.compare(runs)).lead)


def test_equal_runs_are_said_to_be_equal() -> None:
    items = page_runs.questions(4)
    shown = views.comparison_page(compare.compare([page_runs.make_run(name, items) for name in "ab"]))
    assert "No answer changed" in page.render(shown)
    assert shown.lead[1] == "b: no token dropped; no difference found in 5 tests."


def test_facts_give_all_values_where_runs_differ() -> None:
    items = page_runs.questions(2)
    first, second = page_runs.make_run("a", items), page_runs.make_run("b", items, model="org/other")
    found = views.facts([first, second], {"model": "ignored", "peak": 3})
    assert found["model"] == "org/model (float32, cpu) | org/other (float32, cpu)"
    assert found["decoding"] == "greedy, at most 8 tokens, batches of 4"
    assert found["peak"] == "3" and "ignored" not in found.values()


def test_twelve_noisy_photographs_stay_below_three_megabytes(tmp_path: Path) -> None:
    items = page_runs.questions(20)
    wrong = [item.id for item in items]
    stage = [("fastv", 2, range(0, page_runs.TOKENS, 2))]
    size = (640, 480)
    runs = [page_runs.make_run(name, items, ids, stages=stage, size=size) for name, ids in (("a", ()), ("b", wrong))]
    rows = [summary.row(runs[0], role="baseline"), summary.row(runs[1], runs[0])]
    large = page_runs.make_bench(items, lambda name: page_runs.photo(name, size))
    path = views.write_sweep(tmp_path, large, rows, runs, {})
    assert path == tmp_path / "index.html"
    assert path.read_text().count("data:image/jpeg") == 36
    assert path.stat().st_size < 3e6


def test_an_image_that_was_replaced_by_another_is_not_drawn_on() -> None:
    _, _, runs = sweep()
    flip = compare.find_flips(*runs[:2])[0]
    side = flipped.Side("fastv", runs[0], runs[1], [flip])
    shown = flipped.example(side, flip, lambda name: page_runs.photo(name, (80, 60)))
    assert not shown.pictures and "it has 80 x 60 pixels, the model saw 60 x 60" in shown.missing


def test_a_long_answer_is_cut_and_says_how_much_is_missing() -> None:
    assert flipped.clipped("short") == "short"
    assert flipped.clipped("x" * 700) == "x" * 600 + " ... (100 more characters)"


def test_half_a_surrogate_and_control_characters_can_be_written(tmp_path: Path) -> None:
    shown = page.Page("T\x00", ["a\ud83d", "b\x1b[31m"])
    text = page.write(shown, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "a\ufffd" in text and "b\ufffd[31m" in text and "\x00" not in text


def test_drawings_are_png_and_photographs_jpeg() -> None:
    assert page.data_uri(Image.new("RGB", (50, 50), "red")).startswith("data:image/png;")
    assert page.data_uri(page_runs.photo("x", (200, 200))).startswith("data:image/jpeg;")
