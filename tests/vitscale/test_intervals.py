"""Intervals against scipy, and against what they promise: how often they hold the true value."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from vitscale.intervals import mean_interval, t_quantile, wilson


@given(freedom=st.integers(1, 300), probability=st.floats(0.001, 0.9995))
def test_quantiles_are_scipys(freedom: int, probability: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(scipy.stats.t.ppf(probability, freedom), rel=1e-7, abs=1e-9)


@given(samples=st.integers(1, 60_000), share=st.floats(0, 1), confidence=st.sampled_from([0.8, 0.95, 0.999]))
def test_wilson_is_scipys(samples: int, share: float, confidence: float) -> None:
    hits = round(share * samples)
    theirs = scipy.stats.binomtest(hits, samples).proportion_ci(confidence, method="wilson")
    assert wilson(hits, samples, confidence) == pytest.approx((theirs.low, theirs.high), rel=1e-9, abs=1e-12)
    low, high = wilson(hits, samples, confidence)
    assert 0 <= low <= hits / samples <= high <= 1


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9).filter(lambda values: np.std(values) > 1e-6))
def test_the_interval_of_a_mean_is_scipys(values: list[float]) -> None:
    mean, low, high = mean_interval(values)
    assert mean == pytest.approx(np.mean(values))
    theirs = scipy.stats.t.interval(0.95, len(values) - 1, np.mean(values), scipy.stats.sem(values))
    assert (low, high) == pytest.approx(theirs, rel=1e-9, abs=1e-9)


def test_an_accuracy_is_within_its_interval_as_often_as_promised() -> None:
    """Exactly, over all outcomes of 200 samples: Wilson's mean coverage over accuracies is the confidence, as the simple one's is not."""
    shares = np.linspace(0.02, 0.98, 97)
    bounds = np.array([wilson(hits, 200) for hits in range(201)])
    covers = (bounds[:, :1] <= shares) & (shares <= bounds[:, 1:])
    coverage = (scipy.stats.binom.pmf(np.arange(201)[:, None], 200, shares) * covers).sum(axis=0)
    assert coverage.mean() == pytest.approx(0.95, abs=0.005)
    assert coverage.min() > 0.9


@pytest.mark.parametrize(("hits", "samples"), [(1, 0), (-1, 5), (6, 5)])
def test_what_is_no_share_is_refused(hits: int, samples: int) -> None:
    with pytest.raises(ValueError, match="is no share"):
        wilson(hits, samples)


def test_one_value_has_no_spread() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        mean_interval([0.5])
