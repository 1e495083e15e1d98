"""Results against what they cost: the axes, the arms that nothing beats, where two stems cross."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from hybridvit.report.arms import ALONG, Arm, Comparison, config_key, told_apart
from hybridvit.report.runs import Run, part_name
from hybridvit.studies.statistics import mean_interval

Cost = Callable[[Run], float | None]
# Axes on which cost is shown: heading, and what it is of a run.
COSTS: tuple[tuple[str, Cost], ...] = (
    ("forward GFLOPs per image", lambda r: None if r.flops is None else r.flops / 1e9),
    ("parameters", lambda r: r.parameters),
    ("training seconds", lambda r: r.train_seconds),
    ("training images seen", lambda r: r.images),
    ("training PFLOPs", lambda r: _peta(r.training_flops)),
)
# What a study may match: in words, and of a run.
MATCHED: dict[str, tuple[str, Cost]] = {
    "epochs": ("epochs", lambda r: r.epochs),
    "flops": ("training FLOPs", lambda r: r.training_flops),
    "seconds": ("training seconds", lambda r: r.train_seconds),
    "images": ("images seen", lambda r: r.images),
    "params": ("parameters of stem and encoder", lambda r: r.compared_parameters),
}
# Config keys in which the points of one curve may differ: the size of the encoder, and how long it
# trains on how many images.
SCALE = (
    "encoder.name",
    "encoder.args.depth",
    "encoder.args.dim",
    "encoder.args.heads",
    "encoder.args.mlp_ratio",
    "data.train_images",
    "train.epochs",
    "optim.warmup_epochs",
    *ALONG,
)
SAME_COST = 0.01  # relative; arms closer than that are no points of one curve


@dataclass(frozen=True)
class Crossover:
    """Where the curves of a hybrid and a pure stem over cost cross, seed by seed.

    `at` holds the cost of each seed whose curves cross exactly once within the costs that both
    stems have; `interval` is there if all seeds do, in one direction, and there are at least three.
    That all do is a condition: where some might not, it holds the true one less often than 95 %.
    """

    hybrid: str
    pure: str
    metric: str
    seeds: int
    at: tuple[float, ...]
    ahead: str | None  # where the hybrid is: above, below, everywhere, nowhere; none: it varies
    interval: tuple[float, float] | None

    @property
    def is_single(self) -> bool:
        """Whether all seeds cross once, in one direction."""
        return self.ahead in ("above", "below") and len(self.at) == self.seeds

    @property
    def mean(self) -> float:
        """Geometric, as costs are compared by their ratios."""
        return math.exp(sum(map(math.log, self.at)) / len(self.at))

    def in_words(self, unit: str) -> str:
        """The finding, with its cost in that unit."""
        who = f"{self.hybrid} against {self.pure}, {self.metric}"
        if self.ahead in ("everywhere", "nowhere"):
            leader = "hybrid" if self.ahead == "everywhere" else "pure stem"
            return f"{who}: no crossover; the {leader} is ahead at every cost and seed"
        if not self.is_single:
            return f"{who}: no one crossover ({len(self.at)} of {self.seeds} seeds cross once)"
        interval = "" if self.interval is None else " [{:.3g}, {:.3g}]".format(*self.interval)
        return (
            f"{who}: cross at {self.mean:.3g} {unit}{interval}, n = {self.seeds}; "
            f"the hybrid is ahead {self.ahead}"
        )


class Curves(NamedTuple):
    """A hybrid's curve and a pure one's: comparisons, and what the two are called."""

    points: Sequence[Comparison]
    hybrid: str
    pure: str


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the (cost, result) points that none beats in both, by rising cost."""
    best, found = -math.inf, []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            best = points[i][1]
            found.append(i)
    return found


def crossovers(
    comparisons: Iterable[Comparison], cost: Cost, tuned: tuple[str, ...] = ()
) -> list[Crossover]:
    """Of each hybrid and pure stem that are compared at two or more costs.

    Curves are straight between their points over the logarithm of the cost.
    """
    return crossings(paired_curves(comparisons, tuned), cost)


def crossings(curves: Iterable[Curves], cost: Cost) -> list[Crossover]:
    """Of curves at two or more costs of one kind."""
    found = (_crossover(*each, cost) for each in curves)
    return [crossover for crossover in found if crossover is not None]


def paired_curves(comparisons: Iterable[Comparison], tuned: tuple[str, ...] = ()) -> list[Curves]:
    """Comparisons whose arms differ in scale alone, and in the config keys that each chose for
    itself, as points of two curves."""
    free = (*SCALE, *tuned)
    groups: dict[tuple[str, ...], list[Comparison]] = {}
    for c in comparisons:
        if c.kind == "stem" and c.seeds:
            groups.setdefault(_family(c, free), []).append(c)
    # The seeds that are left where one diverged are those that went well.
    found = [
        group
        for group in groups.values()
        if len(group) > 1 and all(c.alone and c.alone.verdict != "diverged" for c in group)
    ]
    hybrids = _names([group[0].arm for group in found], free)
    pures = _names([group[0].other for group in found], free)
    return [Curves(*each) for each in zip(found, hybrids, pures, strict=True)]


def matched(arms: Sequence[Arm], match: str | None) -> str | None:
    """How equal the arms of a study that matches a cost came out, with stages stage by stage;
    none where it is not known."""
    if match not in MATCHED:
        return None
    words, cost = MATCHED[match]
    stages: dict[str | None, list[float | None]] = {}
    for run in (r for arm in arms if not arm.is_pixels for r in arm.runs if r.is_complete):
        stages.setdefault(run.stage, []).append(cost(run))
    apart = []
    for stage, known in stages.items():
        values = [x for x in known if x is not None and x > 0]
        if len(values) < len(known):
            return None
        text = f"{100 * (max(values) / min(values) - 1):.2g} %"
        apart.append(text if stage is None else f"{text} ({stage})")
    if not apart:
        return None
    return f"Arms are matched by {words} and came out within {', '.join(apart)} of each other"


def _family(c: Comparison, free: tuple[str, ...]) -> tuple[str, ...]:
    return (c.metric, *(config_key(arm.first, free) for arm in (c.arm, c.other)))


def _names(arms: Sequence[Arm], free: tuple[str, ...]) -> list[str]:
    runs = [arm.first for arm in arms]
    short = [f"{part_name(run.config, 'stem')} / {run.objective}" for run in runs]
    return told_apart(short, runs, free)


def _crossover(
    group: Sequence[Comparison], hybrid_name: str, pure_name: str, cost: Cost
) -> Crossover | None:
    seeds = sorted(set.intersection(*(set(c.seeds) for c in group)))
    metric = group[0].metric
    at, directions = [], set()
    for seed in seeds:
        hybrid = _curve([c.arm for c in group], seed, metric, cost)
        pure = _curve([c.other for c in group], seed, metric, cost)
        knots = _knots(hybrid, pure)
        if not hybrid or not pure or len(knots) < 2:
            return None
        ahead = [(x, _at(hybrid, x) - _at(pure, x)) for x in knots]
        crossings = _crossings(ahead)
        tied = any(a == 0 for _, a in ahead)
        if len(crossings) == 1:
            at.append(crossings[0][0])
            directions.add(crossings[0][1])
        elif crossings or tied:  # a tie alone is neither a lead nor a crossing
            directions.add("several")
        else:
            directions.add("nowhere" if ahead[0][1] < 0 else "everywhere")
    if not seeds:
        return None
    is_one = len(directions) == 1 and "several" not in directions
    interval = mean_interval(at) if is_one and len(at) == len(seeds) else None
    return Crossover(
        hybrid_name,
        pure_name,
        metric,
        len(seeds),
        tuple(math.exp(x) for x in at),
        directions.pop() if is_one else None,
        None if interval is None else (math.exp(interval[0]), math.exp(interval[1])),
    )


def _crossings(ahead: Sequence[tuple[float, float]]) -> list[tuple[float, str]]:
    """Where a lead (log cost, difference) changes hands, and on which side of that the hybrid is
    ahead; where the difference is zero at a point, that is the place."""
    found = []
    for (x, a), (y, b) in pairwise([point for point in ahead if point[1] != 0]):
        if a * b < 0:
            ties = [z for z, d in ahead if x < z < y and d == 0]
            place = sum(ties) / len(ties) if ties else x + (y - x) * a / (a - b)
            found.append((place, "above" if a < 0 else "below"))
    return found


def _curve(
    arms: Sequence[Arm], seed: int, metric: str, cost: Cost
) -> list[tuple[float, float]] | None:
    """(log cost, result) of one seed by rising cost; none if a cost is unknown or comes twice."""
    points = []
    for arm in dict.fromkeys(arms):
        run = next(r for r in arm.runs if r.seed == seed)
        spent = cost(run)
        if spent is None or spent <= 0:
            return None
        points.append((math.log(spent), run.results[metric]))
    points.sort()
    if any(b[0] - a[0] < SAME_COST for a, b in pairwise(points)):
        return None
    return points


def _knots(*curves: list[tuple[float, float]] | None) -> list[float]:
    """All places of points that lie within every curve."""
    if not all(curves):
        return []
    low = max(c[0][0] for c in curves if c)
    high = min(c[-1][0] for c in curves if c)
    return sorted({x for c in curves if c for x, _ in c if low <= x <= high})


def _at(curve: Sequence[tuple[float, float]], x: float) -> float:
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    raise AssertionError(f"{x} lies outside of the curve")


def _peta(flops: float | None) -> float | None:
    return None if flops is None else flops / 1e15
