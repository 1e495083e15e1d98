"""Learning curves: every seed of every arm over epochs, with the interval of their mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from hybridvit.report.arms import Arm
from hybridvit.report.marks import COLOURS, Plot, Point, line, points, safe, slug
from hybridvit.report.runs import Run
from hybridvit.studies.statistics import MIN_SEEDS, mean_interval

MAX_POINTS = 300  # of one curve, and
MAX_ALL_POINTS = 30_000  # of a plot
MAX_BANDS = 16  # of more arms, bands hide each other

Series = tuple[list[float], list[float]]


def curves(arms: Sequence[Arm]) -> Iterable[Plot]:
    """Training loss for each objective (losses do not compare across them), then validation."""
    trained = [arm for arm in arms if not arm.is_pixels]
    for objective in dict.fromkeys(arm.first.objective for arm in trained):
        chosen = [arm for arm in trained if arm.first.objective == objective]
        yield _curve(
            arms,
            chosen,
            "train/loss",
            title=f"Training loss, {objective}",
            reference="train/target_entropy",
            note="Dotted: the entropy of the targets, which guessing their frequencies reaches.",
        )
        if _has(chosen, "train/constant_guess_accuracy"):
            yield _curve(
                arms,
                chosen,
                "train/accuracy",
                title=f"Training accuracy, {objective}",
                reference="train/constant_guess_accuracy",
                note="Dotted: always guessing the most frequent target.",
                scale=100,
            )
    for metric in ("val/accuracy", "val/knn"):
        yield _curve(arms, trained, metric, title=f"Validation: {metric}", scale=100)


def _curve(
    arms: Sequence[Arm],
    chosen: Sequence[Arm],
    metric: str,
    *,
    title: str,
    reference: str | None = None,
    note: str = "",
    scale: float = 1,
) -> Plot:
    axis = _axis(chosen, metric)
    most = max(2, min(MAX_POINTS, MAX_ALL_POINTS // max(1, sum(len(a.runs) for a in chosen))))
    bands, lines, ends, words = [], [], [], []
    for arm in chosen:
        i = arms.index(arm)
        found = {run.seed: _series(run, metric, axis, most, scale) for run in arm.runs}
        seeds = {seed: series for seed, series in found.items() if series[0]}
        if not seeds:
            continue
        bands += _band(list(seeds.values()), i) if len(chosen) <= MAX_BANDS else []
        lines.append(line(*_joined(seeds.values()), i, safe(arm.label)))
        # The arm's symbol, at the end of each curve.
        ends += [
            Point(xs[-1], ys[-1], f"{safe(arm.label)}<br>seed {seed}, at the end: {ys[-1]:.4g}", i)
            for seed, (xs, ys) in seeds.items()
        ]
        words.append(_in_words(arm, list(seeds.values()), axis))
        guess = _series(arm.first, reference, axis, most, scale) if reference else ([], [])
        if guess[0]:
            trace = line(*guess, i, f"{safe(arm.label)}<br>{reference}")
            lines.append(trace | {"line": {"c": i % COLOURS, "width": 1, "dash": "dot"}})
    has_reference = reference is not None and _has(chosen, reference)
    return {
        "id": f"plot-{slug(title)}",
        "title": title,
        "note": "One line for each seed. "
        + ("Bands: 95 % t interval of the mean at each step. " if bands else "")
        + (note if has_reference else ""),
        "lines": words,
        "height": 340,
        # Bands below all lines, symbols above.
        "data": [*bands, *lines, points(ends, size=8)] if lines else [],
        "layout": {
            "xaxis": {"title": {"text": axis}},
            "yaxis": {"title": {"text": safe(metric) + (", %" if scale == 100 else "")}},
        },
    }


def _in_words(arm: Arm, seeds: Sequence[Series], axis: str) -> str:
    """Where an arm's curves begin and end, as means over its seeds; once if at one point."""
    first, last = (fmean(ys[k] for _, ys in seeds) for k in (0, -1))
    start, end = (fmean(xs[k] for xs, _ in seeds) for k in (0, -1))
    course = f"{first:.3g} at {axis} {start:.3g}"
    if any(len(xs) > 1 for xs, _ in seeds):
        course = f"from {course} to {last:.3g} at {end:.3g}"
    return f"{arm.label}: {course} (mean of n = {len(seeds)})."


def _joined(seeds: Iterable[Series]) -> tuple[list[float | None], list[float | None]]:
    """Curves as one, with gaps between."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    for x, y in seeds:
        gap = [None] if xs else []
        xs += [*gap, *x]
        ys += [*gap, *y]
    return xs, ys


def _band(seeds: Sequence[Series], i: int) -> list[Plot]:
    """The interval of the mean over seeds that logged at the same places, from three on."""
    xs = seeds[0][0]
    if len(seeds) < MIN_SEEDS or any(other != xs for other, _ in seeds):
        return []
    columns = zip(*(ys for _, ys in seeds), strict=True)
    ends = [mean_interval(column) or (column[0], column[0]) for column in columns]
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [*xs, *reversed(xs)],
            "y": [*(high for _, high in ends), *(low for low, _ in reversed(ends))],
            "fill": "toself",  # in half the line's colour
            "line": {"c": i % COLOURS, "width": 0},
            "opacity": 0.35,
            "hoverinfo": "skip",
        }
    ]


def _series(run: Run, metric: str, axis: str, most: int, scale: float) -> Series:
    """Where and what a run logged of a metric, thinned evenly, the last entry kept."""
    entries = [e for e in run.metrics if metric in e and axis in e]
    stride = max(1, -(-len(entries) // most))
    kept = entries[::-1][::stride][::-1]
    return [e[axis] for e in kept], [scale * e[metric] for e in kept]


def _has(arms: Sequence[Arm], metric: str) -> bool:
    return any(metric in e for arm in arms for run in arm.runs for e in run.metrics)


def _axis(arms: Sequence[Arm], metric: str) -> str:
    """`epoch` if all that was logged of a metric says it, else `step`."""
    entries = (e for arm in arms for run in arm.runs for e in run.metrics if metric in e)
    return "epoch" if all("epoch" in e for e in entries) else "step"
