"""POPE: parsers and metrics against what the scorers print, matching by id, and the loader's errors."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmattn.errors import DataError
from vlmattn.eval.benchmarks import pope
from vlmattn.eval.items import Item, Said

ORACLE = json.loads((Path(__file__).parent / "data" / "pope_oracle.json").read_text())


def oracle_items(category: str = "random") -> list[Item]:
    return [
        Item(f"{category}/{row['id']}", f"{row['id']}.png", "Is there a dog in the image?", row["label"], category)
        for row in ORACLE["items"]
    ]


def oracle_answers(category: str = "random") -> list[Said]:
    return [Said(f"{category}/{row['id']}", row["answer"]) for row in ORACLE["items"]]


@pytest.mark.parametrize("profile", ["official", "lmms_eval"])
@pytest.mark.parametrize("row", ORACLE["items"], ids=lambda row: f"row{row['id']}")
def test_pope_oracle_parse(row: dict, profile: str) -> None:
    assert pope.parse(row["answer"], profile) == row[profile]


def random_group(items: list[Item], said: list[Said], profile: str = "official", **more: Any) -> dict[str, Any]:
    return pope.scorer(profile).score(items, said, **more)["groups"]["random"]


def test_pope_oracle_metrics_official() -> None:
    found = random_group(oracle_items(), oracle_answers())
    expected = ORACLE["expected"]["official"]
    assert [found["counts"][name] for name in ("tp", "fp", "tn", "fn")] == [
        expected[name] for name in ("TP", "FP", "TN", "FN")
    ]
    assert found["counts"]["total"] == expected["counted"]
    for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        assert found[name] == pytest.approx(expected[name], abs=1e-12)


def test_pope_oracle_metrics_lmms_eval() -> None:
    score = pope.scorer("lmms_eval").score(oracle_items(), oracle_answers())
    found, expected = score["groups"]["random"], ORACLE["expected"]["lmms_eval"]
    for name in ("accuracy", "precision", "recall", "f1"):
        assert found[name] == pytest.approx(expected[name], abs=1e-12)
    assert found["gold_yes_ratio"] == pytest.approx(expected["yes_ratio_as_printed"])
    assert found["yes_ratio"] == pytest.approx(2 / 20)
    assert score["unparsed"] == sum(row["lmms_eval"] == "other" for row in ORACLE["items"])
    assert found["counts"]["unparsed"] == found["counts"]["other_yes"] + found["counts"]["other_no"]


@pytest.mark.parametrize("row", ORACLE["regression_counts"], ids=lambda row: row["what"])
def test_pope_oracle_regression_counts(row: dict) -> None:
    sums = dict.fromkeys(pope.COLUMNS, 0.0) | {name: row[name.upper()] for name in ("tp", "fp", "tn", "fn")}
    sums["total"] = sum(sums.values())
    column = np.array(list(sums.values()))
    for name in {"accuracy", "precision", "recall", "f1", "yes_ratio"} & set(row):
        assert pope.kind().formula(name).of(column) == pytest.approx(row[name], abs=1e-12)


def test_three_categories_give_means_and_pooled_numbers() -> None:
    items = oracle_items("random") + oracle_items("popular")[:6]
    tally = pope.scorer().tally(items, oracle_answers("random") + oracle_answers("popular")[:6])
    values = tally.values()
    for name in ("f1", "accuracy"):
        assert values[f"mean_{name}"] == pytest.approx((values[f"random.{name}"] + values[f"popular.{name}"]) / 2)
    assert values["pooled_f1"] != pytest.approx(values["mean_f1"])
    both = tally.sums.sum(axis=0).reshape(2, -1).sum(axis=0)
    assert both[-1] == 26
    assert values["pooled_f1"] == pytest.approx(2 * both[0] / (2 * both[0] + both[1] + both[3]))
    assert [metric.key for metric in tally.metrics if metric.headline] == ["mean_f1", "mean_accuracy"]


def test_zero_denominators_are_flagged_and_strict_raises() -> None:
    items, said = oracle_items()[:3], [Said(f"random/{number}", "No") for number in (1, 2, 3)]
    found = pope.scorer().score(items, said)
    assert found["groups"]["random"]["precision"] == 0.0
    assert {"random.precision", "random.f1"} <= set(found["undefined"])
    assert not {"random.accuracy", "random.recall", "mean_f1"} & set(found["undefined"])
    with pytest.raises(ZeroDivisionError, match=r"random\.precision"):
        pope.scorer().score(items, said, strict=True)


def test_f1_is_undefined_where_precision_and_recall_are_both_zero_as_in_the_paper_s_script() -> None:
    items = [Item("a", "1.png", "?", "yes", "random"), Item("b", "1.png", "?", "no", "random")]
    found = pope.scorer().score(items, [Said("a", "No"), Said("b", "Yes")])
    assert found["groups"]["random"]["precision"] == found["groups"]["random"]["recall"] == 0.0
    assert "random.f1" in found["undefined"] and "random.precision" not in found["undefined"]


def test_answers_in_any_order_are_matched_by_id() -> None:
    score = pope.scorer().score
    assert score(oracle_items(), reversed(oracle_answers())) == score(oracle_items(), oracle_answers())


def test_marks_and_verdicts_are_what_was_counted() -> None:
    for profile in pope.PROFILES:
        tally = pope.scorer(profile).tally(oracle_items(), oracle_answers())
        assert tally.verdicts == {f"random/{row['id']}": row[profile] for row in ORACLE["items"]}
        assert tally.values()["random.accuracy"] == pytest.approx(sum(tally.marks.values()) / 20)


def test_missing_duplicate_and_strange_ids_are_listed() -> None:
    said = [*oracle_answers()[2:], Said("random/5", "yes"), Said("random/99", "yes")]
    with pytest.raises(DataError) as caught:
        pope.scorer().score(oracle_items(), said)
    for text in ("random/1, random/2", "answered twice (random/5)", "not in the benchmark (random/99)"):
        assert text in str(caught.value)


def test_a_gold_label_that_is_neither_is_named_and_capitals_are_taken() -> None:
    first, *others = oracle_items()
    with pytest.raises(DataError, match=r"item random/1 \(image 1\.png\): the label 'maybe' is neither 'yes' nor 'no'"):
        pope.scorer().tally([replace(first, label="maybe"), *others], oracle_answers())
    plain, capital = (
        pope.scorer().tally([replace(item, label=write(item.label)) for item in oracle_items()], oracle_answers())
        for write in (str.lower, str.title)
    )
    assert plain.values() == capital.values() and plain.marks == capital.marks


def test_failed_items_are_left_out_and_counted() -> None:
    found = random_group(oracle_items(), oracle_answers()[1:], failed={"random/1"})
    assert found["failed"] == 1
    assert found["counts"]["total"] == 19


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(DataError, match="profile 'strict' is unknown; there are official, lmms_eval"):
        pope.scorer("strict")


def test_official_has_no_third_outcome_but_counts_what_it_did_not_understand() -> None:
    assert pope.is_unparsed("") and pope.is_unparsed("There isn't a car in the image.") and pope.is_unparsed("NO")
    assert not pope.is_unparsed("Yes, there is.") and not pope.is_unparsed("no, none") and not pope.is_unparsed("YES")


def test_prompts() -> None:
    assert pope.prompt("Is there a dog?", "bare") == "Is there a dog?"
    assert (
        pope.prompt("Is there a dog?", "single_word")
        == "Is there a dog?\nAnswer the question using a single word or phrase."
    )
    with pytest.raises(DataError, match="bare, single_word"):
        pope.prompt("Is there a dog?", "vicuna")


ROW = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"}


def write_files(folder: Path, rows: dict[str, str] | None = None) -> Path:
    for category in pope.CATEGORIES:
        text = (rows or {}).get(
            category, json.dumps(ROW) + "\n" + json.dumps(ROW | {"question_id": 7, "label": "no"}) + "\n"
        )
        (folder / f"coco_pope_{category}.json").write_text(text)
    return folder


def test_loader_reads_three_files_and_hashes_them(tmp_path: Path) -> None:
    items, hashes = pope.load(write_files(tmp_path))
    assert [item.id for item in items[:3]] == ["random/1", "random/7", "popular/1"]
    assert asdict(items[1]) == {
        "id": "random/7",
        "image": "a.jpg",
        "question": ROW["text"],
        "label": "no",
        "group": "random",
        "gold": {},
    }
    assert set(hashes) == {f"coco_pope_{name}.json" for name in pope.CATEGORIES}
    assert all(len(digest) == 64 for digest in hashes.values())
    assert "not the current files" in pope.version(hashes)
    assert "109985c" in pope.version(dict(zip("abc", pope.CURRENT_FILES.values())))


def test_capital_labels_in_a_file_are_read(tmp_path: Path) -> None:
    rows = json.dumps(ROW | {"label": "Yes"}) + "\n" + json.dumps(ROW | {"question_id": 2, "label": "NO"}) + "\n"
    items, _ = pope.load(write_files(tmp_path, {"random": rows}))
    assert [item.label for item in items[:2]] == ["yes", "no"]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({**ROW, "label": "maybe"}, "field 'label': 'maybe' is neither 'yes' nor 'no'"),
        ({key: value for key, value in ROW.items() if key != "image"}, "field 'image': missing"),
        ({**ROW, "text": 5}, "field 'text': expected a text"),
        ({**ROW, "question_id": None}, "field 'question_id'"),
        ({**ROW, "question_id": True}, "field 'question_id'"),
        ({**ROW, "image": ""}, "field 'image'"),
        ([1], "expected a JSON object, found list"),
    ],
)
def test_schema_errors_name_file_line_and_field(tmp_path: Path, row: object, field: str) -> None:
    write_files(tmp_path, {"popular": json.dumps(ROW | {"question_id": 3}) + "\n\n" + json.dumps(row) + "\n"})
    with pytest.raises(DataError) as caught:
        pope.load(tmp_path)
    assert "coco_pope_popular.json, line 3" in str(caught.value)
    assert field in str(caught.value)


def test_broken_json_repeated_id_empty_missing_and_double_files(tmp_path: Path) -> None:
    def fails(rows: dict[str, str], *words: str) -> None:
        with pytest.raises(DataError) as caught:
            pope.load(write_files(tmp_path, rows))
        assert all(word in str(caught.value) for word in words), str(caught.value)

    fails({"random": '{"question_id": 1,\n'}, "coco_pope_random.json, line 1", "not JSON")
    fails({"random": f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n"}, "line 2", "already used in line 1")
    fails({"random": "\n"}, "has no rows")
    write_files(tmp_path)
    (tmp_path / "gqa_pope_random.json").write_text("{}")
    with pytest.raises(DataError, match="2 POPE files for 'random'"):
        pope.load(tmp_path)
    for path in tmp_path.glob("*random.json"):
        path.unlink()
    with pytest.raises(DataError, match=r"wanted coco_pope_random\.json.*github\.com/RUCAIBox/POPE"):
        pope.load(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        pope.load(tmp_path / "nowhere")
