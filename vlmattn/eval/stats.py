"""Intervals: questions about one image are not independent, so images are resampled, not questions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlmattn.errors import DataError

Metric = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def bootstrap_interval(
    counts: ArrayLike,
    metric: Metric,
    *,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile interval of a metric of summed counts, by resampling clusters (`scipy.stats.bootstrap`).

    Args:
        counts: (images, columns), one row of sums per image.
        metric: (..., columns) summed counts -> (...) values.
        n_resamples: how many bootstrap samples.
        confidence: mass between the two ends.
        seed: seed of the resampling.

    Returns:
        (low, high), or None when there are fewer than two images.

    Raises:
        DataError: scipy is not installed.
    """
    try:
        from scipy.stats import bootstrap
    except ImportError:
        raise DataError("intervals need scipy, which is not installed: pip install 'vlmattn[eval]'") from None
    table = np.asarray(counts, dtype=np.float64)
    if table.ndim != 2:
        raise ValueError(f"counts has {table.ndim} dimensions, expected (images, columns)")
    if len(table) < 2:
        return None

    def statistic(index: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        return metric(table[index.astype(np.int64)].sum(axis=axis if axis >= 0 else axis - 1))

    result = bootstrap(
        (np.arange(len(table)),),
        statistic,
        vectorized=True,
        method="percentile",
        n_resamples=n_resamples,
        confidence_level=confidence,
        batch=max(1, 2_000_000 // table.size),
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return float(low), float(high)


def share(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Accuracy of (..., 2) sums [right, all]; 0 where nothing was counted."""
    return ratio(sums[..., 0], sums[..., 1])


def mean_share(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over groups of accuracies, of (..., 2 x groups) sums [right, all, right, all, ...]."""
    return share(sums.reshape(*sums.shape[:-1], -1, 2)).mean(axis=-1)


def mean_f1(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over groups of F1, of (..., 3 x groups) sums [TP, FP, FN, ...]: F1 = 2 TP / (2 TP + FP + FN)."""
    groups = sums.reshape(*sums.shape[:-1], -1, 3)
    positive = 2 * groups[..., 0]
    return ratio(positive, positive + groups[..., 1] + groups[..., 2]).mean(axis=-1)


def ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """part / whole, and 0 where whole is 0."""
    return np.divide(part, whole, out=np.zeros_like(part, dtype=np.float64), where=whole != 0)
