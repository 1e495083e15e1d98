"""Plots as plain data, which the page's one static script hands to plotly.

Colours are numbers here and become colours in the browser, which knows whether the reader's
scheme is light or dark. Plotly reads a subset of HTML in every text, so names are escaped.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from hybridvit.report.arms import Arm, Comparison
from hybridvit.report.cost import COSTS, Cost, crossovers, front
from hybridvit.report.leakage import WHEN, measured
from hybridvit.report.runs import Run
from hybridvit.report.tables import Row, shorten
from hybridvit.studies.statistics import MIN_SEEDS, mean_interval

# Colours and symbols have no common cycle below 56 arms; each symbol with its glyph in the key.
COLOURS = 7
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")
GLYPHS = ("●", "■", "◆", "▲", "▼", "✚", "✖", "★")
DASHES = ("solid", "dash", "dashdot", "longdash")
MAX_POINTS = 300  # of one learning curve
ROW_PX = 58

Plot = dict[str, Any]


def plots(
    arms: Sequence[Arm], rows: Sequence[Row], comparisons: Sequence[Comparison]
) -> list[Plot]:
    """All plots for which there are numbers: `id`, `title`, `note`, `height`, plotly data."""
    costs = _costs(arms, rows, comparisons)
    made = [_results(arms, rows), *costs, *_curves(arms), *_mixing(arms)]
    return [plot for plot in made if plot["data"]]


def key(arms: Sequence[Arm]) -> list[tuple[int, str, str]]:
    """Colour number, glyph and label of every arm with a model and something to plot."""
    return [
        (i % COLOURS, GLYPHS[i % len(GLYPHS)], arm.label)
        for i, arm in enumerate(arms)
        if not arm.is_pixels and any(run.results or run.metrics for run in arm.runs)
    ]


def _results(arms: Sequence[Arm], rows: Sequence[Row]) -> Plot:
    """A line for each row of the table: every seed, mean and interval, untrained encoder."""
    data: list[Plot] = []
    notes = []
    scored = [row for row in rows if row.result and row.metric]
    for y, row in enumerate(reversed(scored)):
        assert row.metric
        data += _result_traces(row, y, arms.index(row.arm))
        notes.append(_label(f"{shorten(row.arm.label, 34)}  {row.metric}", y + 0.42))
    return {
        "id": "plot-results",
        "title": "Every seed",
        "note": "One line for each arm and metric. Small symbols: the seeds. Large symbol and bar: "
        "their mean and 95 % t interval (from three seeds on). Hollow: the untrained encoder.",
        "height": ROW_PX * len(scored) + 60,
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": "result, %"}},
            "yaxis": {"range": [-0.5, len(scored) - 0.3], "visible": False},
            "annotations": notes,
        },
    }


def _result_traces(row: Row, y: int, i: int) -> list[Plot]:
    assert row.metric
    assert row.result
    traces = []
    untrained = row.arm.values(f"untrained/{row.metric}")
    if untrained:
        traces.append(_points(untrained, y, i, "untrained, ", hollow=True))
    values = row.arm.values(row.metric)
    traces.append(_points(values, y, i, ""))
    interval = mean_interval(list(values.values()))
    spoken = f"{_safe(row.arm.label)}<br>mean {row.result} %"
    if interval:
        spoken += f"<br>95 % interval [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    mean = _trace([100 * row.result.mean], [y - 0.17], i, [spoken], size=11)
    if interval:
        half = 100 * (interval[1] - row.result.mean)
        mean["error_x"] = {"type": "data", "array": [half], "c": i % COLOURS, "thickness": 2}
    return [*traces, mean]


def _points(values: dict[int, float], y: float, i: int, what: str, hollow: bool = False) -> Plot:
    text = [f"{what}seed {seed}: {100 * v:.2f} %" for seed, v in values.items()]
    xs = [100 * v for v in values.values()]
    trace = _trace(xs, [y + 0.08] * len(xs), i, text, size=7, hollow=hollow)
    trace["marker"]["opacity"] = 0.75
    return trace


def _costs(
    arms: Sequence[Arm], rows: Sequence[Row], comparisons: Sequence[Comparison]
) -> Iterable[Plot]:
    """Result against each cost, a plot for each metric; the cost is chosen on the page."""
    for metric in dict.fromkeys(row.metric for row in rows if row.metric):
        shown = [r for r in rows if r.metric == metric and not r.arm.is_pixels and r.result]
        runs = [(r.arm, [run for run in r.arm.runs if metric in run.results]) for r in shown]
        axes, lines = [], []
        for title, cost in COSTS:
            axis = _cost_axis(title, cost, metric, runs)
            if axis is not None:
                axes.append(axis)
                best = [shown[i].arm.label for i in axis.pop("best")]
                lines.append(f"Nothing is better and cheaper in {title}: {', '.join(best)}.")
                about = [c for c in comparisons if c.metric == metric]
                lines += [f"{c.in_words(title)}." for c in crossovers(about, cost)]
        if not axes:
            continue
        data = []
        for arm, seeds in runs:
            text = [f"{_safe(arm.label)}<br>seed {run.seed}" for run in seeds]
            ys = [100 * run.results[metric] for run in seeds]
            data.append(_trace([], ys, arms.index(arm), text, size=9))
        yield {
            "id": f"plot-cost-{_slug(metric)}",
            "title": f"{metric} against cost",
            "note": "One symbol for each seed; dotted, the front of the arms' means: at its cost, "
            "no other arm had a better mean. Differences along it may be chance.",
            "lines": lines,
            "height": 360,
            "data": data,
            "axes": axes,
            "layout": {"yaxis": {"title": {"text": f"{metric}, %"}}, "hovermode": "closest"},
        }


def _cost_axis(
    title: str, cost: Cost, metric: str, runs: Sequence[tuple[Arm, Sequence[Run]]]
) -> Plot | None:
    """Positions of all symbols on an axis, the front and the places of its arms; none where a
    run does not know its cost."""
    known = [[cost(run) for run in seeds] for _, seeds in runs]
    xs = [[x for x in seeds if x is not None] for seeds in known]
    if not xs or any(len(x) < len(all_) for x, all_ in zip(xs, known, strict=True)):
        return None
    means = [
        (fmean(x), 100 * fmean(run.results[metric] for run in seeds))
        for x, (_, seeds) in zip(xs, runs, strict=True)
    ]
    best = front(means)
    return {
        "title": title,
        "xs": xs,
        "log": all(x > 0 for seeds in xs for x in seeds),
        "front": {"x": [means[i][0] for i in best], "y": [means[i][1] for i in best]},
        "best": best,
    }


def _curves(arms: Sequence[Arm]) -> Iterable[Plot]:
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
    for metric in ("val/accuracy", "val/linear", "val/knn"):
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
    data: list[Plot] = []
    axis = _axis(chosen, metric)
    bands = []
    for arm in chosen:
        i = arms.index(arm)
        series = [(run, *_series(run, metric, axis)) for run in arm.runs]
        band = _band([(xs, [scale * y for y in ys]) for _, xs, ys in series if xs], i)
        bands += band
        for run, xs, ys in series:
            if not xs:
                continue
            text = f"{_safe(arm.label)}<br>seed {run.seed}"
            trace = _trace(xs, [scale * y for y in ys], i, [text] * len(xs), size=0)
            trace["mode"] = "lines+markers"
            width = 1 if band else 1.5
            trace["line"] = {"c": i % COLOURS, "width": width, "dash": DASHES[i % len(DASHES)]}
            # The arm's symbol, at the end only.
            trace["marker"] |= {
                "size": [0] * (len(xs) - 1) + [8],
                "opacity": 1,
                "line": {"width": 0},
            }
            data.append(trace)
        xs, ys = _series(arm.first, reference, axis) if reference else ([], [])
        if xs:
            text = f"{_safe(arm.label)}<br>{reference}"
            guess = _trace(xs, [scale * y for y in ys], i, [text] * len(xs), size=0)
            data.append(
                {**guess, "mode": "lines", "line": {"c": i % COLOURS, "width": 1, "dash": "dot"}}
            )
    has_reference = reference is not None and _has(chosen, reference)
    unit = ", %" if scale == 100 else ""
    return {
        "id": f"plot-{_slug(title)}",
        "title": title,
        "note": "One line for each seed. "
        + ("Bands: 95 % t interval of the mean at each step. " if bands else "")
        + (note if has_reference else ""),
        "height": 340,
        "data": bands + data,  # bands below all lines
        "layout": {
            "xaxis": {"title": {"text": axis}},
            "yaxis": {"title": {"text": _safe(metric) + unit}},
        },
    }


def _band(curves: Sequence[tuple[list[float], list[float]]], i: int) -> list[Plot]:
    """The interval of the mean over seeds that logged at the same places, from three on."""
    if len(curves) < MIN_SEEDS or any(xs != curves[0][0] for xs, _ in curves):
        return []
    xs = curves[0][0]
    lows, highs = [], []
    for values in zip(*(ys for _, ys in curves), strict=True):
        low, high = mean_interval(values) or (fmean(values), fmean(values))
        lows.append(low)
        highs.append(high)
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [*xs, *reversed(xs)],
            "y": [*highs, *reversed(lows)],
            "fill": "toself",  # in half the line's colour
            "line": {"c": i % COLOURS, "width": 0},
            "opacity": 0.35,
            "hoverinfo": "skip",
        }
    ]


def _mixing(arms: Sequence[Arm]) -> Iterable[Plot]:
    """How far the stems' tokens see, before and after training."""
    for attribute, title, what in (
        ("moved_by_distance", "Tokens moved by editing one patch", "moved"),
        ("gradient_by_distance", "Squared gradient of a token", "of the squared gradient"),
    ):
        data: list[Plot] = []
        for i, arm in enumerate(arms):
            for when in WHEN:
                found = measured(arm.first, when)
                ys = [100 * y for y in getattr(found, attribute)] if found else []
                if not ys:
                    continue
                text = [f"{_safe(arm.label)}, {when}<br>{y:.3g} % {what}" for y in ys]
                xs = list(range(len(ys)))
                trace = _trace(xs, ys, i, text, size=8, hollow=when == "fresh")
                trace["mode"] = "lines+markers"
                dash = "dot" if when == "fresh" else "solid"
                trace["line"] = {"c": i % COLOURS, "width": 1.5, "dash": dash}
                data.append(trace)
        farthest = max((len(trace["x"]) for trace in data), default=1) - 1
        yield {
            "id": f"plot-{_slug(title)}",
            "title": f"{title}, by distance",
            "note": "Distance in patches, 0 being the patch itself. Hollow and dotted: the fresh "
            "stem; full: after training.",
            "height": 320,
            "data": data,
            "layout": {
                "xaxis": {
                    "title": {"text": "distance, patches"},
                    "range": [-0.1, farthest + 0.1],
                    "dtick": 1 + farthest // 16,
                },
                "yaxis": {"title": {"text": f"% {what}"}, "rangemode": "tozero"},
            },
        }


def _series(run: Run, metric: str, axis: str) -> tuple[list[float], list[float]]:
    """Where and what a run logged of a metric, thinned evenly, the last entry kept."""
    entries = [e for e in run.metrics if metric in e and axis in e]
    stride = max(1, -(-len(entries) // MAX_POINTS))
    kept = entries[::-1][::stride][::-1]
    return [e[axis] for e in kept], [e[metric] for e in kept]


def _has(arms: Sequence[Arm], metric: str) -> bool:
    return any(metric in e for arm in arms for run in arm.runs for e in run.metrics)


def _axis(arms: Sequence[Arm], metric: str) -> str:
    """`epoch` if all that was logged of a metric says it, else `step`."""
    entries = (e for arm in arms for run in arm.runs for e in run.metrics if metric in e)
    return "epoch" if all("epoch" in e for e in entries) else "step"


def _trace(
    xs: Sequence[Any],
    ys: Sequence[float],
    i: int,
    text: Sequence[str],
    *,
    size: float,
    hollow: bool = False,
) -> Plot:
    symbol = SYMBOLS[i % len(SYMBOLS)] + ("-open" if hollow else "")
    return {
        "type": "scatter",
        "mode": "markers",
        "x": list(xs),
        "y": list(ys),
        "text": list(text),
        "hovertemplate": "%{text}<br>%{x:.4g}, %{y:.4g}<extra></extra>"
        if size in (0, 9)
        else "%{text}<extra></extra>",
        "marker": {"symbol": symbol, "size": size, "c": i % COLOURS},
    }


def _label(text: str, y: float) -> Plot:
    return {
        "text": _safe(text),
        "x": 0,
        "xref": "paper",
        "xanchor": "left",
        "y": y,
        "yanchor": "middle",
        "showarrow": False,
        "align": "left",
    }


def _safe(text: str) -> str:
    return html.escape(text, quote=False)


def _slug(text: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in text.lower()).strip("-")
