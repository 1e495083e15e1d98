"""What the trained models said of each test image, where run directories hold it.

`predictions.json` of a run: `{"schema": 1, "labels": [..], "predicted": {"test/accuracy": [..]}}`,
class numbers in the order of the test split, under the keys of the results. Older runs have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from hybridvit.report.arms import Arm, Comparison
from hybridvit.report.runs import Predictions, read_predictions
from hybridvit.report.tables import subject
from hybridvit.studies.statistics import MIN_EXAMPLES, example_interval


@dataclass(frozen=True)
class Paired:
    """Both sides of a comparison on the same test images, means over the seeds of both.

    `arm` and `other` are the shares of seeds that got an image right.
    """

    labels: tuple[int, ...]
    arm: tuple[float, ...]
    other: tuple[float, ...]


def paired(comparison: Comparison) -> Paired | None:
    """None where a run does not have its predictions, or labels differ between runs."""
    key = comparison.metric
    other_key = key if comparison.kind == "stem" else f"untrained/{key}"
    sides: list[list[Predictions]] = []
    for arm in (comparison.arm, comparison.other):
        found = [_of(arm, seed) for seed in comparison.seeds]
        sides.append([p for p in found if p is not None])
    everyone = [*sides[0], *sides[1]]
    if not comparison.seeds or len(everyone) < 2 * len(comparison.seeds):
        return None
    if any(p.labels != everyone[0].labels for p in everyone):
        return None
    if not all(k in p.predicted for k, s in zip((key, other_key), sides, strict=True) for p in s):
        return None
    ours, theirs = (_right(side, k) for k, side in zip((key, other_key), sides, strict=True))
    return Paired(everyone[0].labels, ours, theirs)


def interval(comparison: Comparison) -> tuple[float, float] | None:
    """Bootstrap interval of the difference over test images, of these trained models only."""
    found = paired(comparison)
    if found is None or len(found.labels) < MIN_EXAMPLES:
        return None
    return example_interval([a - b for a, b in zip(found.arm, found.other, strict=True)])


def disagreement(comparison: Comparison) -> str | None:
    """On how many test images the sides differ, and in which classes most; none without any."""
    found = paired(comparison)
    if found is None:
        return None
    by_class: dict[int, list[float]] = {}
    for label, a, b in zip(found.labels, found.arm, found.other, strict=True):
        by_class.setdefault(label, []).append(a - b)
    everything = [d for differences in by_class.values() for d in differences]
    more, less = sum(d > 0 for d in everything), sum(d < 0 for d in everything)
    points = {label: 100 * fmean(d) for label, d in sorted(by_class.items())}
    most, least = max(points, key=points.__getitem__), min(points, key=points.__getitem__)
    return (
        f"{subject(comparison)}: of {len(everything):,} test images the former gets {more:,} right "
        f"in more seeds, the latter {less:,}; {len(everything) - more - less:,} are alike. By "
        f"class, from {points[least]:+.1f} points (class {least}) to {points[most]:+.1f} (class "
        f"{most}), which is the most extreme of {len(points)} and so no claim."
    )


def _of(arm: Arm, seed: int) -> Predictions | None:
    return next((read_predictions(run) for run in arm.runs if run.seed == seed), None)


def _right(side: list[Predictions], key: str) -> tuple[float, ...]:
    labels = side[0].labels
    return tuple(
        sum(p.predicted[key][i] == label for p in side) / len(side)
        for i, label in enumerate(labels)
    )
