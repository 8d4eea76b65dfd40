"""How sure a number is: intervals of one run, tests between two, and what a test of this size could have seen.

Questions about one image are not independent, so images are drawn, never questions: both the intervals and the tests
take the rows of `Tally.sums`, one per image, as the independent units. On clustered answers McNemar's test on single
questions rejects a true null hypothesis far more often than it says (`tests/test_eval_stats.py` shows it).

- Interval of a metric, and of the difference of a metric between two runs: percentile bootstrap over images. For a
  difference the same images are drawn for both runs (Efron and Tibshirani, An Introduction to the Bootstrap, 1993).
- Test of a difference: under the null hypothesis the two runs' answers to all questions of an image may be exchanged,
  so exchanging them at random, image by image, keeps the level for every metric and any number of images (Noreen,
  Computer-Intensive Methods for Testing Hypotheses, 1989). For shares of right answers this is McNemar's test with
  images as units, and McNemar's exact test is used where no image has more than one answer that turned from right to
  wrong or back. The paired bootstrap gives the interval but not the p: with few images it rejects a true null
  hypothesis far more often than it says, and with two images whose difference is the same it is certain.
- Several tasks: Holm (1979), in two families, each at 5 %: the headlines, which a table of the comparison shows, and
  the first formulas of the tasks that are no headline. A mean over tasks is not in one family with its own parts. The
  other numbers explain these and are not corrected; nothing is called significant by them.
- A number whose denominator is 0 counts as 0 where 0 is the worst (F1 of a model that never says yes). Where 0 would be
  the best (CHAIR of captions that mention nothing) it is not compared.
- Where all answers of a run are right (or all wrong), resampling finds no spread at all, though few images say little.
  There the open end of the interval is Clopper and Pearson's (1934), with images as units.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlmattn.errors import DataError
from vlmattn.eval.items import some
from vlmattn.eval.tally import Better, Metric, Sums, Tally

Interval = tuple[float, float]
Test = Literal["mcnemar", "mcnemar, by image", "exchange", "none"]

LEVEL = 0.05
"""What p after Holm's correction must be below to be called more than chance."""
_BATCH = 4_000_000
_FEWEST = 6
"""So many images have to differ, all in one direction, for a two-sided p below 0.05: 2 / 2**6."""
_EXTRA = "pip install 'vlmattn[eval]'"


@dataclass(frozen=True)
class McNemar:
    """The exact McNemar test on single answers, which takes them all as independent.

    Attributes:
        lost: answers that are right in the first run and wrong in the second.
        won: answers that are wrong in the first run and right in the second.
        p: two-sided p of a binomial with probability 1/2.
    """

    lost: int
    won: int
    p: float


@dataclass(frozen=True)
class Paired:
    """One metric in two runs over the same questions. Differences are second - first, in the metric's own unit.

    Attributes:
        key, title, group, headline, better, percent: of the metric, as in `vlmattn.eval.tally.Metric`.
        first: value in the first run.
        second: value in the second run.
        difference: second - first.
        interval: of the difference; None with fewer than two images.
        p: two-sided; 1 for equal runs, None with fewer than two images.
        test: what gave `p`.
        p_holm: `p` adjusted for the other headlines, or for the other tasks, of this comparison; None where the metric
            is neither a headline nor the first formula of a task.
        mcnemar: the test on single answers, for metrics that are a share of right ones; else None.
        images: how many images the metric is about.
        standard_error: of the difference, over images; None with fewer than two images.
        detectable: the smallest true difference that a comparison of this size finds in 80 of 100 cases at 5 %,
            two-sided; None where the runs do not differ, so that nothing is known about their spread.
    """

    key: str
    title: str
    group: str
    headline: bool
    better: Better
    percent: bool
    first: float
    second: float
    difference: float
    interval: Interval | None
    p: float | None
    test: Test
    p_holm: float | None
    mcnemar: McNemar | None
    images: int
    standard_error: float | None
    detectable: float | None

    def significant(self, level: float = LEVEL) -> bool:
        """Whether the difference is more than chance: `p_holm` is there and below `level`."""
        return self.p_holm is not None and self.p_holm < level


def intervals(
    tally: Tally, *, n_resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Interval | None]:
    """Percentile intervals of all metrics from one set of resamples of images (`scipy.stats.bootstrap`).

    Args:
        tally: sums per image.
        n_resamples: how many bootstrap samples.
        confidence: mass between the two ends.
        seed: seed of the resampling.

    Returns:
        Metric key -> (low, high), None with fewer than two images. In a resample whose denominator is 0 a metric is 0,
        as in `Metric.of`. A share of right answers that is 0 or 1 has Clopper and Pearson's interval over its images.

    Raises:
        DataError: scipy is not installed.
    """
    keys = [metric.key for metric in tally.metrics]
    if len(tally.images) < 2 or not keys:
        return dict.fromkeys(keys)
    result = _bootstrap(
        len(tally.images), lambda draws: _values(tally.metrics, draws @ tally.sums), n_resamples, confidence, seed
    )
    ends = [(float(low), float(high)) for low, high in zip(*result.confidence_interval, strict=True)]
    images = tally.images_of()
    return {
        metric.key: _opened(found, images[metric.key], confidence) if metric.of_marks else found
        for metric, found in zip(tally.metrics, ends, strict=True)
    }


def paired(
    first: Tally, second: Tally, *, n_resamples: int = 5000, confidence: float = 0.95, seed: int = 0
) -> tuple[Paired, ...]:
    """Compare two runs over the same questions, metric by metric.

    Args:
        first: the run compared with.
        second: the run that is judged.
        n_resamples: how many bootstrap samples, and how many exchanges of images where there are too many to try all.
            No p below 1 / (n_resamples + 1) comes out of either.
        confidence: mass between the two ends of an interval.
        seed: seed of the resampling.

    Returns:
        One entry per metric, in the order of `first.metrics`, without those that are undefined in a run and whose best
        value is not the highest.

    Raises:
        DataError: the two are not about the same questions, or scipy or statsmodels is not installed.
    """
    second = _aligned(first, second)
    flawed = {*first.undefined(), *second.undefined()}
    metrics = [metric for metric in first.metrics if metric.key not in flawed or metric.better == "higher"]
    count = len(first.images)
    before, after = first.values(), second.values()
    observed = np.array([after[metric.key] - before[metric.key] for metric in metrics])
    ends: list[Interval | None] = [None] * len(metrics)
    errors: list[float | None] = [None] * len(metrics)
    ps: list[float | None] = [None] * len(metrics)
    tests: list[Test] = ["none"] * len(metrics)
    single = [_mcnemar(metric, first, second) for metric in metrics]
    if count > 1 and metrics:
        result = _bootstrap(
            count,
            lambda draws: _values(metrics, draws @ second.sums) - _values(metrics, draws @ first.sums),
            n_resamples,
            confidence,
            seed,
        )
        ends = [(float(low), float(high)) for low, high in zip(*result.confidence_interval, strict=True)]
        errors = [float(error) for error in result.standard_error]
        ps = _exchange(metrics, first, second, n_resamples, seed)
        for number, (metric, found) in enumerate(zip(metrics, single, strict=True)):
            tests[number] = "exchange" if found is None else "mcnemar, by image"
            if found is not None and _one_an_image(metric, first, second):
                ps[number], tests[number] = found.p, "mcnemar"
    seen = first.images_of()
    images = [seen[metric.key] for metric in metrics]
    adjusted: dict[int, float] = {}
    for family in _families(metrics):
        known = [number for number in family if ps[number] is not None]
        adjusted |= zip(known, holm([ps[number] or 0.0 for number in known]), strict=True)
    return tuple(
        Paired(
            key=metric.key,
            title=metric.title,
            group=metric.group,
            headline=metric.headline,
            better=metric.better,
            percent=metric.percent,
            first=before[metric.key],
            second=after[metric.key],
            difference=float(observed[number]),
            interval=ends[number],
            p=ps[number],
            test=tests[number],
            p_holm=adjusted.get(number),
            mcnemar=single[number],
            images=images[number],
            standard_error=errors[number],
            detectable=_visible(metric, first, errors[number], images[number]),
        )
        for number, metric in enumerate(metrics)
    )


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p of McNemar's test (`statsmodels`); 1 where nothing turned.

    Args:
        lost: answers that are right in the first run and wrong in the second.
        won: the other way round.

    Raises:
        DataError: statsmodels is not installed.
    """
    try:
        from statsmodels.stats import contingency_tables
    except ImportError:
        raise DataError(f"McNemar's test needs statsmodels, which is not installed: {_EXTRA}") from None
    return float(contingency_tables.mcnemar([[0, lost], [won, 0]], exact=True).pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """p values adjusted by Holm's step-down procedure (`statsmodels`), in the order given.

    Raises:
        DataError: statsmodels is not installed.
    """
    if len(ps) < 2:
        return list(ps)
    try:
        from statsmodels.stats.multitest import multipletests
    except ImportError:
        raise DataError(f"Holm's correction needs statsmodels, which is not installed: {_EXTRA}") from None
    return [float(p) for p in multipletests(ps, method="holm")[1]]


def detectable(
    standard_error: float | None, images: int, *, level: float = 0.05, power: float = 0.8, at: int | None = None
) -> float | None:
    """The smallest true difference that a paired comparison finds with this power (two-sided, `statsmodels`).

    Args:
        standard_error: of the difference over `images` images, for instance of a pilot run.
        images: how many images it comes from.
        level: of the test.
        power: share of comparisons that find it.
        at: the number of images that is asked about; default `images`.

    Returns:
        A difference in the unit of `standard_error`; None where that is None or 0, or there are fewer than two images.

    Raises:
        DataError: statsmodels is not installed.
    """
    target = images if at is None else at
    if not standard_error or images < 2 or target < 2:
        return None
    return _effect(target, level, power) * standard_error * math.sqrt(images)


def images_needed(
    standard_error: float | None, images: int, difference: float, *, level: float = 0.05, power: float = 0.8
) -> int | None:
    """How many images a paired comparison needs to find a true difference with this power (two-sided, `statsmodels`).

    Args:
        standard_error: of the difference over `images` images, for instance of a pilot run.
        images: how many images it comes from.
        difference: what is to be found, in the unit of `standard_error`.
        level: of the test.
        power: share of comparisons that find it.

    Returns:
        A number of images, at least 2; None where `standard_error` is None or 0, or there are fewer than two images.

    Raises:
        ValueError: `difference` is 0. DataError: statsmodels is not installed.
    """
    if difference == 0:
        raise ValueError("difference=0 cannot be found with any number of images; give the difference that matters")
    if not standard_error or images < 2:
        return None
    effect = abs(difference) / (standard_error * math.sqrt(images))
    low, high = 2, 2
    solver = _power()
    while solver.power(effect, high, level, alternative="two-sided") < power:
        low, high = high, 2 * high
    while low < high:
        middle = (low + high) // 2
        if solver.power(effect, middle, level, alternative="two-sided") < power:
            low = middle + 1
        else:
            high = middle
    return high


def power_sentence(entry: Paired) -> str:
    """ "accuracy: with 500 images a difference of 1.8 points would be seen (80 % power)."."""
    if entry.detectable is None:
        return f"{entry.title}: the runs do not differ, so it cannot be said which difference would be seen."
    size = f"{100 * entry.detectable:.2g} points" if entry.percent else f"{entry.detectable:.3g}"
    return f"{entry.title}: with {entry.images} images a difference of {size} would be seen (80 % power)."


@lru_cache(maxsize=256)
def _effect(images: int, level: float, power: float) -> float:
    """The smallest effect that is found: a difference over its standard deviation between images."""
    return float(_power().solve_power(nobs=images, alpha=level, power=power, alternative="two-sided"))


def _power() -> Any:
    try:
        from statsmodels.stats.power import TTestPower
    except ImportError:
        raise DataError(f"power needs statsmodels, which is not installed: {_EXTRA}") from None
    return TTestPower()


def _opened(interval: Interval, images: int, confidence: float) -> Interval:
    """The interval of a share, with a width where resampling has none because all answers are alike."""
    if not images or interval not in ((0.0, 0.0), (1.0, 1.0)):
        return interval
    from scipy.stats import binomtest

    found = binomtest(images if interval[1] else 0, images).proportion_ci(confidence)  # exact
    return float(found.low), float(found.high)


def _values(metrics: Sequence[Metric], sums: Sums) -> Sums:
    """(..., K) sums -> (metrics, ...) values."""
    return np.stack([metric.of(sums) for metric in metrics])


def _bootstrap(images: int, statistic: Callable[[Sums], Sums], n_resamples: int, confidence: float, seed: int) -> Any:
    """`scipy.stats.bootstrap` over images, all metrics at once.

    `statistic`: (..., images) how often each image was drawn -> (metrics, ...).
    """
    try:
        from scipy.stats import bootstrap
    except ImportError:
        raise DataError(f"intervals need scipy, which is not installed: {_EXTRA}") from None

    def of_draw(index: NDArray[np.int64], axis: int = -1) -> Sums:
        rows = index.reshape(-1, images) + images * np.arange(index.size // images)[:, None]
        draws = np.bincount(rows.ravel(), minlength=index.size).reshape(index.shape)
        return statistic(draws.astype(np.float64))

    return bootstrap(
        (np.arange(images),),
        of_draw,
        vectorized=True,
        method="percentile",
        n_resamples=n_resamples,
        confidence_level=confidence,
        batch=max(1, _BATCH // images),
        rng=np.random.default_rng(seed),
    )


def _exchange(
    metrics: Sequence[Metric], first: Tally, second: Tally, n_resamples: int, seed: int
) -> list[float | None]:
    """Two-sided p of every metric when the runs' answers to all questions of an image may change places.

    All exchanges are tried where there are at most `n_resamples` of them, else that many random ones. Images with equal
    rows in both runs would change nothing.
    """
    rows = np.flatnonzero((first.sums != second.sums).any(axis=1))
    low, high, step = first.sums.sum(axis=0), second.sums.sum(axis=0), second.sums[rows] - first.sums[rows]
    every = 2 ** min(len(rows), 62) <= n_resamples
    if every:
        flips = (np.arange(2 ** len(rows))[:, None] >> np.arange(len(rows)) & 1).astype(np.float64)
    else:
        flips = np.random.default_rng(seed).integers(0, 2, (n_resamples, len(rows))).astype(np.float64)
    moved = flips @ step
    # Equal differences must compare as equal although they were added up in another order.
    differences = np.abs(np.round(_values(metrics, high - moved) - _values(metrics, low + moved), 12))
    observed = np.abs(np.round(_values(metrics, high) - _values(metrics, low), 12))
    far = (differences >= observed[:, None]).sum(axis=1)
    return [float(p) for p in (far / len(flips) if every else (1 + far) / (1 + n_resamples))]


def _visible(metric: Metric, first: Tally, standard_error: float | None, images: int) -> float | None:
    """The smallest true difference that is found, by the spread that was seen but never below what any test needs.

    With fewer than six images no exchange is significant, and of a share of right answers six have to change. None
    where it is beyond what the metric can have.
    """
    if images < _FEWEST or (found := detectable(standard_error, images)) is None:
        return None
    if metric.of_marks:
        answers = sum(first.groups[key] in metric.groups for key in first.marks)
        found = max(found, _FEWEST / answers)
    return None if metric.percent and found > 1 else found


def _turned(metric: Metric, first: Tally, second: Tally) -> list[str]:
    """Ids of the answers behind a metric that are right in one run and wrong in the other."""
    return [
        key
        for key, mark in first.marks.items()
        if first.groups[key] in metric.groups and second.marks.get(key, mark) != mark
    ]


def _mcnemar(metric: Metric, first: Tally, second: Tally) -> McNemar | None:
    if not metric.of_marks:
        return None
    turned = _turned(metric, first, second)
    lost = sum(first.marks[key] for key in turned)
    return McNemar(lost, len(turned) - lost, mcnemar(lost, len(turned) - lost))


def _one_an_image(metric: Metric, first: Tally, second: Tally) -> bool:
    """Whether single answers are the units of a metric's test: one that turned an image, and all weigh the same."""
    images = Counter(first.clusters[key] for key in _turned(metric, first, second))
    sizes = Counter(group for key, group in first.groups.items() if group in metric.groups and key in first.marks)
    return max(images.values(), default=0) <= 1 and len(set(sizes.values())) <= 1


def _families(metrics: Sequence[Metric]) -> tuple[list[int], list[int]]:
    """Numbers of the metrics Holm's correction takes together: the headlines; the other tasks' first formulas."""
    first: dict[str, int] = {}
    for number, metric in enumerate(metrics):
        if metric.group:
            first.setdefault(metric.group, number)
    headlines = [number for number, metric in enumerate(metrics) if metric.headline]
    return headlines, [number for number in first.values() if number not in headlines]


def _aligned(first: Tally, second: Tally) -> Tally:
    """The second tally with its images and columns in the order of the first."""
    where = [{key: (group, tally.clusters[key]) for key, group in tally.groups.items()} for tally in (first, second)]
    different = sorted({key for key, _ in where[0].items() ^ where[1].items()})
    if different:
        raise DataError(
            f"a paired comparison needs the same questions in both runs; {len(different)} are in one only, or about "
            f"another image ({some(different)}); compare the questions that both have (Run.only)"
        )
    keys = {metric.key for metric in first.metrics}
    if set(first.columns) != set(second.columns) or keys != {metric.key for metric in second.metrics}:
        raise DataError("the two runs are counted differently; score both with the same benchmark")
    row = {image: number for number, image in enumerate(second.images)}
    column = {name: number for number, name in enumerate(second.columns)}
    rows, columns = [row[image] for image in first.images], [column[name] for name in first.columns]
    return replace(
        second,
        images=first.images,
        columns=first.columns,
        sums=second.sums[np.ix_(rows, columns)],
        metrics=first.metrics,
    )
