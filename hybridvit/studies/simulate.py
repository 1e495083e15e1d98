"""What the statistics of a report keep of their promises, on accuracies whose truth is known.

`python -m hybridvit.studies.simulate` prints the table of `docs/statistics.md`; it takes about a
minute. Each study draws the accuracies of some arms and of a baseline over n seeds, and goes
through the functions that a report uses.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from hybridvit.studies.statistics import LEVEL, Difference, paired_difference, together

STUDIES = 2000
SEEDS = (3, 5, 10)
# How many arms there are beside the baseline, and how many of them are truly worse.
PAGES = ((1, 0), (10, 0), (10, 5))
MEAN, STD = 0.9, 0.03  # of a run's accuracy
SHIFT = 4 * STD  # by which an arm is worse
LOOKS = ((3, 4, 5), (3, 5, 10))  # at one study, by number of seeds
TEST_IMAGES = 100  # which make the binomial's spread STD

HEADINGS = (
    "accuracies",
    "seeds",
    "arms (truly worse)",
    "false claims",
    "uncorrected",
    "one interval covers",
    "all joint intervals hold",
    "shown",
    "no interval",
)

Array = NDArray[np.float64]
Noise = Callable[[Generator, float, tuple[int, ...]], Array]


@dataclass(frozen=True)
class Setting:
    """What is simulated: `worse` of the `arms` differ from the baseline, the others do not."""

    noise: str
    seeds: int
    arms: int
    worse: int


@dataclass(frozen=True)
class Outcome:
    """Shares of studies, or of intervals for `coverage` and `without`; none where there are none.

    `uncorrected` is `false` as it would be if each 95 % interval were taken by itself. An interval
    that is not given counts as no claim, and in neither coverage.
    """

    false: float  # studies with a false claim
    uncorrected: float
    coverage: float | None  # of the 95 % interval of one difference
    joint: float | None  # studies in which all joint intervals hold
    shown: float | None  # of the arms that are truly worse
    without: float  # differences without an interval


def normal(rng: Generator, mean: float, shape: tuple[int, ...]) -> Array:
    """What a t interval assumes."""
    return rng.normal(mean, STD, shape)


def skewed(rng: Generator, mean: float, shape: tuple[int, ...]) -> Array:
    """Lognormal errors: most runs do well, a few badly. Skewness -6.2, before it is averaged."""
    centred = rng.lognormal(0, 1, shape) - math.exp(0.5)
    return mean - STD * centred / math.sqrt((math.e - 1) * math.e)


def binomial(rng: Generator, mean: float, shape: tuple[int, ...]) -> Array:
    """Hits among few test images, so that differences are coarse and sometimes equal."""
    return rng.binomial(TEST_IMAGES, mean, shape) / TEST_IMAGES


def steady(rng: Generator, mean: float, shape: tuple[int, ...]) -> Array:
    """Runs that hardly differ."""
    return rng.normal(mean, STD / 10, shape)


# Noise of the arms and of the baseline. Skewness of both sides cancels in a difference.
NOISES: dict[str, tuple[Noise, Noise]] = {
    "normal": (normal, normal),
    "skewed alike": (skewed, skewed),
    "skewed against steady": (skewed, steady),
    "binomial": (binomial, binomial),
}


def simulate(setting: Setting, studies: int, seed: int = 0) -> Outcome:
    """So many studies of a setting."""
    rng = np.random.default_rng(seed)
    noise, baseline_noise = NOISES[setting.noise]
    shifts = np.where(np.arange(setting.arms) < setting.worse, -SHIFT, 0.0)
    baseline = baseline_noise(rng, MEAN, (studies, setting.seeds))
    arms = np.stack(
        [noise(rng, MEAN + shift, (studies, setting.seeds)) for shift in shifts], axis=1
    )
    truth = [float(shift) for shift in shifts]
    false, uncorrected, whole, joint = 0, 0, 0, 0
    held: list[bool] = []
    shown = 0
    for study, base in zip(arms.tolist(), baseline.tolist(), strict=True):
        alone = [paired_difference(values, base) for values in study]
        page = together(alone)
        false += any(map(_is_false, page, truth))
        uncorrected += any(map(_is_false, alone, truth))
        held += [h for h in map(_holds, alone, truth) if h is not None]
        joints = [h for h in map(_holds, page, truth) if h is not None]
        whole += bool(joints)
        joint += bool(joints) and all(joints)
        shown += sum(t < 0 and d.verdict == "worse" for d, t in zip(page, truth, strict=True))
    pairs = studies * setting.arms
    return Outcome(
        false=false / studies,
        uncorrected=uncorrected / studies,
        coverage=sum(held) / len(held) if held else None,
        joint=joint / whole if whole else None,
        shown=shown / (studies * setting.worse) if setting.worse else None,
        without=1 - len(held) / pairs,
    )


def after_looks(looks: Sequence[int], studies: int, seed: int = 0) -> float:
    """Share of studies of one comparison, of arms that do not differ, with a claim at any of so
    many seeds: what is false where seeds are added until there is one."""
    rng = np.random.default_rng(seed)
    arms = normal(rng, MEAN, (2, studies, max(looks))).tolist()
    return (
        sum(
            any(_is_false(paired_difference(a[:n], b[:n]), 0.0) for n in looks)
            for a, b in zip(*arms, strict=True)
        )
        / studies
    )


def table(studies: int, seed: int = 0) -> Iterator[str]:
    """Markdown lines: every setting with what came out, in per cent."""
    yield "| " + " | ".join(HEADINGS) + " |"
    yield "|" + "---|" * len(HEADINGS)
    for noise, (arms, worse), seeds in itertools.product(NOISES, PAGES, SEEDS):
        setting = Setting(noise, seeds, arms, worse)
        o = simulate(setting, studies, seed)
        shares = (o.false, o.uncorrected, o.coverage, o.joint, o.shown, o.without)
        cells = (noise, str(seeds), f"{arms} ({worse})", *map(_per_cent, shares))
        yield "| " + " | ".join(cells) + " |"


def monte_carlo_error(share: float, studies: int) -> float:
    """Standard error of a share of independent studies."""
    return math.sqrt(share * (1 - share) / studies)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=STUDIES)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for line in table(arguments.studies, arguments.seed):
        print(line, flush=True)
    for looks in LOOKS:
        share = 100 * after_looks(looks, 10 * arguments.studies, arguments.seed)
        print(f"\none comparison, looked at after {looks} seeds: {share:.1f} % false claims")
    error = monte_carlo_error(1 - LEVEL, arguments.studies)
    print(f"\n{arguments.studies} studies; Monte Carlo error of 5 %: {100 * error:.2f} points")


def _is_false(d: Difference, truth: float) -> bool:
    """Whether a difference is claimed that is none, or the other way round."""
    return (d.verdict == "better" and truth <= 0) or (d.verdict == "worse" and truth >= 0)


def _holds(d: Difference, truth: float) -> bool | None:
    if d.low is None or d.high is None:
        return None
    is_claimed_none = truth == 0 and d.verdict in ("better", "worse")  # an end of 0 is outside
    return d.low <= truth <= d.high and not is_claimed_none


def _per_cent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


if __name__ == "__main__":
    main()
