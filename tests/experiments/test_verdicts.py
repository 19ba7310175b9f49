"""Intervals against scipy, and each rule by cases on both sides."""

import math

import numpy as np
import pytest
from scipy import stats

from ordnung.scripts.common.tables import estimate, summarise
from ordnung.scripts.experiments.verdicts import (
    FAILS,
    HOLDS,
    OPEN,
    PART,
    Interval,
    at_least,
    at_most,
    beyond_counting,
    changes,
    equal,
    interval,
    together,
)


def test_intervals_are_student_s():
    values = [181.0, 147.0, 206.0]
    found = interval(values)
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert (found.mean, found.n) == (178, 3)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-4)


def test_what_is_shown():
    assert estimate(summarise([1.0, 3.0]), 2) == "2.00 ± 12.71"
    assert estimate(summarise([0.5]), 1, scale=100) == "50.0 (n = 1)"
    assert interval([0.5]).text(1, 100, " %") == "50.0 % (n = 1)"
    assert interval([-0.1, -0.1]).text(1, 100, " %") == "-10.0 % (-10.0 to -10.0, n = 2)"
    found = changes([2.0, 8.0], [4.0, 4.0])  # a half and a double
    assert found.mean == 0 and found.low == pytest.approx(1 / (1 + found.high) - 1)
    assert changes([2.0], [1.0]).low == -1 and changes([2.0], [1.0]).mean == pytest.approx(1)


@pytest.mark.parametrize(
    ("low", "high", "least", "most"),
    [(5.5, 7, HOLDS, OPEN), (5, 5.4, FAILS, HOLDS), (5, 6, OPEN, OPEN), (5.6, 7, HOLDS, FAILS)],
)
def test_bounds(low, high, least, most):
    found = Interval((low + high) / 2, low, high, 3)
    assert (at_least(found, 5.5), at_most(found, 5.5)) == (least, most)


def test_one_run_decides_nothing():
    assert interval([100.0]).high == math.inf
    assert at_least(interval([100.0]), 1) == at_most(interval([0.0]), 1) == equal(interval([0.0])) == OPEN


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-0.02, 0.02, HOLDS), (-0.03, 0.01, OPEN), (0.021, 0.5, FAILS), (-0.5, -0.03, FAILS), (-1, 1, OPEN)],
)
def test_equal_needs_the_whole_interval_within_the_margin(low, high, verdict):
    assert equal(Interval(0, low, high, 3)) == verdict


def test_several_conditions():
    assert together([HOLDS, HOLDS]) == HOLDS and together([FAILS]) == FAILS and together([OPEN, OPEN]) == OPEN
    assert together([HOLDS, FAILS]) == together([HOLDS, FAILS, OPEN]) == together([PART, OPEN]) == PART
    assert together([HOLDS, OPEN]) == together([FAILS, OPEN]) == OPEN


def test_no_verdict_from_models_that_counting_beats():
    assert beyond_counting(HOLDS, [70.0, 77.9], 78.0) == HOLDS
    assert beyond_counting(HOLDS, [70.0, 78.0], 78.0) == OPEN
