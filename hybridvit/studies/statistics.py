"""What a handful of seeds can say: means, spreads and paired differences.

Intervals are Student's t over seeds (Student, "The probable error of a mean", 1908). They assume
roughly normal seed-to-seed noise and say nothing about the sampling error of the test split. A
bootstrap is no way around few seeds: over three it covers far less than it promises.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MIN_SEEDS = 3  # below this no interval is given
LEVEL = 0.95

Verdict = Literal["better", "worse", "not distinguishable", "no interval", "no spread"]


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences a - b, in the units of the values.

    `low` and `high` are the ends of the 95 % interval: none below three pairs ("no interval"), and
    none where all pairs differ by the same amount ("no spread"), because an interval of zero width
    would claim a certainty that a few equal numbers do not carry.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    verdict: Verdict


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1 below); the latter is none for a single value.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    _check(values)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % t interval of the mean; none below three values or where all are equal.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    mean, std = mean_std(values)
    if len(values) < MIN_SEEDS or std is None or _is_rounding(std, values):
        return None
    half = _t_quantile(len(values) - 1) * std / math.sqrt(len(values))
    return mean - half, mean + half


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Difference a - b of values that belong together in order (the same seed), paired t.

    Raises:
        ValueError: no pairs, lengths that differ, or a value that is not finite.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values do not pair; give one of each for a seed")
    _check(a)
    _check(b)
    differences = [x - y for x, y in zip(a, b, strict=True)]
    n, mean = len(differences), statistics.fmean(differences)
    if n < MIN_SEEDS:
        return Difference(mean, None, None, n, "no interval")
    if _is_rounding(statistics.stdev(differences), [*a, *b]):
        return Difference(mean, None, None, n, "no spread")
    interval = mean_interval(differences)
    assert interval is not None
    low, high = interval
    verdict: Verdict = "better" if low > 0 else "worse" if high < 0 else "not distinguishable"
    return Difference(mean, low, high, n, verdict)


def _check(values: Sequence[float]) -> None:
    if not values:
        raise ValueError("no values to average; give at least one")
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"{value} is no finite value; leave out runs that diverged")


def _is_rounding(std: float, values: Sequence[float]) -> bool:
    """Whether a spread is what float subtraction leaves of equal values."""
    return std <= 1e-12 * max(abs(v) for v in values) or std == 0


def _t_quantile(degrees: int) -> float:
    # scipy.special, because scipy.stats takes most of a second to import.
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.5 + LEVEL / 2))
