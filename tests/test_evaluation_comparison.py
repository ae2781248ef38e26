"""Intervals and tests of the evaluation against plain derivations."""

import itertools
import math

import numpy as np
import pytest

from evaluation import comparison
from evaluation.comparison import Row, holm, intervals, sign_flip_p, statistics

NAN = math.nan
pytestmark = pytest.mark.filterwarnings("error")


def test_interval_against_a_plain_bootstrap():
    values = np.random.default_rng(0).gamma(2, size=(2, 40))
    values[1, 30:] = NAN
    for row, (mean, low, high) in zip(values, intervals(values)):
        row = row[np.isfinite(row)]
        rng = np.random.default_rng(5)
        means = sorted(sum(row[rng.integers(len(row))] for _ in row) / len(row) for _ in range(4000))
        spread = row.std() / math.sqrt(len(row))
        assert mean == pytest.approx(sum(row) / len(row), abs=1e-12)
        assert low == pytest.approx(means[100], abs=0.12 * spread)
        assert high == pytest.approx(means[-101], abs=0.12 * spread)


def test_intervals_of_few_values():
    result = intervals(np.array([[NAN, NAN, NAN], [2, NAN, NAN], [3, 3, 3]]))
    np.testing.assert_array_equal(result, [[NAN, NAN, NAN], [2, NAN, NAN], [3, 3, 3]])


def plain_p(differences):
    """All signs: how many means are as far from 0, on the side of the mean, twice."""
    sums = [
        sum(s * d for s, d in zip(signs, differences)) for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    far = sum(total >= abs(sum(differences)) - 1e-12 for total in sums)
    return min(1, 2 * far / len(sums))


def test_p_against_all_signs():
    rng = np.random.default_rng(1)
    differences = rng.normal(0.4, 1, (4, 9))
    differences[2] += 1
    differences[3, 6:] = NAN
    wanted = [plain_p(row[np.isfinite(row)]) for row in differences]
    assert min(wanted) < 0.05 < max(wanted)
    np.testing.assert_allclose(sign_flip_p(differences), wanted)
    np.testing.assert_allclose(sign_flip_p(-differences), wanted)


def test_p_by_random_signs_is_near_that_by_all(monkeypatch):
    differences = np.random.default_rng(3).normal(0.35, 1, (1, 13))
    monkeypatch.setattr(comparison, "RESAMPLES", 4999)  # of 8,192
    assert sign_flip_p(differences)[0] == pytest.approx(plain_p(differences[0]), abs=0.03)
    assert 0.02 < plain_p(differences[0]) < 0.9


def test_p_is_nan_of_one_and_one_of_equals():
    p = sign_flip_p(np.array([[NAN, NAN, 3], [NAN, NAN, NAN], [0, 0, 0]]))
    np.testing.assert_array_equal(p, [NAN, NAN, 1])


def test_holm_by_hand():
    # sorted .01 .03 .04 .2: times 4, 3, 2, 1 = .04 .09 .08 .2, and no smaller than the one before
    np.testing.assert_allclose(holm(np.array([0.04, 0.01, NAN, 0.2, 0.03])), [0.09, 0.04, NAN, 0.2, 0.09])
    np.testing.assert_allclose(holm(np.array([0.6, 0.5])), [1, 1])


def test_statistics_are_paired_by_photo():
    rng = np.random.default_rng(0)
    ours = {f"{i:02}": x for i, x in enumerate(rng.normal(0, 100, 12))}  # far apart, and yet the differences are clear
    other = {photo: x + rng.uniform(1, 2) for photo, x in reversed(ours.items()) if photo != "03"}
    rows = statistics({"iou": {"daam": ours, "rollout": other}, "energy": {"rollout": other}}, "daam")
    assert [(row.metric, row.method, row.n, row.direction) for row in rows] == [
        ("iou", "daam", 12, "higher"),
        ("iou", "rollout", 11, "higher"),
        ("energy", "rollout", 11, "higher"),
    ]
    mine, row, alone = rows
    differences = [other[photo] - ours[photo] for photo in other]
    assert mine.mean == pytest.approx(sum(ours.values()) / 12)
    assert row.mean == pytest.approx(sum(other.values()) / 11)
    assert row.difference == pytest.approx(sum(differences) / 11)
    assert 1 < row.difference_low < row.difference < row.difference_high < 2
    assert row.p == pytest.approx(2 / 2**11) == pytest.approx(plain_p(differences))
    for row in (mine, alone):
        assert all(math.isnan(x) for x in (row.difference, row.difference_low, row.difference_high, row.p))
        assert row.mark == ""


def test_statistics_correct_over_the_methods_of_a_metric():
    rng = np.random.default_rng(2)
    of = {method: {str(i): rng.normal(k / 3, 1) for i in range(8)} for k, method in enumerate("abcd")}
    rows = statistics({"iou": of}, "a")
    single = np.array([plain_p([of[m][p] - of["a"][p] for p in of["a"]]) for m in "bcd"])
    np.testing.assert_allclose([row.p for row in rows[1:]], holm(single))
    assert [row.p for row in statistics({"iou": of})] == pytest.approx([NAN] * 4, nan_ok=True)
    assert repr(statistics({"iou": of}, "a")) == repr(rows)  # seeded


@pytest.mark.parametrize(
    ("direction", "difference", "p", "mark"),
    [
        ("lower", -0.1, 0.01, "▲"),
        ("lower", 0.1, 0.01, "▼"),
        ("higher", -0.1, 0.01, "▼"),
        ("higher", 0.1, 0.01, "▲"),
        ("higher", 0.1, 0.05, ""),
        ("higher", 0.1, NAN, ""),
    ],
)
def test_marks(direction, difference, p, mark):
    assert Row("a", "iou", direction, 9, 0.5, 0.4, 0.6, difference, 0, 0, p).mark == mark
