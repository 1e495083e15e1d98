"""Plots as plain data, which the page's one static script hands to plotly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from hybridvit.report.arms import Arm, Comparison
from hybridvit.report.cost import COSTS, Cost, Crossover, crossings, front, paired_curves
from hybridvit.report.curves import curves
from hybridvit.report.leakage import WHEN, measured
from hybridvit.report.marks import COLOURS, GLYPHS, Plot, Point, line, points, safe, slug
from hybridvit.report.runs import Run
from hybridvit.report.tables import Row
from hybridvit.studies.statistics import mean_interval
from hybridvit.studies.status import shorten

ROW_PX = 48
MAX_CROSSINGS = 4  # of more, the text under the plot tells

Lines = Sequence[tuple[int, Row]]  # of the plot of results, from below


def plots(
    arms: Sequence[Arm],
    rows: Sequence[Row],
    comparisons: Sequence[Comparison],
    tuned: tuple[str, ...] = (),
) -> list[Plot]:
    """All plots for which there are numbers: `id`, `title`, `note`, `lines` that say in words what
    no table does, `height`, plotly data. `tuned` are config keys that each arm chose for itself."""
    costs = _costs(arms, rows, comparisons, tuned)
    made = [_results(arms, rows), *costs, *curves(arms), *_mixing(arms)]
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
    scored = [row for row in rows if row.result and row.metric]
    lines = list(enumerate(reversed(scored)))
    places = [arms.index(row.arm) for _, row in lines]
    data = [_seeds(lines, places, "untrained/", "-open"), _seeds(lines, places, "", "")]
    data += _means(lines, places)
    low, high = _range(data)
    return {
        "id": "plot-results",
        "title": "Every seed",
        "note": "One line for each row of the table of results. Small symbols: the seeds, whose "
        "numbers are in the table of runs. Large symbol and bar: their mean and 95 % t interval "
        "(from three seeds on). Hollow: the untrained encoder.",
        "lines": [],
        "height": ROW_PX * len(scored) + 60,
        "data": [_names(lines, low), *data] if lines else [],
        "layout": {
            "xaxis": {"title": {"text": "result, %"}, "range": [low, high]},
            # Lines between the rows.
            "yaxis": {
                "range": [-0.5, len(scored) - 0.4],
                "tickvals": [y + 0.5 for y, _ in lines],
                "showticklabels": False,
                "zeroline": False,
            },
        },
    }


def _names(lines: Lines, x: float) -> Plot:
    """The names of the rows, above their symbols, to leave these all the width of a phone."""
    return {
        "type": "scatter",
        "mode": "text",
        "x": [x] * len(lines),
        "y": [y + 0.32 for y, _ in lines],
        "text": [safe(f"{shorten(row.arm.label, 34)}  {row.metric}") for _, row in lines],
        "textposition": "middle right",
        "hoverinfo": "skip",
    }


def _range(data: Sequence[Plot]) -> tuple[float, float]:
    """Of all symbols and bars, with a little room."""
    ends = [
        x + way * (half or 0)
        for trace in data
        for x, half in zip(
            trace["x"], trace.get("error_x", {}).get("array") or [0] * len(trace["x"]), strict=True
        )
        for way in (-1, 1)
    ]
    low, high = min(ends, default=0), max(ends, default=0)
    room = 0.04 * (high - low) or 1
    return low - room, high + room


def _seeds(lines: Lines, places: Sequence[int], prefix: str, hollow: str) -> Plot:
    """A small symbol for each seed."""
    found = [
        Point(
            100 * value,
            y,
            f"{safe(row.arm.label)}<br>{prefix}{row.metric}, seed {seed}: {100 * value:.2f} %",
            i,
        )
        for (y, row), i in zip(lines, places, strict=True)
        for seed, value in row.arm.values(f"{prefix}{row.metric}").items()
    ]
    return points(found, size=7, hollow=hollow) | {"opacity": 0.75}


def _means(lines: Lines, places: Sequence[int]) -> Iterable[Plot]:
    """A large symbol with its bar for each row; a trace for each colour, as bars have but one."""
    for colour in range(COLOURS):
        found, halves = [], []
        for (y, row), i in zip(lines, places, strict=True):
            if i % COLOURS != colour or row.result is None:
                continue
            interval = mean_interval(list(row.arm.values(row.metric or "").values()))
            spoken = f"{safe(row.arm.label)}<br>mean {row.result} %"
            if interval:
                spoken += f"<br>95 % interval [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
            halves.append(100 * (interval[1] - row.result.mean) if interval else None)
            found.append(Point(100 * row.result.mean, y - 0.27, spoken, i))
        if found:
            bar = {"type": "data", "array": halves, "c": colour, "thickness": 2}
            yield points(found, size=11) | {"error_x": bar}


def _costs(
    arms: Sequence[Arm],
    rows: Sequence[Row],
    comparisons: Sequence[Comparison],
    tuned: tuple[str, ...],
) -> Iterable[Plot]:
    """Result against each cost, a plot for each metric; the cost is chosen on the page."""
    for metric in dict.fromkeys(row.metric for row in rows if row.metric):
        shown = [r for r in rows if r.metric == metric and not r.arm.is_pixels and r.result]
        runs = [(r.arm, [run for run in r.arm.runs if metric in run.results]) for r in shown]
        about = [c for c in comparisons if c.metric == metric]
        axes, lines, both = [], [], paired_curves(about, tuned)
        for title, cost in COSTS:
            found = crossings(both, cost)
            axis = _cost_axis(title, cost, metric, runs, found)
            if axis is not None:
                axes.append(axis)
                best = [shown[i].arm.label for i in axis.pop("best")]
                lines.append(f"Nothing is better and cheaper in {title}: {', '.join(best)}.")
                lines += [f"{crossover.in_words(title)}." for crossover in found]
        if not axes:
            continue
        yield {
            "id": f"plot-cost-{slug(metric)}",
            "title": f"{metric} against cost",
            "note": "One symbol for each seed; dotted, the front of the arms' means: at its cost, "
            "no other arm had a better mean. Differences along it may be chance. results.csv has "
            "the costs." + _crossing_note(axes),
            "lines": lines,
            "height": 360,
            "data": [_cost_points(arm, arms.index(arm), seeds, metric) for arm, seeds in runs],
            "axes": axes,
            "layout": {"yaxis": {"title": {"text": f"{safe(metric)}, %"}}},
        }


def _cost_points(arm: Arm, i: int, seeds: Sequence[Run], metric: str) -> Plot:
    """A symbol for each seed, whose place on the axis depends on the axis."""
    label = safe(arm.label)
    found = [Point(0, 100 * run.results[metric], f"{label}<br>seed {run.seed}", i) for run in seeds]
    spoken = "%{text}<br>%{x:.4g}, %{y:.4g} %<extra></extra>"
    return points(found, size=9) | {"hovertemplate": spoken}


def _cost_axis(
    title: str,
    cost: Cost,
    metric: str,
    runs: Sequence[tuple[Arm, Sequence[Run]]],
    found: Sequence[Crossover],
) -> Plot | None:
    """Positions of all symbols on an axis, the front with the places of its arms, and where stems
    cross; none where a run does not know its cost."""
    known = [[cost(run) for run in seeds] for _, seeds in runs]
    xs = [[x for x in seeds if x is not None] for seeds in known]
    if not xs or any(len(x) < len(all_) for x, all_ in zip(xs, known, strict=True)):
        return None
    means = [
        (fmean(x), 100 * fmean(run.results[metric] for run in seeds))
        for x, (_, seeds) in zip(xs, runs, strict=True)
    ]
    best = front(means)
    everything = [x for seeds in xs for x in seeds]
    return {
        "title": title,
        "xs": xs,
        "log": min(everything) > 0,
        "front": {"x": [means[i][0] for i in best], "y": [means[i][1] for i in best]},
        "best": best,
        "crossings": _crossings(found, min(everything), max(everything)),
    }


def _crossings(found: Sequence[Crossover], low: float, high: float) -> list[Plot]:
    """The single crossings, with their intervals as far as there are costs."""
    single = [c for c in found if c.is_single]
    if len(single) > MAX_CROSSINGS:
        return []
    return [
        {
            "x": c.mean,
            "text": f"{safe(c.hybrid)}<br>{safe(c.pure)}",
            "interval": c.interval and [max(low, c.interval[0]), min(high, c.interval[1])],
        }
        for c in single
    ]


def _crossing_note(axes: Sequence[Plot]) -> str:
    if not any(axis["crossings"] for axis in axes):
        return ""
    return (
        " Upright lines: where a hybrid and a pure stem cross; shaded, the 95 % interval of that "
        "cost, as far as there are arms."
    )


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
                text = f"{safe(arm.label)}, {when}"
                said = [Point(x, y, f"{text}<br>{y:.3g} % {what}", i) for x, y in enumerate(ys)]
                symbols = points(said, size=8, hollow="-open" if when == "fresh" else "")
                trace = line(range(len(ys)), ys, i, text)
                trace["line"]["dash"] = "dot" if when == "fresh" else "solid"
                data.append(trace | symbols | {"mode": "lines+markers"})
        farthest = max((len(trace["x"]) for trace in data), default=1) - 1
        yield {
            "id": f"plot-{slug(title)}",
            "title": f"{title}, by distance",
            "note": "Distance in patches, 0 being the patch itself. Hollow and dotted: the fresh "
            "stem; full: after training. The table of mixing and leakage sums them up.",
            "lines": [],
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
