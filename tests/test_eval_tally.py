"""The one way from answers to numbers: sums per image, formulas of sums, aggregates over groups."""

from __future__ import annotations

import numpy as np
import pytest

from vlmattn.errors import DataError
from vlmattn.eval.items import Item, Said, match
from vlmattn.eval.tally import Aggregate, Formula, Kind, Scorer, ratio, share

EXACT = Kind(
    name="exact",
    columns=("right", "total", "unparsed"),
    count=lambda pairs: (
        sum(answer.text == item.label for item, answer in pairs),
        len(pairs),
        sum(not answer.text for _, answer in pairs),
    ),
    formulas=(Formula("accuracy", "accuracy", share(0, 1), of_marks=True),),
    mark=lambda item, answer: answer.text == item.label,
    verdict=lambda item, answer: answer.text,
)
WORDS = Kind(
    name="words",
    columns=("good", "words"),
    count=lambda pairs: (sum(len(a.text) for _, a in pairs), sum(len(a.text.split()) for _, a in pairs)),
    formulas=(Formula("letters", "letters a word", share(0, 1), better="neither", percent=False),),
    mark=lambda item, answer: None,
    verdict=lambda item, answer: answer.text,
)


def kind(group: str) -> Kind:
    return WORDS if group == "free" else EXACT


SCORER = Scorer(
    "toy",
    "plain",
    kind,
    aggregates=(
        Aggregate("mean_accuracy", "accuracy", "exact", "accuracy"),
        Aggregate("sum_accuracy", "sum", "exact", "accuracy", how="sum"),
        Aggregate("pooled_accuracy", "pooled", "exact", "accuracy", how="pool"),
        Aggregate("only_b", "b", "exact", "accuracy", groups=("b",)),
        Aggregate("absent", "absent", "box", "iou"),
    ),
)
ITEMS = (
    Item("a/1", "one.png", "?", "x", "a"),
    Item("a/2", "one.png", "?", "x", "a"),
    Item("a/3", "two.png", "?", "x", "a"),
    Item("b/1", "two.png", "?", "y", "b"),
    Item("free/1", "three.png", "?", "", "free"),
)
SAID = (Said("a/1", "x"), Said("a/2", "z"), Said("a/3", "x"), Said("b/1", ""), Said("free/1", "two words"))


def test_sums_are_per_image_and_per_group() -> None:
    tally = SCORER.tally(ITEMS, SAID)
    assert tally.images == ("one.png", "two.png", "three.png")
    assert tally.columns == (
        "a.right",
        "a.total",
        "a.unparsed",
        "b.right",
        "b.total",
        "b.unparsed",
        "free.good",
        "free.words",
    )
    assert tally.sums.tolist() == [[1, 2, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 9, 2]]
    assert tally.marks == {"a/1": True, "a/2": False, "a/3": True, "b/1": False}
    assert tally.verdicts["free/1"] == "two words" and tally.groups["b/1"] == "b"


def test_aggregates_mean_sum_pool_and_chosen_groups() -> None:
    values = SCORER.tally(ITEMS, SAID).values()
    assert values["a.accuracy"] == pytest.approx(2 / 3) and values["b.accuracy"] == 0
    assert values["mean_accuracy"] == pytest.approx(1 / 3)
    assert values["sum_accuracy"] == pytest.approx(2 / 3)
    assert values["pooled_accuracy"] == pytest.approx(2 / 4)
    assert values["only_b"] == 0
    assert values["free.letters"] == 4.5
    assert "absent" not in values, "an aggregate whose kind does not occur is left out"


def test_a_metric_is_about_the_images_of_its_groups() -> None:
    found = SCORER.tally(ITEMS, SAID).images_of()
    assert (found["a.accuracy"], found["b.accuracy"], found["mean_accuracy"], found["free.letters"]) == (2, 1, 2, 1)


def test_the_order_of_the_answers_does_not_matter_and_sums_add_up() -> None:
    forward, backward = SCORER.tally(ITEMS, SAID), SCORER.tally(ITEMS, SAID[::-1])
    assert np.array_equal(forward.sums, backward.sums) and forward.marks == backward.marks
    parts = []
    for image in forward.images:
        items = [item for item in ITEMS if item.image == image]
        ids = {item.id for item in items}
        parts.append(SCORER.tally(items, [answer for answer in SAID if answer.id in ids]))
    for column, whole in zip(forward.columns, forward.sums.sum(axis=0), strict=True):
        found = (part.sums[:, part.columns.index(column)].sum() for part in parts if column in part.columns)
        assert sum(found) == whole


def test_failed_items_are_left_out_and_counted() -> None:
    score = SCORER.score(ITEMS, SAID[1:], failed=("a/1",))
    assert score["groups"]["a"]["counts"] == {"right": 1, "total": 2, "unparsed": 0}
    assert score["groups"]["a"]["failed"] == 1 == score["failed"]
    assert score["unparsed"] == 1 and score["profile"] == "plain"


def test_a_zero_denominator_is_zero_and_flagged_and_strict_raises() -> None:
    every = {item.id for item in ITEMS if item.group == "b"}
    said = [answer for answer in SAID if answer.id not in every]
    score = SCORER.score(ITEMS, said, failed=every)
    assert score["values"]["b.accuracy"] == 0 and "b.accuracy" in score["undefined"]
    assert score["values"]["mean_accuracy"] == pytest.approx(1 / 3), "an empty group counts as 0 in a mean"
    with pytest.raises(ZeroDivisionError, match=r"b\.accuracy"):
        SCORER.score(ITEMS, said, failed=every, strict=True)


def test_headlines_are_the_aggregates_and_what_no_aggregate_covers() -> None:
    shown = [metric.key for metric in SCORER.tally(ITEMS, SAID).metrics if metric.headline]
    assert shown == ["mean_accuracy", "sum_accuracy", "pooled_accuracy", "only_b", "free.letters"]
    chosen = Scorer("toy", "plain", kind, SCORER.aggregates, headlines=("a.accuracy", "mean_accuracy"))
    assert [m.key for m in chosen.tally(ITEMS, SAID).metrics if m.headline] == ["mean_accuracy", "a.accuracy"]


def test_metrics_work_on_any_number_of_resamples_at_once() -> None:
    tally = SCORER.tally(ITEMS, SAID)
    many = np.stack([tally.sums.sum(axis=0), np.zeros(len(tally.columns))])
    for metric in tally.metrics:
        assert metric.of(many).shape == (2,)
        assert metric.of(many)[0] == pytest.approx(tally.values()[metric.key])
        assert metric.of(many)[1] == 0
    with pytest.raises(KeyError, match="mean_accuracy"):
        tally.metric("nonsense")


@pytest.mark.parametrize(
    ("said", "what"),
    [
        (SAID[1:], "1 without an answer (a/1)"),
        ((*SAID, SAID[0]), "1 answered twice (a/1)"),
        ((*SAID, Said("q/9", "")), "1 not in the benchmark (q/9)"),
    ],
)
def test_answers_that_do_not_fit_are_named(said: tuple[Said, ...], what: str) -> None:
    with pytest.raises(DataError) as error:
        match(ITEMS, said)
    assert what in str(error.value)


def test_two_items_with_one_id_are_named() -> None:
    with pytest.raises(DataError, match=r"1 asked twice \(a/1\)"):
        match((*ITEMS, ITEMS[0]), SAID)


def test_ratio_is_nan_where_nothing_is_counted() -> None:
    found = ratio(np.array([1.0, 0.0]), np.array([2.0, 0.0]))
    assert found[0] == 0.5 and np.isnan(found[1])
    assert float(ratio(np.float64(3), np.float64(4))) == 0.75
