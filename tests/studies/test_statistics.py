import math

import pytest
from scipy import stats

from hybridvit.studies.statistics import mean_interval, mean_std, paired_difference

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
