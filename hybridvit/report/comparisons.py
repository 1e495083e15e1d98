"""The comparisons as a table: each by itself, among all of the page, and what it would take."""

from __future__ import annotations

from collections.abc import Sequence

from hybridvit.report import examples
from hybridvit.report.arms import Comparison, varying
from hybridvit.report.tables import points, subject
from hybridvit.studies.statistics import MAX_SEEDS, MIN_SEEDS, POWER, Difference, seeds_needed

HEADINGS = (
    "comparison",
    "n",
    "difference, points",
    "deviation",
    "95 % by itself",
    "95 % among all here",
    "verdict",
    "these trained models only",
)
SEEDS_HEADING = "seeds for {:g} points"
DIFFER_HEADING = "configs differ in"


def headings(smallest: float | None) -> tuple[str, ...]:
    """Of the table; with the seeds needed where a smallest difference of interest is known."""
    seeds = () if smallest is None else (SEEDS_HEADING.format(smallest),)
    return (*HEADINGS, *seeds, DIFFER_HEADING)


def table(
    comparisons: Sequence[Comparison],
    pairs: Sequence[examples.Paired | None],
    smallest: float | None,
) -> list[tuple[str, ...]]:
    """Cells under `headings` of each comparison; empty where there is no number.

    Args:
        pairs: the sides of each on the test images, where that is known.
        smallest: the smallest difference of interest, in percentage points.
    """
    claims = sum(1 for c in comparisons if c.difference and c.difference.low is not None)
    lines = []
    for c, pair in zip(comparisons, pairs, strict=True):
        if c.alone is None or c.difference is None:
            empty = [""] * (len(headings(smallest)) - 3)
            lines.append((subject(c), "0", *empty, _differ_in(c)))
            continue
        size, alone = points(c.alone)
        interval = examples.interval(pair)
        cells = (
            subject(c),
            str(c.alone.n),
            size,
            "" if c.alone.std is None else f"{100 * c.alone.std:.2g}",
            alone,
            points(c.difference)[1],
            c.difference.verdict,
            "" if interval is None else f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]",
        )
        needed = () if smallest is None else (_seeds(c.alone, smallest, claims),)
        lines.append((*cells, *needed, _differ_in(c)))
    return lines


def notes(lines: Sequence[tuple[str, ...]], smallest: float | None) -> list[str]:
    """What the columns mean, in sentences."""
    found = [
        "Points are percentage points, paired by seed; the deviation is that of the differences. "
        "Intervals among all here hold together and agree with the verdicts (Holm); an end of 0 "
        "is itself outside."
    ]
    if any(cells[7] for cells in lines):
        found.append(
            "These trained models only: a paired bootstrap over the test images. It says how much "
            "the choice of test images matters for the models as they were trained, and nothing "
            "about other seeds; no verdict rests on it."
        )
    if smallest is not None:
        found.append(
            f"Seeds for {smallest:g} points: how many it takes to show a true difference of that "
            f"size with a chance of {100 * POWER:.0f} %, as one of the comparisons here, at the "
            "deviation above; in brackets at the ends of that deviation's own 95 % interval. The "
            "difference observed has no part in it."
        )
    return found


def _differ_in(c: Comparison) -> str:
    """The config keys in which the sides differ, those of the stem taken together."""
    if c.arm is c.other:
        return "nothing"
    keys = varying([c.arm.first, c.other.first])
    return ", ".join(dict.fromkeys("stem" if k.startswith("stem.") else k for k in keys))


def _seeds(d: Difference, smallest: float, claims: int) -> str:
    if d.n < MIN_SEEDS or d.low is None or d.std is None:
        return ""
    found = seeds_needed(d.std, d.n, smallest / 100, max(1, claims))
    low, number, high = (
        f"over {MAX_SEEDS:,}" if x is None else str(x)
        for x in (found.low, found.number, found.high)
    )
    return f"{number} [{low}, {high}]"
