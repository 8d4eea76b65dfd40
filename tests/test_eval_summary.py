"""Rows and tables of a sweep: terminal, JSON, CSV, LaTeX."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from folders import COST
from rich.console import Console
from rows import TITLES, metric, paired, row, sweep

from vlmattn.errors import DataError
from vlmattn.eval import stats, summary, tabular
from vlmattn.eval.budgets import match_average_tokens
from vlmattn.eval.items import Benchmark, Item
from vlmattn.eval.runs import Run
from vlmattn.eval.tally import Aggregate, Formula, Kind, Scorer, share

EXACT = Kind(
    name="exact",
    columns=("right", "total", "unparsed"),
    count=lambda pairs: (
        sum(said.text == item.label for item, said in pairs),
        len(pairs),
        sum(not said.text for _, said in pairs),
    ),
    formulas=(Formula("accuracy", "accuracy", share(0, 1), of_marks=True),),
    mark=lambda item, said: said.text == item.label,
    verdict=lambda item, said: said.text,
)
SCORER = Scorer("toy", "plain", lambda group: EXACT, (Aggregate("mean_accuracy", "accuracy", "exact", "accuracy"),))


def run(wrong: int, label: str = "none", failed: int = 0, questions: int = 120) -> Run:
    """A run of two groups over 60 images with the first `wrong` answers wrong and the last `failed` failed."""
    records: list[dict[str, Any]] = []
    for number in range(questions):
        record: dict[str, Any] = {"id": f"q/{number}", "image": f"{number // 2}.png", "group": "ab"[number % 2]}
        record |= {"question": "?", "label": "x"}
        if number >= questions - failed:
            records.append(record | {"status": "failed", "error": "broken"})
            continue
        batch = number // 8
        time = {"batch": batch, "questions": 8, "prefill_ms": 40.0 + batch % 3, "decode_ms": 6.0, "new_tokens": 3}
        text = "" if number < wrong else "x"
        records.append(record | {"status": "ok", "text": text, "cost": COST, "time": time | {"vision_ms": 8.0}})
    return Run.of(f"runs/{label}", records, {"spec": label}, {}, SCORER, label)


def text_of(rows: Any, width: int = 160) -> str:
    return printed(tabular.tables("scenes: test", rows, width), width)


def printed(tables: Any, width: int = 160) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(*tables)
    return console.file.getvalue()  # type: ignore[attr-defined]


def lines(rows: Any) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(tabular.csv_text(rows))))


def test_a_row_has_score_interval_cost_and_the_difference_to_the_baseline() -> None:
    base, other = run(6), run(60, "fastv(keep=0.25)")
    first, second = summary.row(base, role="baseline"), summary.row(other, base)
    assert first.role == "baseline" and second.role == "method" and first.versus == {}
    assert first.value("mean_accuracy") == 0.95 and second.value("a.accuracy") == 0.5
    assert second.intervals == stats.intervals(other.tally)
    low, high = second.intervals["mean_accuracy"] or (0, 0)
    assert low < 0.5 < high
    pair = second.versus["mean_accuracy"]
    assert pair.difference == pytest.approx(-0.45) and pair.significant()
    assert second.spec == second.label == "fastv(keep=0.25)" and second.folder == "runs/fastv(keep=0.25)"
    assert second.score["unparsed"] == 60 and second.note == "" and second.invalid == ""
    assert summary.row(other, base, label="mine").label == "mine"
    assert summary.row(other, base, seed=1).intervals != second.intervals


def test_equal_runs_differ_in_nothing() -> None:
    base = run(6)
    same = summary.row(run(6, "var"), base)
    assert {pair.difference for pair in same.versus.values()} == {0.0}
    assert not any(pair.significant() for pair in same.versus.values())
    assert "±0.0" in tabular.cell(same, same.metrics[0]) and "*" not in tabular.cell(same, same.metrics[0])


def with_control(right: int = 60) -> list[summary.Row]:
    """A baseline, a method, its random tokens and a method without any."""
    base, fastv, random = run(6), run(20, "fastv"), run(right, "random")
    return [
        summary.row(base, role="baseline"),
        summary.row(fastv, base, control=random),
        summary.row(run(12, "var"), base),
        summary.row(random, base, role="control"),
    ]


def test_a_method_is_tested_against_its_random_tokens() -> None:
    rows = with_control()
    assert [entry.control for entry in rows] == ["", "random", "", ""]
    assert [bool(entry.versus_control) for entry in rows] == [False, True, False, False]
    pair = rows[1].versus_control["mean_accuracy"]
    assert pair.difference == pytest.approx(40 / 120) and pair.significant()  # 100 of 120 right, 60 of random tokens
    assert rows[1].versus["mean_accuracy"].difference == pytest.approx(-14 / 120)
    stored = rows[1].to_dict()
    assert stored["control"] == "random" and stored["versus_control"]["mean_accuracy"]["p_holm"] == pair.p_holm
    assert "title" not in stored["versus_control"]["mean_accuracy"] and rows[0].to_dict()["versus_control"] == {}
    assert rows[1].to_dict()["images"]["mean_accuracy"] == 60


def test_questions_that_random_tokens_lost_are_not_in_their_differences() -> None:
    found = summary.row(run(0, "fastv"), run(1), control=run(0, "random", failed=30))
    assert found.versus_control["mean_accuracy"].images == 45 and found.versus["mean_accuracy"].images == 60
    assert found.note == "30 questions that only one of it and random answered are not in differences"


def test_the_terminal_has_a_second_table_of_methods_tested_against_random_tokens() -> None:
    rows = with_control()
    assert len(tabular.tables("toy", [rows[0], rows[2]])) == 1
    *_, last = tabular.tables("toy", rows)
    assert last.title == "against random tokens at the same layer" and last.row_count == 1
    text = printed([last])
    assert "fastv" in text and "+33.3*" in text and "var" not in text and "−" not in text
    notes = tabular.notes(rows)
    assert any(note.startswith("Against random tokens") and "p < 0.05" in note for note in notes)
    assert not any(note.startswith("Against random tokens") for note in tabular.notes(rows, differences=False))
    assert any(note.endswith("no difference was found.") for note in tabular.notes(with_control(20)))


@pytest.mark.parametrize("width", [60, 80])
def test_the_table_against_random_tokens_fits_the_terminal(width: int) -> None:
    rows = [dataclasses.replace(entry, control="r", versus_control=entry.versus) for entry in sweep()]
    few = len(tabular.tables("t", [dataclasses.replace(entry, versus_control={}) for entry in rows], width))
    text = printed(tabular.tables("t", rows, width)[few:], width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    for shown in summary.metrics(rows, headline=True):
        assert all(tabular.control_text(entry, shown) in text for entry in rows[1:])


def test_csv_has_the_difference_to_random_tokens_of_headlines() -> None:
    first, second, third, _ = lines(with_control())
    assert second["control"] == "random" and third["control"] == ""
    assert float(second["mean_accuracy.difference_to_random"]) == pytest.approx(40 / 120)
    assert 0 < float(second["mean_accuracy.p_holm_to_random"]) < 0.05
    assert first["mean_accuracy.p_holm_to_random"] == third["mean_accuracy.difference_to_random"] == ""
    random = {name.removesuffix(".difference_to_random") for name in second if name.endswith("difference_to_random")}
    assert random == {shown.key for shown in summary.metrics(with_control(), headline=True)}
    assert random < {shown.key for shown in summary.metrics(with_control())}


def changed(entry: Run, **more: Any) -> Run:
    """The run with parts of its first record replaced."""
    first, *others = entry.records
    return dataclasses.replace(entry, records=[{**first, **more}, *others])


IDLE = "changes nothing here: all answers and costs are those of none"


def test_a_method_that_does_nothing_says_so() -> None:
    base, same = run(6), run(6, "var")
    assert summary.row(same, base).note == IDLE
    assert summary.row(same, base, role="control").note == summary.row(same).note == ""
    assert summary.row(run(7, "var"), base).note == ""
    half = {**COST, "visual_per_layer": [n // 2 for n in COST["visual_per_layer"]]}
    for more in (
        {"text": "y"},
        {"cost": half},
        {"cost": {**COST, "prefill_macs": 1}},
        {"cost": {**COST, "kv_bytes": 1}},
    ):
        assert summary.row(changed(same, **more), base).note == ""
    assert f"var: {IDLE}." in tabular.notes([summary.row(base, role="baseline"), summary.row(same, base)])


def test_a_method_that_moves_margins_does_something() -> None:
    base, same = changed(run(6), margin=1.0), run(6, "vhr")
    assert summary.row(changed(same, margin=1.0001), base).note == IDLE  # another order of sums
    assert summary.row(changed(same, margin=1.4), base).note == IDLE.replace("nothing", "no answer")


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([144, 144, 144, 0], "layers 0 to 2 still saw"),
        ([144, 144, 0, 0], "layers 0 and 1 still saw"),
        ([144, 0, 0, 0], "layer 0 still saw"),
        ([0, 0, 0, 0], ""),
        ([144, 144, 144, 36], ""),
    ],
)
def test_layers_that_saw_the_image_before_it_was_dropped_are_told(layers: list[int], said: str) -> None:
    records = [{**record, "cost": {**COST, "visual_per_layer": layers}} for record in run(6).records]
    note = summary.row(dataclasses.replace(run(6, "noimage"), records=records), run(7), role="control").note
    assert note == (f"{said} the image; what they read stays" if said else "")


def test_questions_that_one_run_lost_are_left_out_of_differences() -> None:
    base, other = run(0), run(0, "var", failed=30)
    found = summary.row(other, base)
    assert found.versus["mean_accuracy"].images == 45 and found.versus["mean_accuracy"].difference == 0
    assert "30 questions that only one of it and none answered" in found.note
    assert len(found.failed) == 30
    assert any(sentence == "var: 30 questions failed and are left out." for sentence in tabular.notes([found]))


def test_when_everything_failed_there_is_a_row_all_the_same() -> None:
    base, other = run(0), run(0, "var", failed=120)
    found = summary.row(other, base)
    assert found.cost == {"questions": 0} and found.value("mean_accuracy") is None
    both = [summary.row(base, role="baseline"), found]
    assert text_of(both).count("var") >= 1
    assert lines(both)[1]["mean_accuracy"] == "" and lines(both)[1]["failed"] == "120"


def test_without_scipy_the_row_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise DataError("intervals need scipy")

    monkeypatch.setattr(stats, "intervals", missing)
    base = run(6)
    both = [summary.row(base, role="baseline"), summary.row(run(9, "var"), base)]
    assert both[0].note == "intervals need scipy" and both[0].intervals == {}
    assert tabular.notes(both)[-1] == "intervals need scipy."  # once, not once a row
    assert "95.0" in text_of(both)


def test_a_collapsed_row_is_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmattn.eval import controls

    monkeypatch.setattr(controls, "collapse", lambda base, other: {"caption": "caption: mean length moved"})
    broken = summary.row(run(6), run(6))
    assert broken.invalid == "caption: mean length moved" and broken.collapsed == ("caption",)
    assert summary.row(run(6)).invalid == ""


def test_measured_cost_is_prefill_and_decoding_of_a_question() -> None:
    cost = summary.cost_of(run(0).records)
    assert cost["prefill_ms_per_question"] == 41 / 8 and cost["vision_ms"] == 8
    assert cost["ms_per_token"] == 3 and cost["new_tokens"] == 3 and cost["batch_size"] == 8
    assert cost["ms_per_question"] == 41 / 8 + 3 * (3 - 1) / 8
    assert cost["prefill_macs_ratio"] == 0.5 and cost["average_visual_tokens"] == 10
    old = [
        {**record, "time": {**record["time"], "new_tokens": 1, "decode_ms": 0.0}} | {"id": record["id"]}
        for record in run(0).records
    ]
    cost = summary.cost_of(old)
    assert cost["ms_per_token"] is None and cost["ms_per_question"] == cost["prefill_ms_per_question"]


def test_the_mean_length_of_answers_counts_not_the_longest() -> None:
    records = [dict(record) for record in run(0).records]
    for record in records[:60]:
        record["time"] = {**record["time"], "new_tokens": 23, "decode_ms": 66.0}
    batches = {record["time"]["batch"]: record["time"]["new_tokens"] for record in records}
    cost = summary.cost_of(records)
    assert cost["new_tokens"] == pytest.approx(sum(batches.values()) / len(batches))
    assert cost["ms_per_question"] == pytest.approx(41 / 8 + 3 * (cost["new_tokens"] - 1) / 8)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_tables_fit_the_terminal_and_lose_nothing(width: int) -> None:
    rows = sweep()
    text = text_of(rows, width)
    assert max(map(len, text.splitlines())) <= width
    flat = re.sub(r"\s+", " ", text)
    for entry in rows:
        for shown in summary.metrics(rows, headline=True):
            assert tabular.cell(entry, shown).partition(" (")[0] in flat
        for part in tabular.cost_texts(entry.cost):
            assert part.partition(" (")[0] in flat
    assert "…" not in text and "random F1" not in flat  # nothing cut; not a headline
    tables = tabular.tables("scenes: test", rows, width)
    assert len(tables) > 1 and all(table.row_count == len(rows) for table in tables)
    assert [table.title for table in tables] == ["scenes: test"] + [None] * (len(tables) - 1)


def test_few_metrics_and_cost_stand_in_one_table() -> None:
    base = run(6)
    rows = [summary.row(base, role="baseline"), summary.row(run(12, "var"), base)]
    assert len(tabular.tables("toy", rows, 160)) == 1
    head = [str(column.header) for column in tabular.tables("toy", rows, 160)[0].columns]
    assert "unparsed" in head and "accuracy %" in head
    assert "unparsed" not in text_of([summary.row(run(0))])


def test_the_marks_of_a_table_are_explained() -> None:
    rows = sweep()
    text, notes = text_of(rows), tabular.notes(rows)
    assert "79.0 −11.0*" in text and "uniform(keep=0.25, mode='2d') †" in text
    assert notes[1] == "With a sign: the difference to none."
    assert notes[2].startswith("* differs from none: p < 0.05 in a paired test, after Holm's correction")
    assert notes[3].startswith("† uniform(keep=0.25, mode='2d'): not comparable, caption: mean length 62.0 words")
    bare = dataclasses.replace(rows[0], intervals={})
    assert tabular.notes([bare]) == []


def test_a_value_has_the_unit_of_its_metric() -> None:
    entry, base = sweep()[1:3], sweep()[0]
    assert tabular.cell(base, metric("mean_accuracy")) == "90.0 (87.0-92.5)"
    assert tabular.cell(entry[1], metric("mean_accuracy")) == "79.0 −11.0* (76.0-81.5)"
    assert tabular.cell(base, metric("caption.length")) == "38.2 (38.2-38.3)"
    assert summary.title(metric("caption.length")) == "caption length"
    assert summary.title(metric("mean_f1")) == "F1 %"
    assert tabular.number_text(0.5) == "50.0"
    assert [tabular.number_text(value, False) for value in (0.123, 9.994, 9.996, 1511.2)] == [
        "0.12",
        "9.99",
        "10.0",
        "1511.2",
    ]
    undefined = dataclasses.replace(base, score={**base.score, "undefined": ["mean_accuracy"]})
    assert tabular.cell(undefined, metric("mean_accuracy")) == "-"


def below_floor() -> summary.Row:
    match = match_average_tokens("fastv(before_layer=2)", [0.35], num_layers=4, visual_tokens=144)[0]
    return summary.below_floor(match)


def test_a_level_below_the_floor_is_a_dash_with_the_floor() -> None:
    entry = below_floor()
    assert entry.role == "below floor" and entry.label == "fastv(before_layer=2) at 0.35"
    assert "leaves 72.5 of 144 visual tokens a layer on average; the floor is 50.3 %" in entry.note
    rows = [*sweep(), entry]
    text = text_of(rows)
    for line in text.splitlines():
        if line.startswith(" fastv(before_layer=2) at"):
            assert set(line.removeprefix(" fastv(before_layer=2) at 0.35").split()) == {"-"}
    assert "floor 72.5" in text
    assert tabular.notes(rows)[-1].startswith("fastv(before_layer=2) at 0.35: level 0.35 cannot be reached")
    last = lines(rows)[-1]
    assert last["floor"] == "72.5" and last["mean_accuracy"] == "" and last["spec"] == ""
    assert r"-- {\scriptsize floor 72.5}" in tabular.latex(rows)


def test_csv_has_plain_numbers_in_the_metrics_own_units() -> None:
    rows = sweep()
    rows[1] = dataclasses.replace(rows[1], note='says "so", twice\nor more')
    found = lines(rows)
    assert [line["label"] for line in found] == [entry.label for entry in rows]
    second = found[1]
    assert float(second["mean_accuracy"]) == 0.88 and float(second["mean_accuracy.low"]) == pytest.approx(0.85)
    assert float(second["mean_accuracy.high"]) == pytest.approx(0.905)
    assert float(second["mean_accuracy.difference"]) == pytest.approx(-0.02)
    assert float(second["mean_accuracy.p"]) == 0.3 and float(second["mean_accuracy.p_holm"]) == 0.6
    assert float(second["prefill_macs_ratio"]) == pytest.approx(124 / 160) and second["peak_memory_bytes"] == ""
    assert second["note"] == 'says "so", twice\nor more'
    assert found[0]["mean_accuracy.p"] == "" and found[4]["invalid"].startswith("caption:")
    assert set(TITLES) <= set(second)


def cells(text: str) -> list[list[str]]:
    """The body cells of a LaTeX table, read in a crude way."""
    body = text.split(r"\toprule")[1].split(r"\bottomrule")[0]
    rows = [line for line in body.splitlines() if line.startswith(r"\texttt")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)&", row.removesuffix(r" \\"))] for row in rows]


def test_the_latex_table_is_whole() -> None:
    text = tabular.latex(sweep())
    plain = re.sub(r"\\[\\{}%&_#$]", "", text)  # escaped characters are text
    assert plain.count("{") == plain.count("}") and plain.count("$") % 2 == 0
    depth = 0
    for letter in plain:
        depth += (letter == "{") - (letter == "}")
        assert depth >= 0
    assert sorted(re.findall(r"\\(begin|end)\{(\w+)\}", text)) == [("begin", "tabular"), ("end", "tabular")]
    columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", text).group(1))  # type: ignore[union-attr]
    assert {len(row) for row in cells(text)} == {columns}
    assert not re.search(r"(?<!\\)[_#]", text) and "%" not in re.sub(r"\\%", "", text.partition("\n")[2])
    assert text.count(r"\midrule") == 3  # baseline, methods, controls
    assert text.isascii()


def test_latex_names_are_escaped() -> None:
    odd = row("a_b & 50% $x$ #1 {q} ~^\\ <x> | †", 0.5, 72, 4.0)
    text = tabular.latex([odd])
    assert (
        r"\texttt{a\_b \& 50\% \$x\$ \#1 \{q\} \textasciitilde{}\textasciicircum{}\textbackslash{} "
        r"\textless{}x\textgreater{} \textbar{} $^{\dagger}$}" in text
    )


def differing(entry: summary.Row, difference: float, p: float) -> summary.Row:
    """The row with that difference to the baseline in all metrics."""
    return dataclasses.replace(entry, versus={key: paired(key, difference, p) for key in entry.versus})


def test_latex_marks_the_best_comparable_method_or_control_that_is_better_than_the_baseline() -> None:
    rows = [
        row("none", 0.7, 144, 9.0, "baseline"),
        differing(row("fastv", 0.8, 72, 5.0), 0.1, 0.001),
        differing(row("uniform", 0.8, 72, 5.0), 0.1, 0.001),
        differing(row("random", 0.6, 72, 5.0, "control"), -0.1, 0.001),
        differing(row("broken", 0.95, 72, 5.0, invalid="collapsed"), 0.25, 0.001),
    ]
    found = cells(tabular.latex(rows))
    keys = [metric.key for metric in summary.metrics(rows, headline=True)]
    best, lowest = 1 + keys.index("mean_f1"), 1 + keys.index("caption.chair_s")
    neither = 1 + keys.index("caption.length")
    assert [r"\textbf" in line[best] for line in found] == [False, True, True, False, False]  # equal digits share it
    assert [r"\textbf" in line[lowest] for line in found] == [False, False, False, True, False]
    assert not any(r"\textbf" in line[neither] for line in found)
    assert not any(r"\textbf" in cell for line in cells(tabular.latex(rows[:2])) for cell in line)  # no contest


def test_latex_marks_no_value_that_may_be_chance_or_is_worse_than_the_baseline() -> None:
    base, first, second = row("none", 0.85, 144, 9.0, "baseline"), row("fastv", 0.8, 72, 5.0), row("var", 0.7, 144, 9.0)
    accuracy, chair = (
        1 + [metric.key for metric in summary.metrics([base], headline=True)].index(key)
        for key in ("mean_accuracy", "caption.chair_s")
    )

    def bold(difference: float, p: float) -> list[bool]:
        """Of the best accuracy, and of the lowest share of captions with a hallucination."""
        found = cells(tabular.latex([base, *(differing(entry, difference, p) for entry in (first, second))]))
        return [r"\textbf" in found[1][accuracy], r"\textbf" in found[2][chair]]

    assert bold(0.02, 0.001) == [True, False]
    assert bold(-0.02, 0.001) == [False, True]
    assert bold(0.02, 0.3) == bold(-0.02, 0.3) == [False, False]
    alone = differing(second, 0.02, 0.001)  # a value that is not the best of its column
    assert not any(
        r"\textbf" in cell
        for line in cells(tabular.latex([base, first, alone]))[2:]
        for cell in line[accuracy : accuracy + 1]
    )


def bench() -> Benchmark:
    return Benchmark("toy", (Item("q", "i", "?", "x", "a"),), lambda name: None, SCORER, "abc", "made up")  # type: ignore[arg-type, return-value]


def test_a_sweep_leaves_five_files(tmp_path: Path) -> None:
    rows = [*sweep(), below_floor()]
    pair = dataclasses.replace(rows[1].versus["mean_f1"], p=math.nan, interval=None)
    rows[1] = dataclasses.replace(rows[1], versus={**rows[1].versus, "mean_f1": pair})
    path = summary.write(tmp_path, bench(), rows, {"model": "m"})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(
        [summary.CSV, summary.LATEX, summary.MARKDOWN, summary.PLOT, summary.SUMMARY]
    )

    def strict(name: str) -> Any:
        raise AssertionError(f"{name} is not JSON")

    value = json.loads(path.read_text(), parse_constant=strict)
    assert value["model"] == "m" and value["profile"] == "plain" and value["data"]["sha256"] == "abc"
    assert value["metrics"]["caption.chair_s"] == {
        "title": "caption CHAIR_s",
        "group": "caption",
        "headline": True,
        "better": "lower",
        "percent": True,
    }
    assert [entry["label"] for entry in value["runs"]] == [entry.label for entry in rows]
    first = value["runs"][1]
    assert first["versus"]["mean_accuracy"]["difference"] == pytest.approx(-0.02)
    assert first["versus"]["mean_f1"]["p"] is None and "metrics" not in first
    assert value["runs"][4]["invalid"].startswith("caption") and value["runs"][-1]["role"] == "below floor"
    assert (tmp_path / summary.CSV).read_text() == tabular.csv_text(rows)
    assert (tmp_path / summary.PLOT).read_text().startswith("<svg")


def test_a_write_that_fails_leaves_the_former_files(tmp_path: Path) -> None:
    summary.write(tmp_path, bench(), sweep(), {})
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    with pytest.raises(TypeError):
        summary.write(tmp_path, bench(), sweep()[:2], {"model": object()})
    assert (tmp_path / summary.SUMMARY).read_bytes() == before[summary.SUMMARY]
    assert {entry.name for entry in tmp_path.iterdir()} == set(before)  # no temporary file is left
