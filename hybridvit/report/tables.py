"""Rows of the main table, comparisons in words, and the two as plain text."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hybridvit.report.arms import Arm, Comparison
from hybridvit.studies.statistics import Difference, mean_std
from hybridvit.studies.status import columns, shorten

WIDTH = 120  # columns of the plain-text table
HEADINGS = (
    "arm",
    "metric",
    "n",
    "result, %",
    "untrained, %",
    "tokens",
    "params",
    "GFLOPs",
    "img/s",
)


class Spread(NamedTuple):
    """Mean and sample standard deviation over n seeds."""

    mean: float
    std: float | None
    n: int

    def __str__(self) -> str:
        """In per cent, with one decimal."""
        std = "" if self.std is None else f" ± {100 * self.std:.1f}"
        return f"{100 * self.mean:.1f}{std}"


@dataclass(frozen=True)
class Row:
    """One arm under one metric; none where an arm has no such number."""

    arm: Arm
    metric: str | None
    result: Spread | None
    untrained: Spread | None
    images_per_second: float | None  # median over seeds

    def cells(self) -> tuple[str, ...]:
        """Texts under `HEADINGS`; empty where there is no number."""
        run = self.arm.first
        return (
            self.arm.label,
            self.metric or "",
            str(self.result.n) if self.result else "0",
            str(self.result) if self.result else "no result",
            str(self.untrained) if self.untrained else "",
            "" if run.tokens is None else str(run.tokens),
            "" if run.parameters is None else quantity(run.parameters),
            "" if run.flops is None else f"{run.flops / 1e9:.3g}",
            "" if self.images_per_second is None else f"{self.images_per_second:,.0f}",
        )


def rows(arms: Sequence[Arm]) -> list[Row]:
    """A row for each arm and primary metric, in the order of the arms."""
    found = []
    for arm in arms:
        speeds = [r.images_per_second for r in arm.runs if r.images_per_second is not None]
        speed = statistics.median(speeds) if speeds and not arm.is_pixels else None
        for metric in arm.metrics() or (None,):
            result = _spread(arm, metric) if metric else None
            untrained = _spread(arm, f"untrained/{metric}") if metric else None
            found.append(Row(arm, metric, result, untrained, speed))
    return found


def quantity(value: float) -> str:
    """A count with three digits and k, M or G."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def in_words(comparison: Comparison) -> str:
    """What the seeds allow to say of a comparison, in percentage points."""
    d, alone = comparison.difference, comparison.alone
    if d is None or alone is None:
        return "not compared: no seed has a result on both sides"
    if comparison.kind == "training":
        words = _training_words(d)
    else:
        words = _words(d, "hybrid" if comparison.kind == "stem" else None)
    if alone.verdict != d.verdict:
        words += f"; by itself {points(alone)[1]}, which leaves out zero"
    elif 0 in (d.low, d.high):
        words += f"; by itself {points(alone)[1]}"
    return words


def subject(comparison: Comparison) -> str:
    """What is compared, in words."""
    if comparison.kind != "training":
        return f"{comparison.arm.label} against {comparison.other.label}, {comparison.metric}"
    return f"{comparison.arm.label} against its untrained encoder, {comparison.metric}"


def headline(comparisons: Sequence[Comparison]) -> list[str]:
    """The comparisons counted by verdict: one sentence on arms, one on training."""
    sentences = []
    arms = [c for c in comparisons if c.kind != "training" and c.difference]
    if arms:
        others = {c.other.label for c in arms}
        if arms[0].kind == "stem":
            lead, who = "Hybrid against pure stem", "hybrid"
        else:
            lead = f"Against {others.pop()}" if len(others) == 1 else "Against their baselines"
            who = "the other arm"
        sentences.append(f"{lead}, {_plural(len(arms))}: {_counted(arms, who)}.")
    elif any(c.kind != "training" for c in comparisons):
        sentences.append(
            "No seed has a result on both sides of a comparison: nothing here says which is better."
        )
    else:
        sentences.append(
            "No arms differ in a pure against a hybrid stem alone, nor from a baseline: "
            "nothing here says which is better."
        )
    trainings = [c.difference.verdict for c in comparisons if c.kind == "training" and c.difference]
    if trainings:
        sentences.append(
            f"Training against the untrained encoder, {_plural(len(trainings))}: "
            f"shown to help in {trainings.count('better')}."
        )
    return sentences


def _counted(comparisons: Sequence[Comparison], who: str) -> str:
    verdicts = [c.difference.verdict for c in comparisons if c.difference]
    return ", ".join(
        f"{words} in {verdicts.count(verdict)}"
        for verdict, words in (
            ("better", f"{who} is better"),
            ("worse", f"{who} is worse"),
            ("not distinguishable", "the two are not distinguishable"),
            ("no interval", "there are too few seeds for an interval"),
            ("no spread", "there is no spread over seeds, hence no interval,"),
            ("diverged", "a run diverged, hence no verdict,"),
        )
        if verdict in verdicts
    )


def longer_hint(comparisons: Sequence[Comparison], longer: str | None) -> str | None:
    """What leads in the command for a longer run, where training is not shown to help."""
    verdicts = {c.difference.verdict for c in comparisons if c.kind == "training" and c.difference}
    if longer is None or verdicts <= {"better", "diverged"}:
        return None
    return "Training may have been too short to show anything; a longer run:"


def plain_text(
    rows: Sequence[Row], comparisons: Sequence[Comparison], caveats: Sequence[str], hint: str | None
) -> str:
    """The table for a terminal: aligned, at most `WIDTH` columns, verdicts and caveats below."""
    table = [HEADINGS, *(row.cells() for row in rows)]
    others = sum(2 + max(len(line[i]) for line in table) for i in range(1, len(HEADINGS)))
    width = max(WIDTH - others, 8)  # of the labels
    short = [(shorten(label, width), *cells) for label, *cells in table]
    lines = columns(short, right=range(2, len(HEADINGS)))
    verdicts = [f"- {subject(c)}: {in_words(c)}" for c in comparisons]
    for block in (headline(comparisons), verdicts, [f"Caveat: {c}" for c in caveats]):
        if block:
            lines.append("")
        lines += [part for text in block for part in _wrap(text)]
    if hint:
        lines += ["", hint]  # not wrapped: a command is there to be copied
    return "\n".join(lines) + "\n"


def points(d: Difference) -> tuple[str, str]:
    """Mean and interval in percentage points, with so many decimals that no end reads as zero."""
    ends = [100 * x for x in (d.mean, d.low, d.high) if x]
    decimals = next((k for k in (1, 2, 3) if all(round(x, k) for x in ends)), 3)
    interval = ""
    if d.low is not None and d.high is not None:
        low = f"[{100 * d.low:.{decimals}f}" if d.low else "(0"  # an end of 0 is outside
        high = f"{100 * d.high:.{decimals}f}]" if d.high else "0)"
        interval = f"{low}, {high}"
    return f"{100 * d.mean:+.{decimals}f}", interval


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _spread(arm: Arm, metric: str) -> Spread | None:
    values = list(arm.values(metric).values())
    return Spread(*mean_std(values), len(values)) if values else None


def _words(d: Difference, name: str | None) -> str:
    """Of one arm against another; `name` is what the first is called, if anything."""
    size, interval = points(d)
    difference = f"{name} {size}" if name else size
    if d.verdict in ("better", "worse"):
        return f"{name or 'it'} is {d.verdict} by {size.lstrip('+-')} points {interval}, n = {d.n}"
    if d.verdict == "not distinguishable":
        return f"not distinguishable at n = {d.n} ({difference} points {interval})"
    if d.verdict == "no interval":
        return f"no interval below three seeds ({difference} points, n = {d.n})"
    if d.verdict == "diverged":
        return f"no verdict, because a run diverged ({difference} points at the {d.n} seeds left)"
    return f"{difference} points at every one of {d.n} seeds: no spread, hence no interval"


def _training_words(d: Difference) -> str:
    size, interval = points(d)
    if d.verdict == "better":
        return f"training is better by {size.lstrip('+')} points {interval}, n = {d.n}"
    if d.verdict == "worse":
        return (
            f"training does not beat the untrained encoder: it is worse by {size.lstrip('-')} "
            f"points {interval}, n = {d.n}"
        )
    if d.verdict == "not distinguishable":
        return (
            f"training does not beat the untrained encoder: not distinguishable at n = {d.n} "
            f"({size} points {interval})"
        )
    why = "no interval below three seeds"
    if d.verdict == "no spread":
        why = "all seeds differ by the same amount, hence no interval"
    if d.verdict == "diverged":
        why = "a run diverged, and the others are what went well"
    return f"training is not shown to beat the untrained encoder: {why} ({size} points, n = {d.n})"


def _plural(n: int) -> str:
    return "one comparison" if n == 1 else f"{n} comparisons"
