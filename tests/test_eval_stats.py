"""Intervals, paired tests and power: against cases with a known answer, and in simulations of clustered answers."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from vlmattn.errors import DataError
from vlmattn.eval import stats
from vlmattn.eval.tally import Formula, Metric, Sums, Tally, ratio, share


def f1(sums: Sums) -> Sums:
    return ratio(2 * sums[..., 0], 2 * sums[..., 0] + sums[..., 1] + sums[..., 2])


def metric(
    key: str, of: Callable[[Sums], Sums], groups: Sequence[str], *, marks: bool = False, shown: bool = False
) -> Metric:
    formula = Formula(key.split(".")[-1], key, of)
    return Metric(
        key=key,
        title=key,
        group=groups[0] if len(groups) == 1 else "",
        groups=tuple(groups),
        headline=shown,
        better=formula.better,
        percent=True,
        of_marks=marks,
        raw=of,
    )


def of_sums(rows: Sums, *metrics: Metric) -> Tally:
    """A tally of numbers about one group, without single answers."""
    images = tuple(f"{number}.png" for number in range(len(rows)))
    ids = {image: "a" for image in images}
    columns = tuple(f"a.{number}" for number in range(np.shape(rows)[1]))
    return Tally(images, columns, np.asarray(rows, float), metrics, ids, {key: key for key in ids}, {}, {})


def of_marks(right: np.ndarray, groups: Sequence[str] = ("a",)) -> Tally:
    """Accuracy per group of (images, groups, questions) booleans, and its mean over groups."""
    images, count, questions = right.shape
    sums = np.stack([right.sum(-1), np.full((images, count), questions)], -1).reshape(images, -1).astype(float)
    ids = {
        f"{group}/{image}/{question}": (group, f"{image}.png", bool(right[image, number, question]))
        for image in range(images)
        for number, group in enumerate(groups)
        for question in range(questions)
    }

    def mean(values: Sums) -> Sums:
        return np.mean([share(2 * number, 2 * number + 1)(values) for number in range(count)], axis=0)

    single = [
        metric(f"{group}.accuracy", share(2 * number, 2 * number + 1), [group], marks=True)
        for number, group in enumerate(groups)
    ]
    return Tally(
        images=tuple(f"{number}.png" for number in range(images)),
        columns=tuple(f"{group}.{column}" for group in groups for column in ("right", "total")),
        sums=sums,
        metrics=(*([metric("mean", mean, groups, marks=True, shown=True)] if count > 1 else []), *single),
        groups={key: entry[0] for key, entry in ids.items()},
        clusters={key: entry[1] for key, entry in ids.items()},
        marks={key: entry[2] for key, entry in ids.items()},
        verdicts={},
    )


def answers(text: str) -> np.ndarray:
    """ "11 0 10" -> three images whose questions were answered so; short ones are filled up with right answers."""
    rows = text.split()
    width = max(map(len, rows))
    return np.array([[[letter == "1" for letter in row.ljust(width, "1")]] for row in rows])


def binomial(lost: int, won: int) -> float:
    """Two-sided exact p of a fair coin, by counting."""
    from math import comb

    count = lost + won
    return min(1.0, 2 * sum(comb(count, k) for k in range(min(lost, won) + 1)) / 2**count)


ACCURACY = metric("a.accuracy", share(0, 1), ["a"])


def test_independent_rows_give_the_binomial_interval() -> None:
    rows = np.array([[1.0, 1.0]] * 80 + [[0.0, 1.0]] * 20)
    low, high = stats.intervals(of_sums(rows, ACCURACY), n_resamples=4000)["a.accuracy"] or (0, 0)
    half = 1.96 * np.sqrt(0.8 * 0.2 / 100)
    assert low == pytest.approx(0.8 - half, abs=0.015)
    assert high == pytest.approx(0.8 + half, abs=0.015)


def test_six_equal_questions_an_image_count_as_one() -> None:
    images = np.array([[6.0, 6.0]] * 40 + [[0.0, 6.0]] * 10)
    rows = np.array([[1.0, 1.0]] * 240 + [[0.0, 1.0]] * 60)
    by_image = stats.intervals(of_sums(images, ACCURACY))["a.accuracy"] or (0, 0)
    by_row = stats.intervals(of_sums(rows, ACCURACY))["a.accuracy"] or (0, 0)
    wider = (by_image[1] - by_image[0]) / (by_row[1] - by_row[0])
    assert wider == pytest.approx(np.sqrt(6), rel=0.15)


def test_the_same_seed_gives_the_same_interval_and_certainty_has_no_width() -> None:
    rows = np.random.default_rng(1).integers(0, 2, (30, 1)) * [[1.0, 0.0]] + [[0.0, 1.0]]
    tally = of_sums(rows, ACCURACY)
    assert stats.intervals(tally, seed=3) == stats.intervals(tally, seed=3) != stats.intervals(tally, seed=4)
    assert stats.intervals(of_sums(np.ones((5, 2)), ACCURACY)) == {"a.accuracy": (1.0, 1.0)}


@pytest.mark.parametrize("answer, ends", [("1", (0.025 ** (1 / 20), 1.0)), ("0", (0.0, 1 - 0.025 ** (1 / 20)))])
def test_all_right_or_all_wrong_is_no_certainty(answer: str, ends: tuple[float, float]) -> None:
    tally = of_marks(np.full((20, 1, 3), answer == "1"))
    found = stats.intervals(tally)
    assert found["a.accuracy"] == pytest.approx(ends), "20 images, however many questions each"


def test_all_metrics_come_from_the_same_resamples() -> None:
    rows = np.random.default_rng(2).poisson(3, (40, 2)) + np.eye(2)[1]
    twice = dataclasses.replace(ACCURACY, key="twice", raw=lambda sums: 2 * ratio(sums[..., 0], sums[..., 1]))
    found = stats.intervals(of_sums(rows, ACCURACY, twice))
    one, two = found["a.accuracy"], found["twice"]
    assert one is not None and two == pytest.approx((2 * one[0], 2 * one[1]))


def test_one_image_has_no_interval_and_a_resample_without_denominator_counts_as_0() -> None:
    assert stats.intervals(of_sums([[1.0, 2.0]], ACCURACY)) == {"a.accuracy": None}  # type: ignore[arg-type]
    rows = np.array([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [2.0, 2.0]])  # a third of the resamples has no answer
    assert stats.intervals(of_sums(rows, ACCURACY)) == {"a.accuracy": (0.0, 1.0)}


def test_intervals_of_a_large_benchmark_are_quick() -> None:
    import time

    rng = np.random.default_rng(0)
    many = [dataclasses.replace(ACCURACY, key=str(n), raw=share(n, 59 - n)) for n in range(30)] * 2
    tally = of_sums(rng.poisson(2.0, (500, 60)) + 1.0, *many)
    stats.intervals(of_sums(np.ones((3, 2)), ACCURACY))  # scipy is imported here
    start = time.perf_counter()
    stats.intervals(tally)
    assert time.perf_counter() - start < 2  # 0.03 s on an idle core


@pytest.mark.parametrize("name", ["accuracy", "F1", "CHAIR_i"])
def test_intervals_cover_the_truth_of_clustered_answers(name: str) -> None:
    rng, images, repeats, hits = np.random.default_rng(7), 120, 500, 0
    for _ in range(repeats):
        p = rng.beta(4, 2, images)  # how easy an image is: its questions share it
        if name == "accuracy":
            rows, of, truth = np.stack([rng.binomial(6, p), np.full(images, 6)], -1), share(0, 1), 4 / 6
        elif name == "F1":
            tp, tn = rng.binomial(3, p), rng.binomial(3, p)
            rows, of, truth = np.stack([tp, 3 - tn, 3 - tp], -1), f1, 2 * 4 / (2 * 4 + 2 + 2)
        else:
            mentions = 1 + rng.poisson(3, images)
            rows, of, truth = np.stack([rng.binomial(mentions, 1 - p), mentions], -1), share(0, 1), 2 / 6
        interval = stats.intervals(of_sums(rows, metric(name, of, ["a"])), n_resamples=1000)[name] or (1, 0)
        hits += interval[0] <= truth <= interval[1]
    assert 0.92 <= hits / repeats <= 0.98


def test_mcnemar_is_the_binomial_test_of_turned_answers() -> None:
    for lost, won in ((0, 0), (0, 5), (3, 9), (7, 7), (40, 20)):
        assert stats.mcnemar(lost, won) == pytest.approx(binomial(lost, won))
    first, second = of_marks(answers("1 1 0 0 0 0 0 0 1 0")), of_marks(answers("0 0 1 1 1 1 1 1 1 1"))
    (found,) = stats.paired(first, second)
    assert found.test == "mcnemar" and found.mcnemar == stats.McNemar(2, 7, found.p or 0)
    assert found.p == pytest.approx(binomial(2, 7)) and found.difference == pytest.approx(0.5)
    (back,) = stats.paired(second, first)
    assert (
        back.difference == -found.difference and back.p == found.p and back.mcnemar == stats.McNemar(7, 2, back.p or 0)
    )


def test_mcnemar_by_image_is_the_same_test_where_an_image_has_one_answer_that_turned() -> None:
    # The last image has one answer won and one lost: single answers count it twice, by image it says nothing.
    first, second = of_marks(answers("1 1 0 0 0 0 0 0 0 01")), of_marks(answers("0 0 1 1 1 1 1 1 1 10"))
    (found,) = stats.paired(first, second)
    assert found.test == "mcnemar, by image" and found.p == pytest.approx(binomial(2, 7))
    assert found.mcnemar is not None and found.mcnemar.p == pytest.approx(binomial(3, 8))


def test_mcnemar_by_image_tries_all_exchanges() -> None:
    first, second = of_marks(answers("000 000 01 0 1 111")), of_marks(answers("111 110 11 1 0 111"))
    net = [3, 2, 1, 1, -1]
    sums = [sum(n * sign for n, sign in zip(net, signs, strict=True)) for signs in itertools.product((1, -1), repeat=5)]
    expected = 2 * sum(value >= sum(net) for value in sums) / 32
    (found,) = stats.paired(first, second)
    assert found.p == pytest.approx(expected) and found.mcnemar is not None and found.mcnemar.p < found.p / 2


def test_answers_that_turned_in_one_image_only_say_nothing() -> None:
    (found,) = stats.paired(of_marks(answers("00 11")), of_marks(answers("11 11")))
    assert found.test == "mcnemar, by image" and found.p == 1.0


def test_a_mean_over_groups_of_unequal_size_is_tested_as_what_it_is() -> None:
    first, second = of_marks(np.zeros((8, 2, 1), bool), ("a", "b")), of_marks(np.ones((8, 2, 1), bool), ("a", "b"))
    drop = [key for key in first.marks if key.startswith("b") and int(key.split("/")[1]) > 1]
    small = [
        dataclasses.replace(
            tally,
            **{
                name: {key: value for key, value in getattr(tally, name).items() if key not in drop}
                for name in ("groups", "clusters", "marks")
            },
            sums=tally.sums * (np.arange(4) < 2) + tally.sums * (np.arange(4) >= 2) * (np.arange(8)[:, None] < 2),
        )
        for tally in (first, second)
    ]
    found = {entry.key: entry for entry in stats.paired(*small)}
    assert found["mean"].test == "mcnemar, by image" and found["a.accuracy"].test == "mcnemar"
    assert found["b.accuracy"].images == 2 and found["mean"].images == 8
    assert found["mean"].p == pytest.approx(2 / 2**8)


def test_equal_runs_differ_by_nothing() -> None:
    tally = of_marks(np.random.default_rng(3).random((20, 2, 3)) < 0.7, ("a", "b"))
    for entry in stats.paired(tally, tally):
        assert (entry.difference, entry.interval, entry.p) == (0.0, (0.0, 0.0), 1.0)
        assert entry.detectable is None and not entry.significant()
    rows = np.random.default_rng(3).poisson(3, (20, 3)) + 1
    ratios = of_sums(rows, metric("a.f1", f1, ["a"]))
    (found,) = stats.paired(ratios, ratios)
    assert (found.test, found.p, found.mcnemar) == ("exchange", 1.0, None)


def test_one_image_is_compared_without_a_test() -> None:
    (found,) = stats.paired(of_marks(answers("10")), of_marks(answers("11")))
    assert found.difference == 0.5 and found.mcnemar == stats.McNemar(0, 1, 1.0)
    assert (found.p, found.interval, found.p_holm, found.test, found.detectable) == (None, None, None, "none", None)


def test_the_order_of_images_and_groups_changes_nothing() -> None:
    rng = np.random.default_rng(4)
    first, second = (of_marks(rng.random((30, 2, 3)) < p, ("a", "b")) for p in (0.6, 0.8))
    rows, columns = rng.permutation(30), [2, 3, 0, 1]
    shuffled = dataclasses.replace(
        second,
        images=tuple(second.images[row] for row in rows),
        columns=tuple(second.columns[column] for column in columns),
        sums=second.sums[np.ix_(rows, columns)],
        metrics=tuple(reversed(second.metrics)),
    )
    assert stats.paired(first, shuffled) == stats.paired(first, second)


def test_different_questions_are_refused() -> None:
    with pytest.raises(DataError, match=r"the same questions.*2 are in one only.*a/2/0, a/2/1.*Run\.only"):
        stats.paired(of_marks(np.ones((2, 1, 2), bool)), of_marks(np.ones((3, 1, 2), bool)))
    rows = np.ones((3, 2))
    with pytest.raises(DataError, match="counted differently"):
        stats.paired(of_sums(rows, ACCURACY), of_sums(rows))


def test_holm_is_monotone_and_equals_the_hand_computation() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.6, 0.5]) == [1.0, 1.0] and stats.holm([]) == [] and stats.holm([0.2]) == [0.2]
    ps = np.random.default_rng(5).random(20).tolist()
    adjusted = stats.holm(ps)
    order = np.argsort(ps)
    assert all(a >= p for a, p in zip(adjusted, ps, strict=True)) and (np.diff(np.array(adjusted)[order]) >= 0).all()


def test_holm_takes_the_headlines_and_then_the_first_numbers_of_the_other_tasks() -> None:
    rng = np.random.default_rng(6)
    first, second = (of_marks(rng.random((40, 3, 1)) < p, ("a", "b", "c")) for p in (0.5, 0.8))
    extra = metric("a.again", share(0, 1), ["a"], marks=True)
    first = dataclasses.replace(first, metrics=(*first.metrics, extra))
    second = dataclasses.replace(second, metrics=first.metrics)
    found = {entry.key: entry for entry in stats.paired(first, second)}
    assert found["a.again"].p == found["a.accuracy"].p and found["a.again"].p_holm is None
    assert not found["a.again"].significant()
    assert found["mean"].headline and found["mean"].p_holm == found["mean"].p
    family = [found[key] for key in ("a.accuracy", "b.accuracy", "c.accuracy")]
    assert [entry.p_holm for entry in family] == stats.holm([entry.p or 0 for entry in family])
    headlines = [dataclasses.replace(entry, headline=entry.key != "c.accuracy") for entry in first.metrics]
    again = stats.paired(*(dataclasses.replace(tally, metrics=tuple(headlines)) for tally in (first, second)))
    shown = [entry for entry in again if entry.headline]
    assert [entry.p_holm for entry in shown] == stats.holm([entry.p or 0 for entry in shown])
    assert len(shown) == 4, "a task's number that is a headline is corrected with the headlines"


def clustered(rng: np.random.Generator, images: int, mean: float, questions: int = 6) -> np.ndarray:
    """Right or wrong, (images, 1, questions): an image is easy or hard for a run as a whole."""
    p = rng.beta(4 * mean, 4 * (1 - mean), images)
    return rng.random((images, 1, questions)) < p[:, None, None]


def test_the_test_of_accuracy_keeps_its_level_where_mcnemar_on_single_answers_does_not() -> None:
    rng, repeats, by_image, single = np.random.default_rng(8), 400, 0, 0
    for _ in range(repeats):
        (found,) = stats.paired(*(of_marks(clustered(rng, 60, 0.7)) for _ in range(2)), n_resamples=400)
        assert found.test == "mcnemar, by image" and found.p is not None and found.mcnemar is not None
        by_image += found.p < 0.05
        single += found.mcnemar.p < 0.05
    assert 0.025 <= by_image / repeats <= 0.075
    assert single / repeats > 0.12  # the reason why images are the units


@pytest.mark.parametrize("images, share_changed", [(3, 1.0), (6, 1.0), (12, 1.0), (100, 0.15), (100, 1.0)])
@pytest.mark.parametrize("name", ["F1", "CHAIR_i"])
def test_the_test_of_a_ratio_keeps_its_level(name: str, images: int, share_changed: float) -> None:
    rng, repeats, hits = np.random.default_rng(9), 400, 0

    def run() -> Sums:
        if name == "F1":
            right = clustered(rng, images, 0.7)[:, 0]
            tp, tn = right[:, :3].sum(1), right[:, 3:].sum(1)
            return np.stack([tp, 3 - tn, 3 - tp], -1).astype(float)
        mentions = 1 + rng.poisson(3, images)
        return np.stack([rng.binomial(mentions, rng.beta(1, 4, images)), mentions], -1).astype(float)

    ratios = metric(name, f1 if name == "F1" else share(0, 1), ["a"])
    for _ in range(repeats):
        first, second = run(), run()
        same = rng.random(images) > share_changed
        second[same] = first[same]
        (found,) = stats.paired(of_sums(first, ratios), of_sums(second, ratios), n_resamples=400)
        assert found.test == "exchange" and found.p is not None
        hits += found.p < 0.05
    assert (0.02 if images == 100 else 0) <= hits / repeats <= 0.075


def test_few_images_cannot_be_significant_however_large_the_difference() -> None:
    worst, best = np.array([[0.0, 4.0]] * 3), np.array([[4.0, 4.0]] * 3)
    (found,) = stats.paired(
        of_sums(worst, metric("r", share(0, 1), ["a"])), of_sums(best, metric("r", share(0, 1), ["a"]))
    )
    assert found.difference == 1 and found.p == 2 / 2**3, "all 8 exchanges of 3 images are tried"


def test_what_can_be_seen_is_never_less_than_a_test_needs() -> None:
    marks = np.ones((40, 1, 2), bool)
    other = marks.copy()
    other[0, 0, 0] = False
    (found,) = stats.paired(of_marks(marks), of_marks(other))
    assert found.detectable == pytest.approx(6 / 80), "one changed answer has next to no spread"
    (few,) = stats.paired(of_marks(marks[:5]), of_marks(other[:5]))
    assert few.detectable is None, "five images cannot be significant"


def test_equal_differences_tie_however_they_were_added_up() -> None:
    rng = np.random.default_rng(3)
    marks = rng.random((141, 3, 1)) < 0.9
    other = marks.copy()
    changed = rng.choice(141, 9, replace=False)
    other[changed, rng.integers(0, 3, 9)] ^= True
    found = {entry.key: entry for entry in stats.paired(of_marks(marks, tuple("abc")), of_marks(other, tuple("abc")))}
    steps = (other.astype(int) - marks)[changed].sum(axis=(1, 2))
    signs = 1 - 2 * (np.arange(2**9)[:, None] >> np.arange(9) & 1)
    exact = np.mean(abs(signs @ steps) >= abs(steps.sum()))
    assert found["mean"].p == pytest.approx(exact)


def test_an_undefined_number_is_not_compared_where_zero_would_be_the_best() -> None:
    metrics = (
        dataclasses.replace(metric("a.chair", share(0, 1), ["a"]), better="lower"),
        metric("a.f1", share(0, 1), ["a"]),
    )
    silent, talking = np.zeros((20, 2)), np.tile([1.0, 4.0], (20, 1))
    (found,) = stats.paired(of_sums(talking, *metrics), of_sums(silent, *metrics))
    assert (found.key, found.first, found.second) == ("a.f1", 0.25, 0.0)


def test_a_difference_of_the_size_that_can_be_seen_is_found_four_times_in_five() -> None:
    rng, planted, pilot = np.random.default_rng(10), 0.05, 2000
    (found,) = stats.paired(*(of_marks(clustered(rng, pilot, mean)) for mean in (0.7, 0.7 + planted)))
    images = stats.images_needed(found.standard_error, pilot, planted) or 0
    assert stats.detectable(found.standard_error, pilot, at=images) == pytest.approx(planted, rel=0.01)
    hits, told, repeats = 0, [], 300
    for _ in range(repeats):
        runs = (of_marks(clustered(rng, images, mean)) for mean in (0.7, 0.7 + planted))
        (entry,) = stats.paired(*runs, n_resamples=400)
        assert entry.p is not None and entry.detectable is not None
        hits += entry.p < 0.05
        told.append(entry.detectable)
    assert 0.74 <= hits / repeats <= 0.86
    assert np.median(told) == pytest.approx(planted, rel=0.03)  # every comparison of this size says so


def test_power_follows_the_normal_formula_and_the_root_of_the_number_of_images() -> None:
    assert stats.detectable(0.01, 500) == pytest.approx(0.01 * (1.95996 + 0.84162), rel=0.005)
    assert stats.detectable(0.01, 500, at=2000) == pytest.approx((stats.detectable(0.01, 500) or 0) / 2, rel=0.01)
    assert stats.images_needed(0.01, 500, 0.028) == pytest.approx(500, abs=6)
    assert stats.images_needed(0.01, 500, -0.014) == pytest.approx(2000, abs=12)
    assert stats.images_needed(0.01, 500, 5.0) == 2
    assert stats.detectable(0.0, 500) is None and stats.detectable(None, 500) is None
    assert stats.images_needed(None, 500, 0.1) is None and stats.detectable(0.1, 1) is None
    with pytest.raises(ValueError, match="difference=0"):
        stats.images_needed(0.01, 500, 0.0)


def test_power_in_words() -> None:
    rng = np.random.default_rng(11)
    (found,) = stats.paired(*(of_marks(clustered(rng, 50, 0.7)) for _ in range(2)))
    points = f"{100 * (found.detectable or 0):.2g}"
    expected = f"a.accuracy: with 50 images a difference of {points} points would be seen (80 % power)."
    assert stats.power_sentence(found) == expected
    plain = dataclasses.replace(found, percent=False, detectable=3.14159)
    assert "a difference of 3.14 would be seen" in stats.power_sentence(plain)
    assert "cannot be said" in stats.power_sentence(dataclasses.replace(found, detectable=None))


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("scipy.stats", lambda: stats.intervals(of_sums(np.ones((3, 2)), ACCURACY))),
        ("statsmodels.stats", lambda: stats.mcnemar(1, 2)),
        ("statsmodels.stats.multitest", lambda: stats.holm([0.1, 0.2])),
        ("statsmodels.stats.power", lambda: stats.images_needed(0.1, 10, 0.1)),
    ],
)
def test_a_missing_library_is_named_with_what_to_install(
    module: str, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"{module.split('.')[0]}.*pip install 'vlmattn\[eval\]'"):
        call()
