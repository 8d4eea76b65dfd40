"""Intervals: images are resampled, against cases with a known answer."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from vlmattn.errors import DataError
from vlmattn.eval import stats


def test_independent_rows_give_the_binomial_interval() -> None:
    rows = np.array([[1.0, 1.0]] * 80 + [[0.0, 1.0]] * 20)
    low, high = stats.bootstrap_interval(rows, stats.share, n_resamples=4000) or (0, 0)
    half = 1.96 * np.sqrt(0.8 * 0.2 / 100)
    assert low == pytest.approx(0.8 - half, abs=0.015)
    assert high == pytest.approx(0.8 + half, abs=0.015)


def test_six_equal_questions_an_image_count_as_one() -> None:
    images = np.array([[6.0, 6.0]] * 40 + [[0.0, 6.0]] * 10)
    rows = np.array([[1.0, 1.0]] * 240 + [[0.0, 1.0]] * 60)
    by_image = stats.bootstrap_interval(images, stats.share) or (0, 0)
    by_row = stats.bootstrap_interval(rows, stats.share) or (0, 0)
    ratio = (by_image[1] - by_image[0]) / (by_row[1] - by_row[0])
    assert ratio == pytest.approx(np.sqrt(6), rel=0.15)


def test_the_same_seed_gives_the_same_interval_and_certainty_has_no_width() -> None:
    rows = np.random.default_rng(1).integers(0, 2, (30, 1)) * [[1.0, 0.0]] + [[0.0, 1.0]]
    assert stats.bootstrap_interval(rows, stats.share, seed=3) == stats.bootstrap_interval(rows, stats.share, seed=3)
    assert stats.bootstrap_interval([[1.0, 1.0]] * 5, stats.share) == (1.0, 1.0)


def test_one_image_has_no_interval() -> None:
    assert stats.bootstrap_interval([[1.0, 2.0]], stats.share) is None


def test_metrics_of_sums() -> None:
    assert stats.mean_f1(np.array([1183.0, 31, 317, 0, 0, 0])) == pytest.approx(0.8717759764185703 / 2)
    assert stats.mean_share(np.array([1.0, 2, 3, 4])) == pytest.approx((0.5 + 0.75) / 2)


def test_without_scipy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(DataError, match=r"pip install 'vlmattn\[eval\]'"):
        stats.bootstrap_interval([[1.0, 2.0]] * 3, stats.share)
