"""Statistics of shares, paired runs and curves: intervals, the size and certainty of a saving, and when a curve meets a
target.

Runs are paired by seed. For pairs (a_i, b_i) of baseline and other, differences d_i = b_i - a_i:

    p-value        two-sided paired t-test, `scipy.stats.ttest_rel`
    effect size    Cohen's d_z = mean(d) / sd(d), sd with n - 1
    interval       95 % of the mean, mean(d) -+ t(0.975, n - 1) * sd(d) / sqrt(n)

With one pair there is a difference but no p-value, effect size or interval: they are None. If all differences are
equal, there is no p-value or effect size.

Curves are taken as linear between evaluations, in seconds, kWh and steps as well as in loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from hf_dbp.errors import UserError

__all__ = ["Mean", "Paired", "crossing", "margin", "mean_interval", "paired_test", "value_at", "wilson_interval"]

CONFIDENCE = 0.95
ROUNDING = 1e-10  # differences that vary by less than this, relative to the values, are equal
Point = tuple[float, float]


@dataclass(frozen=True)
class Mean:
    """A mean of n values, their standard deviation (n - 1) and the mean's 95 % interval; None if n = 1."""

    mean: float
    n: int
    sd: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Paired:
    """A paired comparison as in the module's docstring.

    ``percent`` is the mean of 100 * d_i / a_i, with interval, over the pairs whose baseline is not 0; None without any.
    """

    n: int
    baseline: float
    other: float
    difference: Mean
    percent: Mean | None
    p_value: float | None = None
    effect_size: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def wilson_interval(hits: int, trials: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of the share ``hits / trials``."""
    interval = stats.binomtest(hits, trials).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: Sequence[float]) -> Mean:
    """Mean, standard deviation and the t-based 95 % interval of the mean.

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0 or not np.isfinite(x).all():
        raise UserError(f"a mean needs finite values, got {list(values)}")
    mean, n = float(x.mean()), int(x.size)
    if n == 1:
        return Mean(mean, n)
    sd = float(x.std(ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * sd / math.sqrt(n)
    return Mean(mean, n, sd, mean - half, mean + half)


def paired_test(baseline: Sequence[float], other: Sequence[float]) -> Paired:
    """Compare paired values, with the same seed at the same position.

    Raises:
        ValueError: the sides differ in length or are empty, or a value is not finite.
    """
    if len(baseline) != len(other):
        raise UserError(f"pairs need as many values on both sides, got {len(baseline)} and {len(other)}")
    a, b = np.asarray(baseline, dtype=np.float64), np.asarray(other, dtype=np.float64)
    d = b - a
    difference, relative = mean_interval(d.tolist()), 100 * d[a != 0] / a[a != 0]
    percent = mean_interval(relative.tolist()) if relative.size else None
    p_value = effect_size = None
    if difference.sd is not None and difference.sd > ROUNDING * np.abs([a, b]).max():
        p_value = float(stats.ttest_rel(b, a).pvalue)
        effect_size = difference.mean / difference.sd
    return Paired(len(a), float(a.mean()), float(b.mean()), difference, percent, p_value, effect_size)


def margin(baseline: dict[int, float], other: dict[int, float]) -> dict[str, Any] | None:
    """The paired test of the final values, and how many of its standard errors the other's mean lies below the
    baseline's."""
    seeds = sorted(baseline.keys() & other.keys())
    if not seeds:
        return None
    test = paired_test([baseline[s] for s in seeds], [other[s] for s in seeds])
    sd = mean_interval([other[s] for s in seeds]).sd
    errors = (test.baseline - test.other) * math.sqrt(len(seeds)) / sd if sd else None
    return test.to_dict() | {"standard_errors": errors}


def crossing(points: Sequence[Point], target: float) -> float | None:
    """Where a falling curve first reaches ``target``: the x at which the line between two evaluations meets it.

    Args:
        points: (x, loss) by rising x; losses that are not finite are skipped.
        target: a loss.

    Returns:
        x; that of the first point if it is already at or below the target; None if no point is.
    """
    before: Point | None = None
    for x, loss in points:
        if not math.isfinite(loss):
            continue
        if loss <= target:
            if before is None or before[1] == loss:
                return x
            return before[0] + (x - before[0]) * (before[1] - target) / (before[1] - loss)
        before = (x, loss)
    return None


def value_at(points: Sequence[Point], x: float) -> float | None:
    """The curve's value at ``x``, on the line between the two evaluations around it.

    Returns:
        The value; the last one if the curve ends before ``x``; None if it begins after ``x`` or has no finite value.
    """
    finite = [point for point in points if math.isfinite(point[1])]
    if not finite or x < finite[0][0]:
        return None
    return float(np.interp(x, [point[0] for point in finite], [point[1] for point in finite]))
