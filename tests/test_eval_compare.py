"""Runs against each other: pairing, refusal, answers that turned, and what the command prints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folders
import pytest
from folders import answering
from rich.console import Console
from typer.testing import CliRunner

from vlmattn.cli import app
from vlmattn.errors import DataError
from vlmattn.eval import compare, stats
from vlmattn.eval.items import Item
from vlmattn.eval.runs import Run

FIRST = answering(random_0="no", popular_1="yes", digits_2="9", digits_3="9")
SECOND = answering(random_0="no", random_5="no", random_6="No.", popular_2="Yes", digits_3="8", digits_4="4 8")
METHOD = {"spec": "fastv(keep=0.5)"}


def load(folder: Path, say: Callable[[Item], str | None] = folders.right, **changes: Any) -> Run:
    return Run.load(folders.write(folder, say, **changes))


def pair(folder: Path, **changes: Any) -> list[Run]:
    return [load(folder / "first", FIRST), load(folder / "second", SECOND, **{**METHOD, **changes})]


def text_of(tables: list[Any], width: int) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in tables:
        console.print(table)
    return console.export_text()


def test_every_metric_is_paired_and_the_numbers_are_those_of_the_runs(tmp_path: Path) -> None:
    runs = pair(tmp_path)
    (found,) = compare.compare(runs)
    entries = {entry.key: entry for entry in found.paired}
    assert list(entries) == [metric.key for metric in runs[0].tally.metrics]
    random = entries["random.accuracy"]
    assert (random.first, random.second) == (pytest.approx(11 / 12), pytest.approx(9 / 12))
    assert random.mcnemar == stats.McNemar(2, 0, 0.5) and random.test == "mcnemar" and random.images == 12
    assert entries["mean_exact"].test == "mcnemar" and entries["random.f1"].test == "exchange"
    assert entries["mean_accuracy"].mcnemar == stats.McNemar(3, 1, stats.mcnemar(3, 1))
    assert found.left_out == () and found.notes == ()


def test_answers_that_turned_are_listed_and_counted_by_direction(tmp_path: Path) -> None:
    (found,) = compare.compare(pair(tmp_path))
    assert [(flip.id, flip.direction) for flip in found.flips] == [
        ("popular/1", "won"),
        ("popular/2", "lost"),
        ("digits/2", "won"),
        ("digits/4", "lost"),
        ("random/5", "lost"),
        ("random/6", "lost"),
    ]
    flip = found.flips[-1]
    assert (flip.label, flip.first_text, flip.second_text) == ("yes", "yes", "No.")
    assert (flip.first_verdict, flip.second_verdict, flip.image) == ("yes", "no", "6.png")
    none = {"lost": 0, "won": 0}
    assert [dataclasses.astuple(entry) for entry in found.counts] == [
        ("random", 12, 2, 0, 2, {"yes to no": {"lost": 2, "won": 0}, "no to yes": none}),
        ("popular", 12, 1, 1, 2, {"yes to no": {"lost": 0, "won": 1}, "no to yes": {"lost": 1, "won": 0}}),
        ("digits", 12, 1, 1, 3, {}),
    ]


def test_examples_take_turns_over_tasks_and_directions(tmp_path: Path) -> None:
    (found,) = compare.compare(pair(tmp_path))
    chosen = compare.examples(found.flips, 5)
    assert {(flip.group, flip.direction) for flip in chosen} == {(f.group, f.direction) for f in found.flips}
    assert len(compare.examples(found.flips, 99)) == 6 and compare.examples(found.flips, 0) == []
    assert compare.flip_table(found, 0) is None


def test_a_caption_flips_when_it_begins_to_hallucinate(tmp_path: Path) -> None:
    gold = {"objects": ["red circle"]}
    items = tuple(Item(f"caption/{n}", f"{n}.png", "Describe.", "", "caption", gold) for n in range(6))
    one = load(tmp_path / "one", lambda item: "a red circle", items=items)
    two = load(tmp_path / "two", lambda item: "a red circle and a blue square", items=items, spec="x")
    (found,) = compare.compare([one, two])
    entry = next(entry for entry in found.paired if entry.key == "caption.chair_s")
    assert (entry.difference, entry.p, entry.test) == (1.0, 2 * 0.5**6, "mcnemar")
    assert dataclasses.astuple(found.counts[0]) == ("caption", 6, 6, 0, 6, {})
    assert found.flips[0].second_verdict == "red circle (not there: blue square)"
    assert any("two" not in note and "x is not comparable" in note for note in found.notes)  # the length doubled


def test_equal_runs_say_so(tmp_path: Path) -> None:
    (found,) = compare.compare([load(tmp_path / name, FIRST) for name in ("one", "two")])
    assert found.flips == () and found.notes == ("All answers are the same.",)
    assert {(entry.difference, entry.p) for entry in found.paired} == {(0.0, 1.0)}
    assert found.first.label == f"none [{tmp_path / 'one'}]" and found.second.label == f"none [{tmp_path / 'two'}]"
    assert compare.power_notes(found) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"sha256": "b" * 64}}, r"data\.sha256 \(bbbbbbbbbbbb\.\.\., in the first aaaaaaaaaaaa\.\.\.\)"),
        ({"data": {"world": "2"}}, r"data\.world \(2, in the first null\)"),
        ({"data": {"limit": 4}}, r"data\.limit \(4, in the first null\)"),
        ({"prompt": "single_word"}, r"prompt \(single_word, in the first bare\)"),
        ({"decode": {"max_new_tokens": 128}}, r"decode\.max_new_tokens \(128, in the first 16\)"),
        ({"decode": {"top_p": 0.9}}, r"decode\.top_p \(0\.9, in the first null\)"),
        ({"model": {"fingerprint": "beef"}}, r"model\.fingerprint \(beef, in the first f00d\)"),
        ({"model": {"dtype": "bfloat16"}}, r"model\.dtype \(bfloat16, in the first float32\)"),
    ],
)
def test_runs_that_differ_in_more_than_the_method_are_refused_unless_forced(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    runs = pair(tmp_path, **change)
    with pytest.raises(DataError, match=rf"second cannot be compared with .*first, they differ in {said}.*--force"):
        compare.compare(runs)
    (found,) = compare.compare(runs, force=True)
    assert "Compared by force" in found.notes[0] and next(iter(change)) in found.notes[0]
    assert len(found.flips) == 6


def test_another_profile_is_refused_with_its_own_way_out(tmp_path: Path) -> None:
    first, second = pair(tmp_path)
    with pytest.raises(
        DataError, match=r"profile \(lmms_eval, in the first official\).*use --profile to read both alike"
    ):
        compare.compare([first, Run.load(second.folder, profile="lmms_eval")])


def test_other_versions_are_a_note(tmp_path: Path) -> None:
    (found,) = compare.compare(pair(tmp_path, versions={"torch": "3"}, device="cuda"))
    (note,) = found.notes
    assert note == "The runs differ in device (cuda, in the first cpu), versions.torch (3, in the first 2)."


def test_only_what_both_answered_is_compared_and_the_rest_is_named(tmp_path: Path) -> None:
    first = load(tmp_path / "first", lambda item: None if item.id == "random/1" else FIRST(item))
    items = tuple(reversed(folders.ITEMS[:-1]))  # one was not asked, and the order is another
    second = load(
        tmp_path / "second", lambda item: None if item.id == "random/2" else SECOND(item), items=items, **METHOD
    )
    (found,) = compare.compare([first, second])
    assert set(found.left_out) == {"random/1", "random/2", "digits/11"}
    assert found.notes == (
        "3 questions are left out, because only one of the runs answered them: random/2, digits/11, random/1.",
        "none: 1 questions failed, the first with 1.png: broken.",
        "fastv(keep=0.5): 1 questions failed, the first with 2.png: broken.",
    )
    assert len(found.first.said) == len(found.second.said) == 33
    assert next(entry for entry in found.paired if entry.key == "random.accuracy").images == 10


def test_questions_that_changed_are_left_out_too(tmp_path: Path) -> None:
    items = tuple(
        dataclasses.replace(item, question="Is it?") if item.group == "random" else item for item in folders.ITEMS
    )
    first = load(tmp_path / "first", FIRST)
    second = load(tmp_path / "second", SECOND, items=items, data={"sha256": "b" * 64})
    (found,) = compare.compare([first, second], force=True)
    assert {key.split("/")[0] for key in found.left_out} == {"random"} and "because they differ" in found.notes[1]
    other = tuple(dataclasses.replace(item, image=f"x{item.image}") for item in folders.ITEMS)
    with pytest.raises(DataError, match="no question in common"):
        compare.compare([first, load(tmp_path / "other", SECOND, items=other)], force=True)


def test_a_comparison_needs_two_runs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two runs or more, here is one"):
        compare.compare([load(tmp_path / "first")])


def test_every_further_run_is_compared_with_the_first(tmp_path: Path) -> None:
    runs = [load(tmp_path / name, say, spec=name) for name, say in (("a", FIRST), ("b", SECOND), ("c", folders.right))]
    found = compare.compare(runs)
    assert [(entry.first.label, entry.second.label) for entry in found] == [("a", "b"), ("a", "c")]
    assert {flip.direction for flip in found[1].flips} == {"won"}


@pytest.mark.parametrize("width", [80, 160])
def test_tables_fit_and_lose_nothing(tmp_path: Path, width: int) -> None:
    (found,) = compare.compare(pair(tmp_path, spec="fastv(keep=0.5, before_layer=2) + random(keep=0.5)"))
    shown = text_of([*compare.tables(found), compare.flip_table(found, 6)], width)
    assert max(map(len, shown.splitlines())) <= width
    for text in ("−16.7", "−41.7 to 0.0", "McNemar", "exchange", "random", "popular", "digits", "2 lost 0 won"):
        assert text in shown
    assert "random F1" not in shown and "random F1" in text_of(compare.tables(found, every=True), 160)
    assert "50 % of the prefill MACs" in " ".join(shown.split())


def test_what_a_model_said_cannot_change_the_terminal(tmp_path: Path) -> None:
    bad = "\x1b[31mred\ud83d\n[bold]x[/bold]" + "y" * 500
    runs = [load(tmp_path / "first"), load(tmp_path / "second", answering(digits_1=bad), **METHOD)]
    (found,) = compare.compare(runs)
    shown = text_of([compare.flip_table(found, 1)], 400)
    assert "\x1b" not in shown and " [31mred  [bold]x[/bold]yyy" in shown and "y" * 200 not in shown


def invoke(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["compare", *map(str, words)])


def test_the_command_prints_tables_examples_power_and_explanations(tmp_path: Path) -> None:
    folders.write(tmp_path / "none", FIRST)
    folders.write(tmp_path / "fastv", SECOND, **METHOD)
    result = invoke(tmp_path)
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert "36 questions about 12 images" in said and "first: none" in said and "second: fastv(keep=0.5)" in said
    assert "digits/4: What digits are shown?" in said and "80 % power" in said
    assert "McNemar: the exact test" in said and "\x1b" not in result.stdout
    assert "random recall" in " ".join(invoke(tmp_path, "--metrics", "all").stdout.split())
    assert "digits/4" not in invoke(tmp_path, "--flips", "0").stdout


def test_the_command_gives_json_with_all_metrics(tmp_path: Path) -> None:
    first, second = folders.write(tmp_path / "a", FIRST), folders.write(tmp_path / "b", SECOND, **METHOD)
    result = invoke(first, second, "--json")
    (found,) = json.loads(result.stdout)
    keys = {entry["key"] for entry in found["metrics"]}
    assert {"mean_accuracy", "random.f1", "digits.accuracy"} <= keys and len(found["flips"]) == 6
    assert found["second"]["spec"] == "fastv(keep=0.5)" and found["questions"] == 36
    assert found["counts"][0]["directions"]["yes to no"] == {"lost": 2, "won": 0}
    assert invoke(first, second, "--json").stdout == result.stdout


def test_captions_are_scored_with_the_word_table_that_is_given(tmp_path: Path) -> None:
    items = tuple(Item(f"caption/{n}", f"{n}.png", "?", "", "caption", {"objects": ["cat"]}) for n in range(3))
    one = folders.write(tmp_path / "a", lambda item: "a cat", items=items)
    two = folders.write(tmp_path / "b", lambda item: "a kitten and a dog", items=items, **METHOD)
    (tmp_path / "words.json").write_text(json.dumps({"classes": {"cat": ["kitten"], "dog": []}}))
    (found,) = json.loads(invoke(one, two, "--json", "--words", tmp_path / "words.json").stdout)
    values = {entry["key"]: (entry["first"], entry["second"]) for entry in found["metrics"]}
    assert values["caption.chair_i"] == (0.0, 0.5) and values["caption.recall"] == (1.0, 1.0)
    assert invoke(one, two).exit_code == 2  # "cat" is no object of the rendered world


def test_the_command_writes_a_page(tmp_path: Path) -> None:
    folders.write(tmp_path / "sweep" / "none", FIRST)
    folders.write(tmp_path / "sweep" / "fastv", SECOND, **METHOD)
    result = invoke(tmp_path / "sweep", "--html", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "fastv(keep=0.5)" in (tmp_path / "page.html").read_text() and "page.html" in result.stdout


def test_exit_codes_tell_mistakes_and_failed_questions(tmp_path: Path) -> None:
    first, second = folders.write(tmp_path / "a", FIRST), folders.write(tmp_path / "b", SECOND, prompt="single_word")
    result = invoke(first, second)
    assert result.exit_code == 2 and "prompt (single_word, in the first bare)" in result.stderr
    assert invoke(first, second, "--force").exit_code == 0
    assert invoke(first).exit_code == 2 and invoke(first, first).exit_code == 2
    assert "needs two runs" in invoke(first, first).stderr
    broken = folders.write(tmp_path / "c", lambda item: None if item.id == "random/1" else "yes")
    result = invoke(first, broken)
    assert result.exit_code == 1 and "1 questions failed" in result.stdout
    half = folders.write(tmp_path / "d", SECOND, questions=40, done=False, **METHOD)
    assert "lacks 4 of 40" in invoke(first, half).stderr and invoke(first, half, "--force").exit_code == 0


def test_comparing_imports_no_torch() -> None:
    import subprocess
    import sys

    code = "import vlmattn.eval.compare, vlmattn.eval.runs, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
