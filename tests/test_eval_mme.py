"""MME: parsers and scores against what the scorers print, pairing, and what happens to half a pair."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmattn.errors import DataError
from vlmattn.eval.benchmarks import mme, pope
from vlmattn.eval.items import Benchmark, Item, Said

ORACLE = json.loads((Path(__file__).parent / "data" / "mme_oracle.json").read_text())


def subtask(name: str, rows: list[list[str]]) -> tuple[list[Item], list[Said]]:
    items, said = [], []
    for number, (image, gold, response) in enumerate(rows):
        items.append(Item(f"{name}/{number}", image, "?", gold, name))
        said.append(Said(f"{name}/{number}", response))
    return items, said


def oracle(subtasks: tuple[str, ...] = mme.SUBTASKS) -> tuple[list[Item], list[Said]]:
    items, said = [], []
    for name in subtasks:
        rows = ORACLE["existence_rows"] if name == "existence" else ORACLE["every_other_task_rows"]
        more_items, more_said = subtask(name, rows)
        items += more_items
        said += more_said
    return items, said


@pytest.mark.parametrize("profile", mme.PROFILES)
@pytest.mark.parametrize("row", ORACLE["parsed"], ids=lambda row: repr(row["response"]))
def test_oracle_parse(row: dict, profile: str) -> None:
    assert mme.parse(row["response"], profile) == row[profile]


@pytest.mark.parametrize("profile", mme.PROFILES)
def test_oracle_scores(profile: str) -> None:
    values = mme.scorer(profile).score(*oracle())["values"]
    expected = ORACLE["expected"][profile]
    assert values["existence.score"] == pytest.approx(expected["existence"], abs=1e-12)
    assert values["perception"] == pytest.approx(expected["perception"], abs=1e-9)
    assert values["cognition"] == pytest.approx(expected["cognition"], abs=1e-9)
    others = [values[f"{name}.score"] for name in mme.SUBTASKS if name != "existence"]
    assert others == pytest.approx([125.0] * 13)
    assert values["hallucination"] == pytest.approx(values["existence.score"] + 3 * 125)
    if "hallucination_subset" in expected:
        assert values["hallucination"] == pytest.approx(expected["hallucination_subset"], abs=1e-9)


def test_oracle_parts_of_the_official_score() -> None:
    score = mme.scorer().score(*oracle())
    existence = score["groups"]["existence"]
    assert existence["accuracy"] == pytest.approx(5 / 12) and existence["accuracy_plus"] == pytest.approx(1 / 6)
    assert existence["counts"] == {"right": 5, "total": 12, "both": 1, "images": 6, "unparsed": 6}
    assert score["unparsed"] == 6 and score["undefined"] == []


@pytest.mark.parametrize(
    ("text", "official", "lmms_eval", "vlmevalkit", "avisc"),
    [
        (" Yes", "yes", "yes", "yes", "yes"),
        ("nobody", "no", "no", "other", "yes"),
        ("n.", "other", "no", "other", "yes"),
        ("yes\n", "yes", "yes", "yes", "yes"),
        ("no\n", "no", "no", "no", "yes"),
        ("NO", "no", "no", "no", "no"),
        ("There isn't one.", "other", "other", "other", "no"),
        ("Sure. There is no doubt.", "other", "other", "no", "no"),
        ("yes and no", "yes", "yes", "other", "no"),
        ("yes/no", "yes", "yes", "other", "yes"),
        ("yes-or-not", "yes", "yes", "yes", "yes"),
        ("x,y, yes-1", "other", "other", "yes", "yes"),
        ("1,2 yes-1", "other", "other", "other", "yes"),
        ("no.1", "no", "no", "other", "yes"),
        ("yes" + "." * 33, "yes", "yes", "other", "yes"),
    ],
)
def test_edge_cases_of_the_parsers(text: str, official: str, lmms_eval: str, vlmevalkit: str, avisc: str) -> None:
    found = [mme.parse(text, profile) for profile in ("official", "lmms_eval", "vlmevalkit", "avisc")]
    assert found == [official, lmms_eval, vlmevalkit, avisc]


def test_pairs_are_formed_by_image_wherever_the_rows_stand() -> None:
    items, said = subtask("color", [["a", "Yes", "Yes"], ["b", "No", "No"], ["a", "No", "No"], ["b", "Yes", "No"]])
    found = mme.scorer().score(items, reversed(said))["groups"]["color"]
    assert (found["accuracy"], found["accuracy_plus"], found["score"]) == (0.75, 0.5, 125.0)
    assert mme.scorer().score(items[::-1], said)["groups"]["color"] == found


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([["a", "Yes", ""], ["a", "No", ""], ["b", "Yes", ""]], ("image 'b'", "there is 1 (color/2: Yes)")),
        ([["a", "Yes", ""], ["a", "Yes", ""]], ("image 'a'", "there are 2 (color/0: Yes, color/1: Yes)")),
        ([["a", "Yes", ""], ["a", "No", ""], ["a", "No", ""]], ("image 'a'", "there are 3")),
        ([["a", "yes", ""], ["a", "maybe", ""]], ("image 'a'", "color/1: maybe")),
    ],
)
def test_what_is_no_pair_is_named(rows: list[list[str]], words: tuple[str, ...]) -> None:
    with pytest.raises(DataError) as caught:
        mme.scorer().score(*subtask("color", rows))
    assert all(word in str(caught.value) for word in ("subtask 'color'", *words)), str(caught.value)


def test_an_image_of_two_subtasks_is_two_pairs() -> None:
    first, second = (
        subtask("color", [["a", "Yes", "Yes"], ["a", "No", "No"]]),
        subtask("count", [["a", "Yes", "No"], ["a", "No", "No"]]),
    )
    values = mme.scorer().score(first[0] + second[0], first[1] + second[1])["values"]
    assert values["color.score"] == 200 and values["count.score"] == 50
    assert "perception" not in values, "a sum over subtasks of which most are missing"


def test_half_a_pair_that_failed_leaves_acc_plus_alone() -> None:
    items, said = subtask("color", [["a", "Yes", "Yes"], ["a", "No", "No"], ["b", "Yes", "Yes"], ["b", "No", "Yes"]])
    found = mme.scorer().score(items, said[:-1], failed={"color/3"})["groups"]["color"]
    assert found["counts"] == {"right": 3, "total": 3, "both": 1, "images": 1, "unparsed": 0}
    assert found["failed"] == 1
    nothing = mme.scorer().score(items[:2], said[:1], failed={"color/1"})
    assert nothing["undefined"] == ["color.score", "color.accuracy_plus"]


def test_a_limit_does_not_tear_pairs_apart() -> None:
    items, said = oracle(("existence", "color"))
    bench = Benchmark("mme", tuple(items), lambda name: None, mme.scorer(), "0", "made up")  # type: ignore[arg-type, return-value]
    taken = bench.take(3)
    assert [item.id for item in taken] == [f"{name}/{n}" for name in ("existence", "color") for n in range(4)]
    mme.scorer().score(taken, [answer for answer in said if answer.id in {item.id for item in taken}])


def test_unknown_subtask_and_profile_are_refused() -> None:
    with pytest.raises(DataError, match=r"'colour' is not a subtask of MME; did you mean 'color'"):
        mme.scorer().score(*subtask("colour", [["a", "Yes", "Yes"], ["a", "No", "No"]]))
    with pytest.raises(DataError, match="'vcd' is unknown; there are official, lmms_eval, vlmevalkit, avisc"):
        mme.scorer("vcd")


def test_marks_follow_acc_and_the_score_is_no_share() -> None:
    tally = mme.scorer().tally(*oracle(("existence",)))
    assert tally.values()["existence.accuracy"] == pytest.approx(sum(tally.marks.values()) / len(tally.marks))
    assert tally.metric("existence.accuracy").of_marks and not tally.metric("existence.score").of_marks
    assert not tally.metric("existence.score").percent
    assert tally.verdicts["existence/4"] == "other"


def test_whole_leaves_out_what_is_torn_apart_and_nothing_else() -> None:
    items, _ = oracle(("existence", "color"))
    assert mme.scorer().whole(items) == tuple(items)
    left = mme.scorer().whole(items[1:-1])
    assert [item.image for item in items if item not in left] == ["i1", "i1", "j2", "j2"]
    plain = [Item("a", "1.png", "?", "yes", "random")]
    assert pope.scorer().whole(plain) == tuple(plain)
