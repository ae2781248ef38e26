"""Compare methods on the same photos: means with bootstrap intervals, and paired tests against the first method."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.metrics import HEADINGS
from evaluation.records import Values

RESAMPLES = 9_999
"""Resamples of the photos, for intervals and tests."""
BATCH = 500
"""Resamples computed at once: less than 200 MB for 1,212 photos and 13 methods."""
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Row:
    """One method measured by one metric; unknown numbers are NaN."""

    method: str
    metric: str
    direction: str
    """Which values are better: "lower" or "higher"."""
    n: int
    """Number of photos, or mosaics."""
    mean: float
    low: float
    """Lower end of the 95 % interval of the mean."""
    high: float
    difference: float = math.nan
    """Mean of this method minus ours, over the photos that both have."""
    difference_low: float = math.nan
    difference_high: float = math.nan
    p: float = math.nan
    """Probability of such a difference by chance, with Holm's correction over the methods of the metric."""

    @property
    def mark(self) -> str:
        """▲ if significantly better than ours, ▼ if worse, else nothing."""
        if not self.p < SIGNIFICANT:  # also NaN
            return ""
        return "▲" if (self.difference < 0) == (self.direction == "lower") else "▼"


def statistics(values: Values, ours: str | None = None, seed: int = 0) -> list[Row]:
    """Return the mean of every method by every metric and, if `ours` is named, how the others differ from it."""
    rows = []
    for metric, methods in values.items():
        photos = sorted({photo for scores in methods.values() for photo in scores})
        matrix = np.array([[scores.get(photo, np.nan) for photo in photos] for scores in methods.values()])  # (K, n)
        columns = {"n": np.isfinite(matrix).sum(1), **_columns(("mean", "low", "high"), intervals(matrix, seed))}
        if ours in methods:
            k = list(methods).index(ours)
            differences = matrix - matrix[k]
            differences[k] = np.nan
            names = ("difference", "difference_low", "difference_high")
            columns |= _columns(names, intervals(differences, seed)) | {"p": holm(sign_flip_p(differences, seed))}
        for i, method in enumerate(methods):
            rows.append(Row(method, metric, HEADINGS[metric][1], **{k: v[i].item() for k, v in columns.items()}))
    return rows


def intervals(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return the mean of every row of `(K, n)` and its 95 % bootstrap interval, by percentiles.

    Returns:
        `(K, 3)`: mean, low, high. NaN values are left out; a single value has no interval, and no value no mean.
    """
    from scipy import stats

    result = np.full((len(values), 3), np.nan)
    for rows, present in _same_columns(values):
        result[rows, 0] = present.mean(1)
        if present.shape[1] > 1:
            result[rows, 1:] = np.transpose(
                stats.bootstrap(
                    (present,),
                    np.mean,
                    axis=1,
                    vectorized=True,
                    method="percentile",
                    n_resamples=RESAMPLES,
                    batch=max(1, BATCH // len(present)),
                    rng=np.random.default_rng(seed),
                ).confidence_interval
            )
    return result


def sign_flip_p(differences: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return how probable a mean so far from 0 is if signs are random, for every row of paired differences `(K, n)`.

    The test is two-sided, and exact if all signs can be tried; otherwise `RESAMPLES` random ones are.

    Returns:
        `(K,)`. NaN values are left out; a single value has no p.
    """
    from scipy import stats

    p = np.full(len(differences), np.nan)
    for rows, present in _same_columns(differences):
        if present.shape[1] > 1:
            p[rows] = stats.permutation_test(
                (np.ones(present.shape[1]),),  # scipy permutes the signs, once for all rows
                lambda signs, axis, present=present: signs @ present.T,  # (resamples, n) -> (resamples, K)
                permutation_type="samples",
                vectorized=True,
                n_resamples=RESAMPLES,
                batch=BATCH,
                rng=np.random.default_rng(seed),
            ).pvalue
    return p


def holm(p: np.ndarray) -> np.ndarray:
    """Correct p values `(K,)` for their number, without NaN: Holm 1979, https://www.jstor.org/stable/4615733."""
    order = np.argsort(p)  # NaN last
    factors = np.isfinite(p).sum() - np.arange(len(p))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(factors * p[order]), 1)
    return corrected


def _same_columns(values: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Group the rows of `(K, n)` with values in the same columns: yield which ones, `(K,)` bool, and those values."""
    present = np.isfinite(values)
    for columns in np.unique(present, axis=0):
        if columns.any():
            rows = (present == columns).all(1)
            yield rows, values[rows][:, columns]


def _columns(names: Sequence[str], values: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(names, values.T))
