"""Intervals and kappa are those of their papers and of scipy and scikit-learn."""

import math

import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score

from utils.statistics import cohens_kappa, difference_interval, wilson_interval


@pytest.mark.parametrize(("correct", "examples"), [(0, 1), (1, 1), (0, 300), (7, 10), (299, 300), (8037, 10_000)])
def test_wilson_interval_is_scipys(correct, examples):
    for level, options in ((0.95, {}), (0.99, {"z": 2.5758293})):
        expected = binomtest(correct, examples).proportion_ci(level, method="wilson")
        assert wilson_interval(correct, examples, **options) == pytest.approx((expected.low, expected.high), abs=1e-7)


def test_interval_of_a_difference_is_newcombes():
    """Newcombe (1998), Table II, method 10: examples (a), 56/70 - 48/80, and (b), 9/10 - 3/10."""
    low, high = wilson_interval(56, 70), wilson_interval(48, 80)
    expected = (0.2 - math.hypot(0.8 - low[0], high[1] - 0.6), 0.2 + math.hypot(low[1] - 0.8, 0.6 - high[0]))
    assert expected == pytest.approx((0.0524, 0.3339), abs=1e-4)
    # difference_interval is for the same number of images on both sides.
    low, high = difference_interval(0.8, 0.6, 80)
    assert low < 0.2 < high
    assert difference_interval(0.6, 0.8, 80) == pytest.approx((-high, -low))
    assert difference_interval(0.9, 0.3, 10) == pytest.approx((0.1705, 0.8090), abs=1e-4)
    assert difference_interval(0.5, 0.5, 100)[0] == pytest.approx(-difference_interval(0.5, 0.5, 100)[1])


def test_kappa_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(300, generator=generator) < 0.7
    second = torch.where(torch.rand(300, generator=generator) < 0.5, first, torch.rand(300, generator=generator) < 0.4)
    kappa, low, high = cohens_kappa(first, second)
    assert kappa == pytest.approx(cohen_kappa_score(first, second))
    # The standard error of this kappa is about 0.055 (Fleiss et al., 1969), so the interval is about 0.2 wide.
    assert low < kappa < high
    assert high - low == pytest.approx(0.2, abs=0.03)
    assert cohens_kappa(first, first) == pytest.approx((1, 1, 1))
    assert math.isnan(cohens_kappa(torch.ones(5).bool(), torch.ones(5).bool())[0])
