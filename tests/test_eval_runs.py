"""Run folders read back: items, answers, failures, scores and cost, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import folders
import pytest

from vlmattn.errors import DataError
from vlmattn.eval import bench, runs
from vlmattn.eval.items import Item, Said
from vlmattn.eval.records import read_records
from vlmattn.eval.runs import Run


def test_a_run_is_read_back_and_scored_as_it_was(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "run", folders.answering(random_3="no", digits_1="x"))
    run = Run.load(folder)
    assert run.items == folders.ITEMS and run.label == run.identity["spec"] == "none" and run.folder == str(folder)
    assert run.said[0] == Said("random/0", "yes", False, None) and run.failed == {}
    expected = bench.scorer("scenes").score(folders.ITEMS, run.said)
    assert run.score == expected and expected["values"]["random.accuracy"] == pytest.approx(11 / 12)
    assert run.cost["prefill_macs_ratio"] == 0.5 and "peak_memory_bytes" not in run.cost


def test_gold_truncation_margins_and_failures_come_back(tmp_path: Path) -> None:
    items = (
        Item("caption/1", "1.png", "Describe the image.", "a red circle", "caption", {"objects": ["red circle"]}),
        Item("caption/2", "2.png", "Describe the image.", "a red circle", "caption", {"objects": ["red circle"]}),
        Item("random/1", "1.png", "Is there a red circle in the image?", "yes", "random"),
    )
    folder = folders.write(tmp_path / "run", lambda item: None if item.id == "caption/2" else "yes", items=items)
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    lines[0]["truncated"], lines[2]["margin"] = True, 1.5
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "cost.json").write_text('{"peak_memory_bytes": 77}')
    run = Run.load(folder, label="mine")
    assert run.items == items and run.label == "mine"
    assert run.said == (Said("caption/1", "yes", True, None), Said("random/1", "yes", False, 1.5))
    assert run.failed == {"caption/2": "2.png: broken"} and run.score["failed"] == 1
    assert run.score["values"]["caption.truncated"] == 1.0 and run.cost["peak_memory_bytes"] == 77


def test_another_profile_reads_the_same_answers_otherwise(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "run", lambda item: "I see none." if item.group == "random" else item.label)
    assert Run.load(folder).score["values"]["random.accuracy"] == 1.0  # whatever has no "no" is yes
    strict = Run.load(folder, profile="lmms_eval")
    assert strict.scorer.profile == "lmms_eval" and strict.score["values"]["random.accuracy"] == 0.0
    with pytest.raises(DataError, match="strictest"):
        Run.load(folder, profile="strictest")


def test_a_run_of_records_in_memory_and_some_of_its_questions(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "run", folders.answering(random_3="no"))
    whole = Run.load(folder)
    again = Run.of("", read_records(folder), whole.identity, whole.info, whole.scorer, "again")
    assert again.score == whole.score and again.folder == ""
    part = again.only({"random/4", "digits/0", "random/3"})
    assert [item.id for item in part.items] == ["digits/0", "random/3", "random/4"]
    assert part.score["values"]["random.accuracy"] == 0.5 and part.cost["questions"] == 3
    assert again.score == whole.score
    with pytest.raises(DataError, match="again has no record of 1 questions: random/99"):
        again.only(["random/3", "random/99"])


def test_what_is_not_a_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not a run folder: it has no run\.json"):
        Run.load(tmp_path)
    empty = folders.write(tmp_path / "empty", items=())
    with pytest.raises(DataError, match="empty has no records yet; start its `vlmattn eval` command again"):
        Run.load(empty)
    strange = folders.write(tmp_path / "strange", bench="vqa")
    with pytest.raises(DataError, match="'vqa'"):
        Run.load(strange)


def test_an_unfinished_run_is_refused_unless_taken_as_it_is(tmp_path: Path) -> None:
    known = folders.write(tmp_path / "known", questions=40, done=False)
    with pytest.raises(DataError, match=r"known lacks 4 of 40 records; start .* again, or use --force"):
        Run.load(known)
    unknown = folders.write(tmp_path / "unknown", questions=0, done=False)
    with pytest.raises(DataError, match="unknown is not finished"):
        Run.load(unknown)
    assert len(Run.load(known, partial=True).said) == 36
    retried = folders.write(
        tmp_path / "retried", questions=40
    )  # cost.json is of the run before the failed were dropped
    with pytest.raises(DataError, match="lacks 4 of 40"):
        Run.load(retried)


def test_a_sweep_is_its_runs_in_the_order_of_its_table(tmp_path: Path) -> None:
    for name in ("b", "a", "none"):
        folders.write(tmp_path / name)
    assert runs.find(tmp_path / "a") == [(tmp_path / "a", None)]
    assert [path.name for path, _ in runs.find(tmp_path)] == ["none", "a", "b"]
    rows = [{"folder": f"elsewhere/{name}", "label": name.upper()} for name in ("b", "none", "a")]
    rows.insert(1, {"folder": "", "label": "threshold(+0.3)"})
    (tmp_path / "summary.json").write_text(json.dumps({"runs": rows}))
    assert runs.find(tmp_path) == [(tmp_path / "b", "B"), (tmp_path / "none", "NONE"), (tmp_path / "a", "A")]
    (tmp_path / "summary.json").write_text("[1]")
    with pytest.raises(DataError, match=r"summary\.json was not written by vlmattn eval"):
        runs.find(tmp_path)


def test_a_path_without_runs_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere is not a folder; give a run folder or the folder of a sweep"):
        runs.find(tmp_path / "nowhere")
    with pytest.raises(DataError, match="it is not a run, and not a sweep"):
        runs.find(tmp_path)


def test_captions_are_scored_again_with_the_word_table_of_the_run(tmp_path: Path) -> None:
    table = tmp_path / "words.json"
    table.write_text(json.dumps({"classes": {"red circle": ["ball"]}}))
    items = tuple(
        Item(f"caption/{n}", f"{n}.png", "Describe the image.", "", "caption", {"objects": ["red circle"]})
        for n in range(2)
    )
    folder = folders.write(tmp_path / "run", lambda item: "a ball", items=items)
    assert Run.load(folder).tally.values()["caption.recall"] == 0, "the benchmark's own table has no ball"
    described = json.loads((folder / "run.json").read_text())
    described["info"]["words"] = bench.scorer("scenes", words=table).words
    (folder / "run.json").write_text(json.dumps(described))
    run = Run.load(folder)
    assert run.tally.values()["caption.recall"] == 1 and run.scorer.words == str(table)
    table.unlink()
    with pytest.raises(DataError, match=r"words\.json: cannot be read"):
        Run.load(folder)


def test_a_word_table_that_was_changed_is_refused_unless_it_is_named(tmp_path: Path) -> None:
    table = tmp_path / "words.json"
    table.write_text(json.dumps({"classes": {"red circle": ["ball"]}}))
    item = Item("caption/1", "1.png", "Describe the image.", "", "caption", {"objects": ["red circle"]})
    folder = folders.write(tmp_path / "run", lambda item: "a ball", items=(item,))
    described = json.loads((folder / "run.json").read_text())
    described["info"]["words"] = bench.describe_words(bench.scorer("scenes", words=table))
    assert set(described["info"]["words"]) == {"path", "sha256"}
    (folder / "run.json").write_text(json.dumps(described))
    run = Run.load(folder)
    assert run.tally.values()["caption.recall"] == 1 and run.scorer.words == str(table)
    table.write_text(json.dumps({"classes": {"red circle": ["disc"]}}))
    with pytest.raises(DataError, match=r"words\.json was changed after this run .*--words FILE"):
        Run.load(folder)
    assert Run.load(folder, words=table).tally.values()["caption.recall"] == 0
    table.unlink()
    with pytest.raises(DataError, match=r"words\.json cannot be read .*--words FILE"):
        Run.load(folder)
    assert bench.describe_words(bench.scorer("scenes")) == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cost": None}, "record 'popular/0' lacks cost"),
        ({"question": None}, "record 'popular/0' lacks question"),
        ({"text": 3}, "record 'popular/0' has text 3, expected a text"),
        ({"time": [1]}, r"record 'popular/0' has time \[1\], expected an object"),
        ({"status": None}, "record 'popular/0' has status None, expected 'ok' or 'failed'"),
    ],
)
def test_a_record_that_lacks_something_is_named(tmp_path: Path, change: dict, words: str) -> None:
    folder = folders.write(tmp_path / "run")
    path = folder / "records.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1] = {key: value for key, value in (lines[1] | change).items() if value is not None}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=rf"records\.jsonl: {words}"):
        Run.load(folder)


def test_a_cost_that_is_no_object_is_refused(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "run")
    (folder / "cost.json").write_text("[1]")
    with pytest.raises(DataError, match=r"cost\.json holds \[1\], expected a JSON object; delete it and run again"):
        Run.load(folder)
