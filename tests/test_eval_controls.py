"""Controls: rows at the same layer, a threshold tuned on other images, collapsed captions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmattn import spec
from vlmattn.errors import DataError
from vlmattn.eval import controls
from vlmattn.eval.benchmarks import pope
from vlmattn.eval.items import Item, Said
from vlmattn.eval.runs import Run
from vlmattn.eval.tally import Aggregate, Formula, Kind, Scorer, Tally, share


def plain(text: str) -> Kind:
    """Answers that are right if they are the label."""
    return Kind(
        name=text,
        columns=("right", "total"),
        count=lambda pairs: (sum(said.text == item.label for item, said in pairs), len(pairs)),
        formulas=(Formula("accuracy", "accuracy", share(0, 1), of_marks=True),),
        mark=lambda item, said: said.text == item.label,
        verdict=lambda item, said: said.text,
    )


SCORER = Scorer(
    "toy",
    "official",
    lambda group: plain("exact") if group == "digits" else pope.kind("official"),
    (Aggregate("mean_accuracy", "accuracy", "yes_no", "accuracy"),),
)
# (id, group, label, margin): the model says no too often, and the lowest cut that is best lies between -2 and -1.
TUNED = (
    ("a/1", "a", "yes", -1.0),
    ("a/2", "a", "yes", 2.0),
    ("a/3", "a", "no", -3.0),
    ("b/1", "b", "yes", -0.5),
    ("b/2", "b", "no", -2.0),
)
DEEP, SHALLOW = {"num_layers": 32, "visual_tokens": 576}, {"num_layers": 4, "visual_tokens": 576}
TESTED = (("a/1", "a", "yes", -1.4), ("a/2", "a", "no", -1.6), ("b/1", "b", "no", 0.25), ("b/2", "b", "yes", 3.0))


def run(rows: Any, split: str = "test", label: str = "none", **identity: Any) -> Run:
    """A run whose texts are what the margins say, with one question of another kind."""
    records: list[dict[str, Any]] = [
        {
            "id": key,
            "image": f"{key[-1]}.png",
            "group": group,
            "question": "?",
            "label": gold,
            "status": "ok",
            "text": "Yes, there is." if margin > 0 else "No, there is none.",
            "margin": margin,
        }
        for key, group, gold, margin in rows
    ]
    records.append(
        {**records[0], "id": "digits/1", "group": "digits", "label": "7", "text": "7"} | {"margin": None, "image": "d"}
    )
    found = {"spec": "none", "model": {"name": "m"}, "prompt": "bare", "data": {"sha256": split}} | identity
    return Run.of("runs/none", records, found, {"pictures": {"scenes": split}}, SCORER, label)


def test_the_threshold_is_the_one_that_is_best_on_the_validation_images() -> None:
    base, validation = run(TESTED), run(TUNED, "val")
    assert base.tally.values()["mean_accuracy"] == 0.5
    control = controls.threshold(base, validation)
    moved = control.run
    assert control.bias == 1.5  # the middle of -2 (no) and -1 (yes)
    assert moved.label == "threshold(logit +1.5)" and moved.folder == ""
    assert control.images == 3 and control.note == "tuned on 3 validation images"  # of five questions
    assert [answer.text for answer in moved.said] == ["Yes", "No", "Yes", "Yes", "7"]
    assert moved.tally.values()["mean_accuracy"] == 0.75
    assert {key: value for key, value in moved.records[0].items() if key != "text"} == {
        key: value for key, value in base.records[0].items() if key != "text"
    }
    assert moved.records[-1] == base.records[-1]
    assert base.said[0].text == "No, there is none."


def test_without_a_bias_the_answers_are_the_models_own() -> None:
    good = tuple((key, group, gold, 1.0 if gold == "yes" else -1.0) for key, group, gold, _ in TUNED)
    base = run(TESTED)
    control = controls.threshold(base, run(good, "val"))
    assert control.bias == 0 and control.run.label == "threshold(logit +0)"
    assert control.run.tally.verdicts == base.tally.verdicts


def test_groups_count_alike_however_many_questions_they_have() -> None:
    margins = [-1.0] * 10 + [-1.0, -3.0]
    gold = [False] * 10 + [True, False]
    assert controls.best_bias(margins, gold, ["a"] * 12) == 0
    assert controls.best_bias(margins, gold, ["a"] * 10 + ["b"] * 2) == 0  # 1 and 1/2 against 0 and 1
    gold[:6] = [True] * 6
    assert controls.best_bias(margins, gold, ["a"] * 10 + ["b"] * 2) == 2


def test_equally_good_thresholds_end_with_the_smallest_change() -> None:
    assert controls.best_bias([-4.0, 1.0], [False, True], ["a", "a"]) == 0
    assert controls.best_bias([-4.0, -2.0, 3.0, 5.0], [True, False, True, False], ["a"] * 4) == 0
    assert controls.best_bias([-4.0, -2.0, -1.0], [False, True, True], ["a"] * 3) == 3
    assert controls.best_bias([2.0, 3.0], [False, False], ["a", "a"]) == -4
    assert controls.best_bias([-2.0, -3.0], [True, True], ["a", "a"]) == 4


def test_the_best_bias_is_what_trying_all_of_them_finds() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        count = int(draw.integers(2, 30))
        margins = np.round(draw.normal(size=count), 1)  # with ties
        gold, groups = draw.integers(0, 2, count) > 0, draw.choice(["a", "b", "c"], count)

        def accuracy(bias: float) -> float:
            right = (margins + bias > 0) == gold  # noqa: B023
            return float(np.mean([right[groups == name].mean() for name in set(groups)]))  # noqa: B023

        tried = max(accuracy(bias) for bias in np.arange(-5, 5, 0.05))
        assert accuracy(controls.best_bias(margins, gold, list(groups))) == pytest.approx(tried)


def test_a_threshold_needs_margins_and_other_images_of_the_same_model() -> None:
    base, validation = run(TESTED), run(TUNED, "val")
    with pytest.raises(DataError, match="tuned on the images it is tested on"):
        controls.threshold(base, run(TUNED, "test"))
    other = dataclasses.replace(validation, info={"pictures": {"scenes": "test"}})
    with pytest.raises(DataError, match="tuned on the images it is tested on"):
        controls.threshold(base, other)
    with pytest.raises(DataError, match="another spec: 'fastv'"):
        controls.threshold(base, run(TUNED, "val", spec="fastv"))
    for lacking in (base, validation):
        records = [{key: value for key, value in record.items() if key != "margin"} for record in lacking.records]
        bare = dataclasses.replace(lacking, records=records)
        with pytest.raises(DataError, match=r"yes/no answers of none have no margin \(a/1, .*run it again"):
            controls.threshold(*((bare, validation) if lacking is base else (base, bare)))
    with pytest.raises(DataError, match="no answers to yes/no questions"):
        controls.threshold(base.only({"digits/1"}), validation)


def test_failed_questions_stay_failed() -> None:
    base = run(TESTED)
    lost = {key: value for key, value in base.records[1].items() if key not in ("text", "margin")}
    base = dataclasses.replace(base, records=[base.records[0], lost | {"status": "failed"}, *base.records[2:]])
    assert list(controls.threshold(base, run(TUNED, "val")).run.failed) == ["a/2"]


def test_only_images_that_were_answered_count_as_tuned_on() -> None:
    validation = run(TUNED, "val")
    lost = {key: value for key, value in validation.records[2].items() if key not in ("text", "margin")}
    records = [*validation.records[:2], lost | {"status": "failed"}, *validation.records[3:]]
    control = controls.threshold(run(TESTED), dataclasses.replace(validation, records=records))
    assert control.images == 2
    single = dataclasses.replace(validation, records=validation.records[:1])
    assert controls.threshold(run(TESTED), single).note == "tuned on 1 validation image"


def captions(texts: list[tuple[int, int, int]]) -> Tally:
    """A tally of captions given as (words, 4-grams, repeated 4-grams)."""
    kind = Kind(
        name="caption",
        columns=("words", "total", "grams", "repeated"),
        count=lambda pairs: np.sum([[n, 1, g, r] for n, g, r in (map(int, s.text.split()) for _, s in pairs)], axis=0),
        formulas=(
            Formula("length", "length", share(0, 1), "neither", percent=False),
            Formula("repeated_4", "repeated 4-grams", share(3, 2), "lower"),
        ),
        mark=lambda item, said: None,
        verdict=lambda item, said: said.text,
    )
    items = [Item(f"caption/{number}", f"{number}.png", "?", "", "caption") for number in range(len(texts))]
    said = [Said(item.id, " ".join(map(str, text))) for item, text in zip(items, texts)]
    return Scorer("toy", "official", lambda group: kind).tally(items, said)


@pytest.mark.parametrize(
    "base, other, reason",
    [
        ((40, 1000, 20), (40, 1000, 60), ""),  # three times, not over
        ((40, 1000, 20), (40, 1000, 61), "caption: 6.1% of 4-grams repeated, 2.0% in the baseline"),
        ((40, 1000, 0), (40, 1000, 20), ""),  # 2 % is never a collapse
        ((40, 1000, 0), (40, 1000, 21), "caption: 2.1% of 4-grams repeated, 0.0% in the baseline"),
        ((40, 1000, 0), (50, 1000, 0), ""),
        ((40, 1000, 0), (30, 1000, 0), ""),
        ((40, 1000, 0), (52, 1000, 0), "caption: mean length 52.0 words, 40.0 in the baseline (+30%)"),
        ((40, 1000, 0), (29, 1000, 0), "caption: mean length 29.0 words, 40.0 in the baseline (-28%)"),
        ((40, 1000, 0), (3, 0, 0), "caption: mean length 3.0 words, 40.0 in the baseline (-92%)"),
        ((0, 0, 0), (5, 2, 0), "caption: mean length 5.0 words, 0.0 in the baseline"),
        ((0, 0, 0), (0, 0, 0), ""),
    ],
)
def test_collapsed_captions_are_told(base: Any, other: Any, reason: str) -> None:
    assert controls.collapse(captions([base]), captions([other])).get("caption", "") == reason


def test_both_signs_of_a_collapse_are_told_and_other_kinds_have_none() -> None:
    reason = controls.collapse(captions([(40, 1000, 0)] * 2), captions([(90, 1000, 500)] * 2))["caption"]
    assert "mean length 90.0" in reason and "; " in reason and "50.0% of 4-grams" in reason
    assert controls.collapse(run(TESTED).tally, run(TUNED).tally) == {}


def test_the_guard_reads_the_columns_of_the_caption_benchmark() -> None:
    from vlmattn.eval.benchmarks import chair

    names = {formula.name for formula in chair.FORMULAS}
    assert {controls.REPEATED, controls.LENGTH} <= names


def test_every_pruner_gets_random_and_no_image_at_its_layer() -> None:
    found = controls.specs_for(["none", "fastv(keep=0.25)", "uniform(keep=64)", "vhr"], **DEEP)
    assert list(found) == [
        "random(keep=0.25, before_layer=2)",
        "random(keep=64, before_layer=0)",
        "noimage(before_layer=2)",
        "noimage",
    ]
    assert list(controls.specs_for(["fastv(keep=0.25)"], **SHALLOW, seeds=2)) == [
        "random(keep=0.25, before_layer=1)",
        "random(keep=0.25, before_layer=1, seed=1)",
        "noimage(before_layer=1)",
        "noimage",
    ]
    scoped = controls.specs_for(["fastv(keep=9, budget_scope=sample) + var"], **SHALLOW)
    assert next(iter(scoped)) == "random(keep=9, before_layer=1, budget_scope=sample)"


def test_labels_tell_budget_and_layer_even_where_they_are_the_default() -> None:
    found = controls.specs_for(["fastv", "uniform"], **DEEP)
    assert found["random(before_layer=2)"] == "random(keep=0.5, before_layer=2)"
    assert found["noimage"] == "noimage(before_layer=0)"
    assert all(spec.text(spec.parse(label)) == text for text, label in found.items())


def test_what_runs_already_is_not_run_twice() -> None:
    methods = ["fastv(keep=0.25)", "fastv(keep=0.25, query=all)", "random(keep=0.25, before_layer=2)", "noimage"]
    assert list(controls.specs_for(methods, **DEEP)) == ["noimage(before_layer=2)"]
    assert list(controls.specs_for(["uniform", "random"], **DEEP)) == ["noimage"]  # random's layer is 0
    assert list(controls.specs_for(["noimage(before_layer=3)", "fastv(keep=1.0)"], **DEEP)) == ["noimage"]


@pytest.mark.parametrize("specs", [["none"], ["var"], ["fastv"], ["uniform", "fastv"], ["fastv + var", "vhr"]])
def test_the_blind_row_is_always_there_once_and_says_its_layer(specs: list[str]) -> None:
    found = list(controls.specs_for(specs, **DEEP).items())
    assert found[-1] == ("noimage", "noimage(before_layer=0)")
    assert sum(label == "noimage(before_layer=0)" for _, label in found) == 1
    assert "noimage" not in controls.specs_for([*specs, "noimage"], **DEEP)


def test_several_pruners_have_one_control_with_as_many_stages() -> None:
    found = controls.specs_for(["fastv(keep=0.6) + uniform(keep=16, before_layer=3)"], **SHALLOW)
    assert list(found) == [
        "random(keep=0.6, before_layer=1) + random(keep=16, before_layer=3)",
        "noimage(before_layer=1)",
        "noimage",
    ]


def test_margins_of_the_embedded_model_say_what_it_answered(tmp_path: Path) -> None:
    from vlmattn.eval import bench, models, runner
    from vlmattn.scenes import names

    world = models.world(names()[0])
    asked = bench.load("scenes", embedded=True, scenes_count=6, tasks=["random", "adversarial"], world=world)
    settings = runner.Settings(batch_size=12, max_new_tokens=4, threshold=True)
    rows = runner.sweep(models.load(names()[0]), asked, {"none": "none"}, tmp_path, settings)
    base, tuned = Run.load(tmp_path / "none"), rows[-1]
    margins = {answer.id: answer.margin for answer in base.said}
    assert base.tally.verdicts == {key: "yes" if (margin or 0) > 0 else "no" for key, margin in margins.items()}
    assert tuned.role == "control" and tuned.label.startswith("threshold(logit ") and tuned.cost == rows[0].cost
    assert tuned.note.startswith("tuned on 6 validation images")
    assert tuned.versus["mean_accuracy"].first == rows[0].value("mean_accuracy")


MULTI = [
    "feather(before_layer=(2, 4))",
    "pyramiddrop(before_layer=(2, 3, 4))",
    "pyramiddrop(ratios=[0.7, 0.4, 0.1], before_layer=(1, 3, 4))",
    "schedule(keep=0.25)",
    "schedule(shares=[1.0, 0.5, 0.5, 0.2, 0.1, 0.1])",
    "sparsevlm",
    "vflowopt(keep=0.3)",
    "pool(size=2)",
    "oraclebox(box=(0.0, 0.0, 0.5, 0.25))",
]


@pytest.mark.parametrize("text", MULTI)
def test_the_random_row_has_the_average_of_the_method_from_its_first_layer_on(text: str) -> None:
    label, *_ = controls.specs_for([text], num_layers=6, visual_tokens=144).values()
    (method,), (control,) = spec.parse(text), spec.parse(label)
    layer = method.resolve_layer(6)
    assert control.name == "random" and control.before_layer == layer
    expected, random = method.expected_tokens(144, 6), control.expected_tokens(144, 6)
    assert expected[:layer] == random[:layer] == [144] * layer
    assert abs(sum(expected) - sum(random)) <= (6 - layer) / 2  # whole tokens in every layer


@pytest.mark.parametrize("text", ["fastv(keep=0.25)", "visionzip", "dart", "prumerge(keep=40)", "cdpruner(keep=200)"])
def test_a_single_stage_keeps_its_own_budget(text: str) -> None:
    (method,) = spec.parse(text)
    label, *_ = controls.specs_for([text], num_layers=6, visual_tokens=144).values()
    assert label == f"random(keep={method.keep!r}, before_layer={method.resolve_layer(6)})"


@pytest.mark.parametrize(
    "text",
    [
        "prumerge",  # how many tokens stay depends on the image
        "recoverable",
        "oraclebox(box=(0.0, 0.0, 1.0, 0.99))",  # every token
        "pyramiddrop + uniform(keep=0.5, before_layer=5)",  # what both together leave is not told
    ],
)
def test_without_a_known_average_there_is_no_random_row(text: str) -> None:
    found = controls.specs_for([text], num_layers=6, visual_tokens=144)
    assert not any(label.startswith("random") for label in found)
