"""Where the sides of a comparison differ: on which test images, and in which classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from hybridvit.report.arms import Arm, Comparison
from hybridvit.report.predictions import Predictions, read_predictions
from hybridvit.report.runs import Run
from hybridvit.report.tables import subject
from hybridvit.studies.statistics import MIN_EXAMPLES, example_interval

if TYPE_CHECKING:
    import numpy as np

    from hybridvit.report.predictions import Classes

    Counts = np.ndarray[tuple[int], np.dtype[np.int64]]

HEADINGS = (
    "comparison",
    "test images",
    "first right in more seeds",
    "second",
    "alike",
    "first right in all seeds, second in none",
    "second in all, first in none",
)
MAX_CLASSES = 20  # with a column each; of more, those that differ most are named
NAMED = 6  # images, or classes at either end

Read = Callable[[Run], Predictions | None]


@dataclass(frozen=True, eq=False)
class Paired:
    """Both sides of a comparison on the same test images.

    `arm` and `other` are the numbers of seeds that got an image right.
    """

    labels: Classes
    arm: Counts
    other: Counts
    seeds: int


def all_paired(comparisons: Sequence[Comparison]) -> list[Paired | None]:
    """`paired` of each; what a run said is read once."""
    read = cache(read_predictions)
    return [paired(c, read) for c in comparisons]


def paired(comparison: Comparison, read: Read = read_predictions) -> Paired | None:
    """None where a run does not have its predictions, or labels differ between runs."""
    key = comparison.metric
    other_key = key if comparison.kind != "training" else f"untrained/{key}"
    sides: list[list[Predictions]] = []
    for arm, wanted in ((comparison.arm, key), (comparison.other, other_key)):
        found = [_of(arm, seed, read) for seed in comparison.seeds]
        sides.append([p for p in found if p is not None and wanted in p.predicted])
    everyone = [*sides[0], *sides[1]]
    if not comparison.seeds or len(everyone) < 2 * len(comparison.seeds):
        return None
    labels = everyone[0].labels
    if any(len(p.labels) != len(labels) or (p.labels != labels).any() for p in everyone):
        return None
    ours, theirs = (_right(side, k) for k, side in zip((key, other_key), sides, strict=True))
    return Paired(labels, ours, theirs, len(comparison.seeds))


def interval(found: Paired | None) -> tuple[float, float] | None:
    """Bootstrap interval of the difference over test images, of these trained models only."""
    if found is None or len(found.labels) < MIN_EXAMPLES:
        return None
    return example_interval((found.arm - found.other).tolist(), found.seeds)


def table(
    comparisons: Sequence[Comparison], pairs: Sequence[Paired | None]
) -> list[tuple[str, ...]]:
    """Headings and a line for each comparison whose runs kept their predictions; else nothing."""
    known = [(c, p) for c, p in zip(comparisons, pairs, strict=True) if p is not None]
    if not known:
        return []
    classes = sorted({int(label) for _, p in known for label in set(p.labels.tolist())})
    if len(classes) <= MAX_CLASSES:
        headings = tuple(f"class {k}, points" for k in classes)
    else:
        headings = ("lowest classes, points", "highest classes, points")
    lines = []
    for comparison, pair in known:
        points = _by_class(pair)
        if len(classes) <= MAX_CLASSES:
            shown = tuple(f"{points[k]:+.1f}" if k in points else "" for k in classes)
        else:
            shown = _extremes(points)
        lines.append((subject(comparison), *_images(pair), *shown))
    return [(*HEADINGS, *headings), *lines]


def notes(lines: Sequence[tuple[str, ...]]) -> list[str]:
    """What the columns mean, in sentences."""
    if not lines:
        return []
    return [
        "First and second are the sides of a comparison in its own order. Numbers after a colon "
        "are places in the test split, from 0. Of a class, points are the difference in accuracy, "
        "first minus second, over seeds. The most extreme of several classes is so partly by "
        "chance: no claim."
    ]


def _images(pair: Paired) -> tuple[str, ...]:
    """On how many images, and on which, the sides differ."""
    more, less = pair.arm > pair.other, pair.arm < pair.other
    alike = len(pair.labels) - int(more.sum()) - int(less.sum())
    counts = (len(pair.labels), int(more.sum()), int(less.sum()), alike)
    sides = ((pair.arm, pair.other), (pair.other, pair.arm))
    sure = [(a == pair.seeds) & (b == 0) for a, b in sides]
    return (*(f"{n:,}" for n in counts), *(_named(side.nonzero()[0].tolist()) for side in sure))


def _named(places: Sequence[int]) -> str:
    """How many places, and the first of them."""
    if not places:
        return "0"
    more = ", …" if len(places) > NAMED else ""
    return f"{len(places):,}: {', '.join(map(str, places[:NAMED]))}{more}"


def _by_class(pair: Paired) -> dict[int, float]:
    """Difference of the two sides in each class, in percentage points."""
    difference = (pair.arm - pair.other) / pair.seeds
    return {
        k: 100 * float(difference[pair.labels == k].mean())
        for k in sorted(set(pair.labels.tolist()))
    }


def _extremes(points: dict[int, float]) -> tuple[str, str]:
    """The classes with the largest differences down and up."""
    order = sorted(points, key=points.__getitem__)
    low, high = (
        ", ".join(f"{k}: {points[k]:+.1f}" for k in found)
        for found in (order[:NAMED], order[: -NAMED - 1 : -1])
    )
    return low, high


def _of(arm: Arm, seed: int, read: Read) -> Predictions | None:
    return next((read(run) for run in arm.runs if run.seed == seed), None)


def _right(side: Sequence[Predictions], key: str) -> Counts:
    """How many seeds get each image right."""
    import numpy as np

    right: Counts = np.array([p.predicted[key] == p.labels for p in side]).sum(0)
    return right
