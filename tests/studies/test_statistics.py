import inspect
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from hybridvit.studies.statistics import (
    Difference,
    detectable,
    example_interval,
    mean_interval,
    mean_std,
    paired_difference,
    seeds_needed,
    together,
)

# Two-sided 95 % quantiles of Student's t, from a printed table.
T_TABLE = {2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262}


def test_mean_and_sample_deviation() -> None:
    mean, std = mean_std([0.90, 0.92, 0.97])
    assert mean == pytest.approx(0.93)
    assert std == pytest.approx(math.sqrt((0.03**2 + 0.01**2 + 0.04**2) / 2))
    assert mean_std([0.5]) == (0.5, None)


@pytest.mark.parametrize("n", [3, 4, 5, 10])
def test_paired_interval_agrees_with_the_closed_form_and_with_scipy(n: int) -> None:
    a = [0.9 + 0.01 * math.sin(3 * k) for k in range(n)]
    b = [0.88 + 0.02 * math.cos(5 * k) for k in range(n)]
    d = paired_difference(a, b)
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean = sum(differences) / n
    std = math.sqrt(sum((x - mean) ** 2 for x in differences) / (n - 1))
    half = T_TABLE[n - 1] * std / math.sqrt(n)
    assert d.low is not None
    assert d.high is not None
    assert (d.mean, d.n) == (pytest.approx(mean), n)
    assert (d.low, d.high) == (
        pytest.approx(mean - half, abs=1e-5),
        pytest.approx(mean + half, abs=1e-5),
    )
    reference = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (d.low, d.high) == (pytest.approx(reference.low), pytest.approx(reference.high))


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([0.92, 0.93, 0.925], [0.90, 0.909, 0.904], "better"),
        ([0.90, 0.909, 0.904], [0.92, 0.93, 0.925], "worse"),
        ([0.92, 0.90, 0.95], [0.91, 0.93, 0.92], "not distinguishable"),
        ([0.99, 0.98], [0.1, 0.1], "no interval"),
        ([0.99], [0.1], "no interval"),
        ([0.3, 0.4, 0.5], [0.2, 0.3, 0.4], "no spread"),  # equal but for float rounding
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], "no spread"),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], "no spread"),
    ],
)
def test_verdict(a: list[float], b: list[float], verdict: str) -> None:
    d = paired_difference(a, b)
    assert d.verdict == verdict
    assert (d.low is None) == (d.high is None) == (verdict in ("no interval", "no spread"))


def test_pairing_uses_the_pairs() -> None:
    # Seeds that vary widely but together: paired, the difference is plain; unpaired it is not.
    a, b = [0.52, 0.721, 0.92], [0.50, 0.70, 0.901]
    assert paired_difference(a, b).verdict == "better"
    assert stats.ttest_ind(a, b).pvalue > 0.5


def test_mean_interval() -> None:
    values = [0.90, 0.92, 0.97]
    interval = mean_interval(values)
    half = T_TABLE[2] * 0.0360555 / math.sqrt(3)
    assert interval == (pytest.approx(0.93 - half, abs=1e-4), pytest.approx(0.93 + half, abs=1e-4))
    assert mean_interval(values[:2]) is None
    assert mean_interval([0.1, 0.1, 0.1]) is None


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        ([], [], "no values to average"),
        ([0.1], [0.1, 0.2], "1 and 2 values do not pair"),
        ([math.nan], [0.1], "nan is no finite value"),
        ([0.1], [math.inf], "inf is no finite value"),
    ],
)
def test_bad_values(a: list[float], b: list[float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        paired_difference(a, b)


def random_page(rng: np.random.Generator) -> list[list[float]]:
    """Paired differences of up to six comparisons: some large, some none, other numbers of seeds,
    rounded so that ties and equal ones come up."""
    page = []
    for _ in range(rng.integers(1, 7)):
        n = int(rng.choice([2, 3, 3, 5, 10]))
        effect = rng.choice([0.0, 0.0, 1.0, 5.0, 30.0]) * rng.choice([-1, 1])
        noise = rng.choice([0.01, 1.0, 1.0])  # rounded below: the former may leave no spread
        page.append([round(float(x), 2) for x in rng.normal(effect, noise, n)])
    return page


def differences_of(page: list[list[float]]) -> list[Difference]:
    return [paired_difference(x, [0.0] * len(x)) for x in page]


def textbook_holm(page: list[list[float]]) -> list[str | None]:
    """Holm over two one-sided p-values a comparison, sorted and stepped through."""
    p_values = []
    for i, x in enumerate(page):
        if len(x) >= 3 and len(set(x)) > 1:
            statistic = np.mean(x) / (np.std(x, ddof=1) / math.sqrt(len(x)))
            for sign, verdict in ((1, "better"), (-1, "worse")):
                p_values.append((stats.t.sf(sign * statistic, len(x) - 1), i, verdict))
    verdicts: list[str | None] = [None] * len(page)
    for rank, (p, i, verdict) in enumerate(sorted(p_values)):
        if p > 0.05 / (len(p_values) - rank):
            break
        verdicts[i] = verdict
    return verdicts


def test_verdicts_are_holms_and_agree_with_the_intervals() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(1500):
        page = random_page(rng)
        alone = differences_of(page)
        joint = together(alone)
        for a, d, expected in zip(alone, joint, textbook_holm(page), strict=True):
            seen.add(d.verdict)
            if a.low is None or a.high is None:
                assert d == a
                continue
            assert d.low is not None
            assert d.high is not None
            assert d.low <= d.mean <= d.high
            assert (d.verdict if d.verdict in ("better", "worse") else None) == expected
            is_out = not d.low < 0 < d.high
            assert is_out == (d.verdict in ("better", "worse"))
            if is_out:  # a claim of the page is a claim alone, and one of its direction
                assert a.verdict == d.verdict == ("better" if d.mean > 0 else "worse")
    assert seen == {"better", "worse", "not distinguishable", "no interval", "no spread"}


def test_agreement_at_the_very_edge() -> None:
    quantile = float(-stats.t.ppf(0.05 / 4, 2))
    for steps in range(-3, 4):
        mean = quantile / math.sqrt(3)
        for _ in range(abs(steps)):
            mean = math.nextafter(mean, math.inf if steps > 0 else 0)
        edge = Difference(mean, 1.0, 0.0, 0.0, 3, "not distinguishable")
        other = Difference(-0.1, 1.0, 0.0, 0.0, 3, "not distinguishable")
        d, _ = together([edge, other])
        assert d.low is not None
        assert d.high is not None
        assert (d.verdict == "better") == (not d.low < 0 < d.high)


def test_one_difference_has_the_ordinary_interval_and_order_does_not_matter() -> None:
    a, b = [0.92, 0.93, 0.925], [0.90, 0.909, 0.904]
    alone = paired_difference(a, b)
    assert together([alone]) == [alone]
    reference = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (alone.low, alone.high) == (pytest.approx(reference.low), pytest.approx(reference.high))
    assert together([]) == []
    page = differences_of([[1.0, 1.1, 0.9], [0.1, 0.5, -0.3], [5.0, 6.0, 5.5], [0.2, 0.1]])
    straight = together(page)
    for order in itertools.permutations(range(4)):
        assert together([page[i] for i in order]) == [straight[i] for i in order]


def test_no_point_that_its_level_cannot_refuse_lies_outside_the_joint_intervals() -> None:
    # The proof of joint coverage, by brute force. Each vector of true differences has a fixed test
    # of level 5 % (Bonferroni over the tails that could make a false claim there). The vectors not
    # refused cover the truth in 95 % of studies; the intervals must hold all of them.
    rng = np.random.default_rng(1)
    values = np.concatenate([np.linspace(-12, 12, 97), [-1e-9, 1e-9]])  # zero among them
    quantile = {tail: -stats.t.ppf(tail, 2) for tail in (0.05 / 2, 0.05 / 3, 0.05 / 4, 0.05 / 6)}
    grid = np.array(list(itertools.product(values, values)))
    zeros = (grid == 0).sum(axis=1)
    for _ in range(150):
        means, stds = rng.normal(0, 4, 2), rng.uniform(0.2, 2, 2)
        t = (means - grid) / (stds / math.sqrt(3))  # above what is true: positive
        is_kept = np.ones(len(grid), bool)
        for i in range(2):
            for z, near, far in ((0, 0.05 / 3, 0.05 / 6), (1, 0.05 / 3, 0), (2, 0.05 / 4, 0)):
                at = zeros == z
                # Too high could claim "better" falsely where the truth is at most zero.
                high = np.where(grid[:, i] <= 0, near, far)
                low = np.where(grid[:, i] >= 0, near, far)
                for tail, side in ((high, t[:, i]), (low, -t[:, i])):
                    limit = np.array([quantile.get(x, math.inf) for x in (near, far)])
                    is_kept &= ~at | (side <= np.where(tail == near, *limit))
        made = [
            Difference(float(m), float(s), 0.0, 0.0, 3, "not distinguishable")
            for m, s in zip(means, stds, strict=True)
        ]
        for i, d in enumerate(together(made)):
            assert d.low is not None
            assert d.high is not None
            kept = grid[is_kept, i]
            assert kept.min() >= d.low - 1e-12
            assert kept.max() <= d.high + 1e-12
            if d.verdict == "better":
                assert kept.min() > 0
            if d.verdict == "worse":
                assert kept.max() < 0


@pytest.mark.parametrize(
    "truth", [(0.0, 0.0, 0.0), (2.6, 0.0, 0.0), (3.5, 3.5, 0.0), (50.0, 50.0, 50.0)]
)
def test_joint_intervals_hold_together_in_95_of_100_studies(truth: tuple[float, ...]) -> None:
    studies, n = 4000, 5
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(studies, 3, n)) + rng.normal(size=(studies, 1, n))  # one baseline
    x = noise + np.array(truth)[:, None]
    missed, false = 0, 0
    for means, stds in zip(x.mean(axis=2), x.std(axis=2, ddof=1), strict=True):
        page = [
            Difference(float(m), float(s), 0.0, 0.0, n, "not distinguishable")
            for m, s in zip(means, stds, strict=True)
        ]
        ends = [(d, t) for d, t in zip(together(page), truth, strict=True)]
        missed += any(
            not (d.low < t < d.high) if t else d.verdict != "not distinguishable" for d, t in ends
        )
        false += any(d.verdict != "not distinguishable" for d, t in ends if t == 0)
    error = math.sqrt(0.05 * 0.95 / studies)
    assert missed / studies <= 0.05 + 3 * error
    assert false / studies <= 0.05 + 3 * error
    assert missed > 0


def power_by_scipy(n: int, effect: float, claims: int = 1) -> float:
    quantile = stats.t.ppf(1 - 0.05 / (2 * claims), n - 1)
    return float(stats.nct.sf(quantile, n - 1, effect * math.sqrt(n)))


def test_three_seeds_detect_about_three_standard_deviations() -> None:
    assert detectable(3) == pytest.approx(3.3, abs=0.05)
    for n, claims in itertools.product((3, 4, 5, 10, 100), (1, 2, 10)):
        assert power_by_scipy(n, detectable(n, claims), claims) == pytest.approx(0.8, abs=1e-4)
    # Many seeds: the normal approximation.
    assert detectable(900) == pytest.approx((1.960 + 0.8416) / 30, rel=2e-3)


@pytest.mark.parametrize("n", [3, 5, 10])
def test_power_by_simulation(n: int) -> None:
    studies = 20_000
    x = np.random.default_rng(n).normal(detectable(n), 1, (studies, n))
    t = x.mean(axis=1) / (x.std(axis=1, ddof=1) / math.sqrt(n))
    shown = (t > T_TABLE[n - 1]).mean()
    assert shown == pytest.approx(0.8, abs=4 * math.sqrt(0.8 * 0.2 / studies))


def test_seeds_needed_is_the_first_number_with_enough_power() -> None:
    for effect, claims in itertools.product((0.12, 0.5, 1.0, 2.0, 3.2, 3.3, 20.0), (1, 5)):
        found = seeds_needed(0.01, 4, 0.01 * effect, claims)
        enough = (n for n in range(3, 1001) if power_by_scipy(n, effect, claims) >= 0.8)
        assert found.number == next(enough)
    assert seeds_needed(1, 4, 3.3).number == 3
    assert seeds_needed(1, 4, 0.05).number is None


def test_seeds_needed_owns_up_to_an_uncertain_spread() -> None:
    found = seeds_needed(1, 3, 2)
    # Of three differences, the chi-square quantiles are 0.0506 and 7.378 (a printed table).
    assert found.low == seeds_needed(math.sqrt(2 / 7.378), 3, 2).number
    assert found.high == seeds_needed(math.sqrt(2 / 0.0506), 3, 2).number
    assert found.low is not None
    assert found.high is not None
    assert found.low < (found.number or 0) < found.high
    assert found.high > 50
    covered = 0
    for sample in np.random.default_rng(0).normal(size=(2000, 4)):
        s = seeds_needed(float(sample.std(ddof=1)), 4, 1)
        assert s.low is not None
        covered += s.low <= 10 <= (s.high or 10)  # 10 seeds detect one standard deviation
    assert seeds_needed(1, 4, 1).number == 10
    assert covered / 2000 == pytest.approx(0.95, abs=0.03)  # whole numbers: a little over


def test_no_power_from_the_difference_observed() -> None:
    assert list(inspect.signature(seeds_needed).parameters) == ["std", "n", "smallest", "claims"]


@pytest.mark.parametrize("bad", [(0.0, 3, 1.0), (1.0, 3, 0.0), (math.nan, 3, 1.0), (1.0, 1, 1.0)])
def test_bad_plans(bad: tuple[float, int, float]) -> None:
    with pytest.raises(ValueError, match="say nothing about the seeds needed"):
        seeds_needed(*bad)
    with pytest.raises(ValueError, match="needs three seeds"):
        detectable(2)


def test_example_interval_is_a_paired_bootstrap() -> None:
    rng = np.random.default_rng(0)
    d = rng.choice([-2, -1, 0, 1, 2], 400, p=[0.05, 0.1, 0.6, 0.15, 0.1])
    low, high = example_interval(d.tolist(), 2) or (0, 0)
    drawn = rng.choice(d / 2, (20_000, 400)).mean(1)
    assert (low, high) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))), abs=0.0015)
    half = 1.96 * d.std() / 2 / 20
    assert (low, high) == pytest.approx((d.mean() / 2 - half, d.mean() / 2 + half), abs=0.004)
    assert example_interval([0] * 30, 3) is None
    with pytest.raises(ValueError, match="19 test images are too few"):
        example_interval([0, 1] * 9 + [1], 1)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_example_interval_of_two_values_is_binomial(share: float) -> None:
    for n in (20, 359, 10_000):
        count = round(share * n) or 1
        found = example_interval([1] * count + [0] * (n - count), 1)
        ends = stats.binom.ppf((0.025, 0.975), n, count / n) / n
        assert found == pytest.approx(tuple(ends), abs=1e-12)


def test_example_interval_covers() -> None:
    rng = np.random.default_rng(5)
    truth, hits = 0.05, 0
    for d in rng.choice([-1, 0, 1], (300, 500), p=[0.1, 0.75, 0.15]):
        low, high = example_interval(d.tolist(), 1) or (0, 0)
        hits += low <= truth <= high
    assert hits / 300 == pytest.approx(0.95, abs=0.04)
