"""Intervals: of a mean, of a ratio of medians, by the bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgegen import stats


def test_interval_of_the_mean_is_the_normal_one():
    samples = np.random.default_rng(0).normal(3.0, 2.0, 4000)
    low, high = stats.mean_interval(samples)
    half = 1.96 * samples.std() / math.sqrt(4000)
    assert low == pytest.approx(samples.mean() - half, abs=0.006)
    assert high == pytest.approx(samples.mean() + half, abs=0.006)


@pytest.mark.parametrize("interval", [stats.mean_interval, stats.median_interval])
def test_interval_covers_the_truth_at_its_level(interval):
    draws = np.random.default_rng(1).normal(5.0, 1.0, (200, 40))
    bounds = [interval(d, seed=i, resamples=300) for i, d in enumerate(draws)]
    hits = sum(low <= 5.0 <= high for low, high in bounds)
    assert 175 <= hits <= 200
    assert sum(low <= 6.0 <= high for low, high in bounds) < 5  # it is able to miss


def test_interval_of_a_ratio_of_medians():
    rng = np.random.default_rng(2)
    slow, fast = rng.lognormal(math.log(6), 0.1, 300), rng.lognormal(math.log(3), 0.1, 300)
    low, high = stats.ratio_interval(slow, fast)
    assert low < np.median(slow) / np.median(fast) < high and 1.9 < low < high < 2.1
    assert stats.ratio_interval(slow, slow)[0] < 1 < stats.ratio_interval(slow, slow)[1]


def test_intervals_are_seeded_blockwise_and_refuse_nothing_at_all(monkeypatch):
    samples = np.random.default_rng(3).random(50)
    assert stats.mean_interval(samples, seed=4) == stats.mean_interval(samples, seed=4)
    assert stats.mean_interval(samples, seed=4) != stats.mean_interval(samples, seed=5)
    assert stats.mean_interval([2.0, 2.0]) == (2.0, 2.0)
    whole = stats.mean_interval(samples, seed=4)
    monkeypatch.setattr(stats, "_BLOCK", 500)
    assert stats.mean_interval(samples, seed=4) == pytest.approx(whole, abs=0.01)
    with pytest.raises(ValueError, match="at least one sample"):
        stats.median_interval([])
