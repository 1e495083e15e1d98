import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hybridvit.studies import simulate as module
from hybridvit.studies.simulate import (
    MEAN,
    NOISES,
    STD,
    Setting,
    monte_carlo_error,
    simulate,
    table,
)

STUDIES = 1500
ERROR = monte_carlo_error(0.05, STUDIES)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(("arms", "worse"), [(1, 0), (6, 3)])
def test_normal_accuracies_keep_every_promise(seeds: int, arms: int, worse: int) -> None:
    o = simulate(Setting("normal", seeds, arms, worse), STUDIES)
    assert o.false <= 0.05 + 3 * ERROR
    assert o.joint is not None
    assert o.joint >= 0.95 - 3 * ERROR
    # Arms share a baseline, so that intervals of a study are no independent trials.
    assert o.coverage == pytest.approx(0.95, abs=3 * ERROR)
    assert o.without == 0
    assert (o.shown is None) == (worse == 0)


def test_one_difference_is_false_or_covered() -> None:
    o = simulate(Setting("normal", 3, 1, 0), 500)
    assert o.coverage == o.joint == pytest.approx(1 - o.false)
    assert o.false == o.uncorrected


def test_a_simulation_notices_what_is_not_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting("normal", 5, 10, 0)
    assert simulate(setting, 300).uncorrected > 0.2
    monkeypatch.setattr(module, "together", list)
    broken = simulate(setting, 300)
    assert broken.false == broken.uncorrected > 0.2
    assert broken.joint is not None
    assert broken.joint < 0.8


def test_a_simulation_notices_a_bootstrap_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its percentile interval goes from the smallest to the largest of three (each comes out alone
    # in 1 of 27 resamples, more than 2.5 %): false whenever all have one sign, in 1 of 4 studies.
    def bootstrap(a: list[float], b: list[float]) -> module.Difference:
        d = [x - y for x, y in zip(a, b, strict=True)]
        low, high = min(d), max(d)
        verdict = "better" if low > 0 else "worse" if high < 0 else "not distinguishable"
        return module.Difference(sum(d) / 3, 1.0, low, high, 3, verdict)

    monkeypatch.setattr(module, "paired_difference", bootstrap)
    false = simulate(Setting("normal", 3, 1, 0), STUDIES).uncorrected
    assert false == pytest.approx(0.25, abs=4 * monte_carlo_error(0.25, STUDIES))


def test_a_corrected_bootstrap_of_three_is_no_better() -> None:
    # BCa (Efron 1987) over all 27 resamples, on differences that are none.
    def ends(d: np.ndarray) -> np.ndarray:
        means = np.sort([np.mean(x) for x in itertools.product(d, repeat=3)])
        below = (means < d.mean() - 1e-12).mean() + (means <= d.mean() + 1e-12).mean()
        bias = stats.norm.ppf(below / 2)
        left = d.mean() - np.array([np.delete(d, i).mean() for i in range(3)])
        acceleration = (left**3).sum() / (6 * (left**2).sum() ** 1.5)
        z = bias + stats.norm.ppf([0.025, 0.975])
        p = stats.norm.cdf(bias + z / (1 - acceleration * z))
        return means[np.clip((27 * p).astype(int), 0, 26)]

    studies = np.random.default_rng(0).normal(size=(STUDIES, 3))
    intervals = [ends(d) for d in studies]
    false = np.mean([low > 0 or high < 0 for low, high in intervals])
    assert false == pytest.approx(0.26, abs=4 * monte_carlo_error(0.26, STUDIES))


def test_far_arms_are_shown_and_equal_ones_are_not() -> None:
    o = simulate(Setting("normal", 10, 4, 2), 300)
    assert o.shown is not None
    assert o.shown > 0.99
    assert o.false < 0.1


def test_coarse_accuracies_leave_differences_without_an_interval() -> None:
    # Three equal differences of two binomials: the sum of the cubed probabilities.
    hits = np.convolve(
        stats.binom.pmf(np.arange(101), 100, MEAN), stats.binom.pmf(np.arange(101), 100, MEAN)[::-1]
    )
    expected = float((hits**3).sum())
    found = simulate(Setting("binomial", 3, 2, 0), STUDIES).without
    assert found == pytest.approx(expected, abs=4 * math.sqrt(expected / (2 * STUDIES)))


@pytest.mark.parametrize("name", NOISES)
def test_noises_have_the_mean_and_spread_that_they_say(name: str) -> None:
    rng = np.random.default_rng(0)
    for noise in NOISES[name]:
        x = noise(rng, MEAN, (400_000,))
        assert x.mean() == pytest.approx(MEAN, abs=5 * STD / math.sqrt(400_000))
        assert x.std() == pytest.approx(STD / 10 if noise is module.steady else STD, rel=0.05)
    # Heavy tails: the sample's skewness settles slowly at -6.2.
    skewness = stats.skew(NOISES[name][0](rng, MEAN, (400_000,)))
    assert (skewness < -3) == name.startswith("skewed")


def test_the_docs_have_what_the_simulation_says() -> None:
    text = (Path(__file__).parents[2] / "docs" / "statistics.md").read_text()
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]
    shown = {tuple(row[:3]): row[3:] for row in rows if len(row) == len(module.HEADINGS)}
    assert len(shown) == 1 + len(NOISES) * len(module.SEEDS) * len(module.PAGES) + 1
    for name in NOISES:
        o = simulate(Setting(name, 3, 1, 0), module.STUDIES)
        false, _, coverage, *_ = shown[name, "3", "1 (0)"]
        # Other versions of numpy may draw other numbers.
        error = 100 * monte_carlo_error(o.false, module.STUDIES)
        assert float(false) == pytest.approx(100 * o.false, abs=4 * error)
        assert o.coverage is not None
        assert float(coverage) == pytest.approx(100 * o.coverage, abs=4 * error)


@pytest.mark.parametrize(("looks", "documented"), [((3, 4, 5), 10), ((3, 5, 10), 12)])
def test_looking_until_there_is_a_verdict(looks: tuple[int, ...], documented: float) -> None:
    """As scipy's t test has it, and as the docs say."""
    x = np.random.default_rng(1).normal(size=(100_000, max(looks)))
    claimed = [stats.ttest_1samp(x[:, :n], 0, axis=1).pvalue < 0.05 for n in looks]
    expected = np.any(claimed, axis=0).mean()
    assert 100 * expected == pytest.approx(documented, abs=0.5)
    found = module.after_looks(looks, 4000)
    assert found == pytest.approx(expected, abs=4 * monte_carlo_error(expected, 4000))
    text = (Path(__file__).parents[2] / "docs" / "statistics.md").read_text()
    assert re.search(
        rf"{', '.join(map(str, looks[:-1]))} and {looks[-1]} .*?in {documented} %",
        " ".join(text.split()),
    )


def test_table_and_command() -> None:
    lines = list(table(3))
    assert len(lines) == 2 + len(NOISES) * 9
    assert len({line.count("|") for line in lines}) == 1
    command = [sys.executable, "-m", "hybridvit.studies.simulate", "--studies", "2"]
    out = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "Monte Carlo error of 5 %: 15.41 points" in out.stdout
