"""What a handful of seeds can say: means, spreads, paired differences, several of them at once,
and how many seeds a difference needs.

Intervals are Student's t over seeds (Student, "The probable error of a mean", 1908). They assume
roughly normal seed-to-seed noise and say nothing about the sampling error of the test split. A
bootstrap is no way around few seeds: over three it covers far less than it promises. It serves for
test images, of which there are many. `docs/statistics.md` has the reasons and simulations.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

MIN_SEEDS = 3  # below this no interval is given
LEVEL = 0.95
POWER = 0.8  # chance of showing a difference for which seeds are planned
MAX_SEEDS = 1000  # beyond which nobody plans
MIN_EXAMPLES = 20  # below this no bootstrap is made

Verdict = Literal["better", "worse", "not distinguishable", "no interval", "no spread", "diverged"]


@dataclass(frozen=True)
class Seeds:
    """How many seeds a difference needs; none: more than `MAX_SEEDS`.

    `low` and `high` are the numbers at the ends of the 95 % interval of the standard deviation, of
    which a few seeds say little.
    """

    number: int | None
    low: int | None
    high: int | None


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences a - b, in the units of the values.

    `low` and `high` are the ends of the 95 % interval: none below three pairs ("no interval"), and
    none where all pairs differ by the same amount ("no spread"), because an interval of zero width
    would claim a certainty that a few equal numbers do not carry. Nor is there one where a run of
    either side "diverged", as the caller knows: the others are what went well. An end of exactly 0
    is itself outside: the verdict is "better" or "worse" if and only if not `low < 0 < high`.
    """

    mean: float
    std: float | None  # sample standard deviation of the differences; none for a single one
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
    half = _t_quantile(len(values) - 1, 0.5 - LEVEL / 2) * std / math.sqrt(len(values))
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
    n, (mean, std) = len(differences), mean_std(differences)
    if n < MIN_SEEDS or std is None:
        return Difference(mean, std, None, None, n, "no interval")
    if _is_rounding(std, [*a, *b]):
        return Difference(mean, std, None, None, n, "no spread")
    (alone,) = together([Difference(mean, std, mean, mean, n, "not distinguishable")])
    return alone


def together(differences: Sequence[Difference]) -> list[Difference]:
    """The same differences as claims that stand on one page: Holm's verdicts, joint intervals.

    Each of the m differences with an interval could be claimed to be better or worse, which makes
    2m one-sided hypotheses. Holm ("A simple sequentially rejective multiple test procedure", 1979)
    rejects them one by one, with k rejected at level 5 % / (2m - k). The intervals are those that
    belong to it (Strassburger and Bretz, "Compatible simultaneous lower confidence bounds for the
    Holm procedure", 2008; Guilbaud 2008): all of them hold at once in at least 95 % of studies,
    however the differences depend on each other, and exclude zero exactly where Holm rejects. A
    claim's interval begins at zero as long as another one is open: that is what the later, easier
    steps cost. One difference alone has the ordinary t interval. Differences without an interval
    claim nothing and come back as they are.
    """
    m = sum(d.low is not None for d in differences)
    claimed: set[int] = set()
    while m:
        tail = (1 - LEVEL) / (2 * m - len(claimed))
        found = {
            i
            for i, d in enumerate(differences)
            if d.low is not None and i not in claimed and abs(d.mean) >= _half(d, tail)
        }
        if not found:
            break
        claimed |= found
    near: float | None = None
    if len(claimed) == m:  # no zero difference is left to guard: 5 % over m + 1 is enough for the
        tail = (1 - LEVEL) / (m + 1)  # far ends, and the rest serves the near ones
        near = tail / m if m else None
    return [
        d if d.low is None else _joint(d, tail, near, is_claimed=i in claimed)
        for i, d in enumerate(differences)
    ]


def detectable(n: int, claims: int = 1) -> float:
    """The smallest true difference that n seeds show with a probability of `POWER`.

    In standard deviations of the paired differences, by the noncentral t distribution; for one of
    several claims, that it is shown at Holm's first and hardest step.

    Raises:
        ValueError: fewer than three seeds, or no claim.
    """
    from scipy.special import nctdtrinc

    if n < MIN_SEEDS or claims < 1:
        raise ValueError(f"n={n}, claims={claims}: power needs three seeds and one claim at least")
    quantile = _t_quantile(n - 1, (1 - LEVEL) / (2 * claims))
    return float(nctdtrinc(n - 1, 1 - POWER, quantile)) / math.sqrt(n)


def seeds_needed(std: float, n: int, smallest: float, claims: int = 1) -> Seeds:
    """How many seeds show a difference of `smallest` with a probability of `POWER`.

    Args:
        std: sample standard deviation of n paired differences, which is all that is taken from
            them: the power of a difference once observed says no more than its p-value.
        smallest: the smallest difference of interest, in the units of `std`.
        claims: how many differences stand on the page.

    Raises:
        ValueError: fewer than two differences, or a spread or difference that is not above zero.
    """
    from scipy.special import chdtri

    if n < 2 or not (std > 0 and smallest > 0) or not math.isfinite(std + smallest):
        raise ValueError(
            f"std={std} of n={n} and smallest={smallest} say nothing about the seeds needed; "
            "give a spread of two or more differences and a difference of interest, above zero"
        )
    ends = (0.5 - LEVEL / 2, 0.5 + LEVEL / 2)
    low, high = (std * math.sqrt((n - 1) / float(chdtri(n - 1, p))) for p in ends)
    return Seeds(*(_seeds(smallest / s, claims) for s in (std, low, high)))


def example_interval(differences: Sequence[int], seeds: int) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of the mean over test images; none where all are equal.

    It says how much the choice of test images matters for these trained models, and nothing about
    other seeds. Resampling whole images keeps what models get right together. The resampled sum is
    one of independent whole numbers, whose distribution a Fourier transform gives without drawing.

    Args:
        differences: of each image, in how many seeds one side is right minus in how many the other.
        seeds: by which they are divided.

    Raises:
        ValueError: fewer than twenty images.
    """
    import numpy as np

    n = len(differences)
    if n < MIN_EXAMPLES:
        raise ValueError(f"{n} test images are too few for a bootstrap; give {MIN_EXAMPLES}")
    values = np.asarray(differences)
    lowest = int(values.min())
    counts = np.bincount(values - lowest)
    if len(counts) == 1:
        return None
    places = n * (len(counts) - 1) + 1  # of the sum
    size = 1 << (places - 1).bit_length()
    chances = np.fft.irfft(np.fft.rfft(counts / n, size) ** n, size)
    low, high = np.searchsorted(np.cumsum(chances), (0.5 - LEVEL / 2, 0.5 + LEVEL / 2))
    return (lowest + int(low) / n) / seeds, (lowest + int(high) / n) / seeds


def _joint(d: Difference, tail: float, near: float | None, *, is_claimed: bool) -> Difference:
    """A difference with its far end at a tail level, and a claimed one's near end at another."""
    far = _half(d, tail)
    if not is_claimed:
        return replace(d, low=d.mean - far, high=d.mean + far, verdict="not distinguishable")
    end = 0.0 if near is None else max(0.0, abs(d.mean) - _half(d, near))
    if d.mean > 0:
        return replace(d, low=end, high=d.mean + far, verdict="better")
    return replace(d, low=d.mean - far, high=-end, verdict="worse")


def _half(d: Difference, tail: float) -> float:
    assert d.std is not None
    return _t_quantile(d.n - 1, tail) * d.std / math.sqrt(d.n)


def _seeds(effect: float, claims: int) -> int | None:
    """The fewest seeds that show a difference of so many standard deviations."""
    if detectable(MAX_SEEDS, claims) > effect:
        return None
    return bisect.bisect_left(
        range(MAX_SEEDS), True, lo=MIN_SEEDS, key=lambda n: detectable(n, claims) <= effect
    )


def _check(values: Sequence[float]) -> None:
    if not values:
        raise ValueError("no values to average; give at least one")
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"{value} is no finite value; a run that diverged has no result")


def _is_rounding(std: float, values: Sequence[float]) -> bool:
    """Whether a spread is what float subtraction leaves of equal values."""
    return std <= 1e-12 * max(abs(v) for v in values) or std == 0


@lru_cache(maxsize=4096)
def _t_quantile(degrees: int, tail: float) -> float:
    """Above which Student's t lies with probability `tail`."""
    # scipy.special, because scipy.stats takes most of a second to import.
    from scipy.special import stdtrit

    return -float(stdtrit(degrees, tail))
