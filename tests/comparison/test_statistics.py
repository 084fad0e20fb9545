"""Statistics agree with SciPy and R on known data, and return None where they are undefined."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hf_dbp.comparison.statistics import crossing, mean_interval, paired_test, value_at, wilson_interval

# Student's sleep data (1908): extra hours of sleep of ten patients under two drugs; R's t.test(..., paired = TRUE)
# gives t = -4.0621, df = 9, p-value = 0.002833, 95 percent interval of the difference -2.4598858 -0.7001142
DRUG_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
DRUG_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
finite = st.floats(0.1, 10.0)


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (7, 10), (10, 10), (412, 1000)])
def test_wilson_interval_is_scipys(hits, trials):
    expected = stats.binomtest(hits, trials).proportion_ci(method="wilson")
    assert wilson_interval(hits, trials) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_students_sleep_data():
    shifted = [[x + 10 for x in drug] for drug in (DRUG_1, DRUG_2)]
    result = paired_test(*shifted)
    assert result.n == 10
    assert result.difference.mean == pytest.approx(1.58)
    assert (result.difference.low, result.difference.high) == pytest.approx((0.7001142, 2.4598858))
    assert result.p_value == pytest.approx(0.002833, abs=5e-7)
    assert result.effect_size == pytest.approx(4.0621 / math.sqrt(10), rel=1e-4)


def test_nothing_is_relative_to_zero():
    result = paired_test(DRUG_1, DRUG_2)  # one of them is 0.0 hours
    assert (result.difference.n, result.percent.n) == (10, 9)
    kept = [(a, b) for a, b in zip(DRUG_1, DRUG_2, strict=True) if a]
    assert result.percent == paired_test(*zip(*kept, strict=True)).percent
    assert paired_test([0.0, 0.0], [0.0, 1.0]).percent is None


@given(st.lists(st.tuples(finite, finite), min_size=2, max_size=8))
def test_it_equals_scipy(pairs):
    a, b = (np.array(side) for side in zip(*pairs, strict=True))
    result = paired_test(a.tolist(), b.tolist())
    if np.ptp(b - a) < 1e-9:
        return
    reference = stats.ttest_rel(b, a)
    interval = reference.confidence_interval(0.95)
    assert result.p_value == pytest.approx(reference.pvalue)
    assert (result.difference.low, result.difference.high) == pytest.approx((interval.low, interval.high))
    percent = 100 * (b - a) / a
    low, high = stats.t.interval(0.95, len(a) - 1, loc=percent.mean(), scale=stats.sem(percent))
    if result.percent.sd > 1e-9:
        assert (result.percent.low, result.percent.high) == pytest.approx((low, high))


def test_one_pair_gives_a_difference_and_no_certainty():
    result = paired_test([2.0], [1.5])
    assert (result.difference.mean, result.percent.mean) == (-0.5, -25.0)
    assert result.p_value is result.effect_size is result.difference.low is result.percent.sd is None


def test_equal_differences_have_no_p_value():
    result = paired_test([1.0, 2.0], [1.5, 2.5])
    assert result.p_value is None
    assert (result.difference.low, result.difference.high) == (0.5, 0.5)


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0, 2.0]), ([], []), ([1.0, math.nan], [1.0, 1.0])])
def test_what_cannot_be_compared_is_refused(a, b):
    with pytest.raises(ValueError, match=r"pairs need|finite"):
        paired_test(a, b)
    with pytest.raises(ValueError, match="finite"):
        mean_interval([math.inf])


def test_a_crossing_lies_between_evaluations():
    curve = [(10.0, 1.0), (20.0, 0.5), (30.0, 0.7), (40.0, 0.4)]
    assert crossing(curve, 0.75) == 15.0
    assert crossing(curve, 0.5) == 20.0
    assert crossing(curve, 0.45) == pytest.approx(30 + 10 * 0.25 / 0.3)
    assert crossing(curve, 2.0) == 10.0  # there from the first evaluation on
    assert crossing(curve, 0.3) is None
    assert crossing([(1.0, math.nan), (2.0, 1.0), (3.0, math.nan), (4.0, 0.0)], 0.5) == 3.0
    assert crossing([], 0.5) is None


def test_a_value_lies_between_evaluations():
    curve = [(10.0, 1.0), (20.0, 0.5), (30.0, math.nan)]
    assert value_at(curve, 12.0) == pytest.approx(0.9)
    assert value_at(curve, 99.0) == 0.5
    assert value_at(curve, 5.0) is None
    assert value_at([], 5.0) is None


@given(st.lists(finite, min_size=2, max_size=8, unique=True), st.floats(0.0, 1.0))
def test_the_crossing_is_where_the_curve_has_the_target(losses, share):
    falling = sorted(losses, reverse=True)
    curve = [(float(x), loss) for x, loss in enumerate(falling)]
    target = falling[-1] + share * (falling[0] - falling[-1])
    assert value_at(curve, crossing(curve, target)) == pytest.approx(target)
