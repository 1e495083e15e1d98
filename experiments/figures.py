"""Figures of studies' READMEs: `python experiments/figures.py FOLDER ...`, of those in `FIGURES`.

Reads FOLDER/results.csv and writes its picture below FOLDER/figures. Chromium draws it.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import plotly.graph_objects as go

SIZE = 640, 400
# Okabe and Ito's, told apart with any colour vision.
COLOURS = ("#0072b2", "#d55e00", "#000000", "#009e73", "#cc79a7")
LEFT = ("width-half", "depth-half", "mlp-double", "width-double", "patch-half")  # of their points
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross")
Row = dict[str, str]


def lines(rows: list[Row], *, series: int, title: str) -> go.Figure:
    """Runs over a number that stands in the arm's name beside the series, and lines of means."""
    figure = go.Figure()
    names = [row["arm"].split(" / ") for row in rows]
    for n, name in enumerate(dict.fromkeys(parts[series] for parts in names)):
        own = [(float(p[1 - series]), r) for p, r in zip(names, rows, strict=True) if name in p]
        own.sort(key=lambda pair: pair[0])
        means = [(x, fmean(map(accuracy, (r for _, r in group)))) for x, group in
                 itertools.groupby(own, key=lambda pair: pair[0])]  # fmt: skip
        style = {"marker": {"color": COLOURS[n], "symbol": SYMBOLS[n], "size": 9}}
        dash = {"line": {"color": COLOURS[n], "dash": ("solid", "dash")[n]}}
        figure.add_scatter(x=[x for x, _ in own], y=[accuracy(r) for _, r in own],
                           mode="markers", showlegend=False, **style)  # fmt: skip
        figure.add_scatter(x=[x for x, _ in means], y=[y for _, y in means], name=name,
                           mode="lines", **dash)  # fmt: skip
    ticks = sorted({float(parts[1 - series]) for parts in names})
    texts = [f"{tick:,.15g}" for tick in ticks]
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=texts, title=title)
    return figure


def budget(rows: list[Row]) -> go.Figure:
    """Runs over the cost of an image in training, arm by arm; an arm's halving and doubling look
    alike."""
    figure = go.Figure()
    kinds = list(dict.fromkeys(row["arm"].split("-")[0] for row in rows))
    for arm, group in itertools.groupby(rows, key=lambda row: row["arm"]):
        own, n = list(group), kinds.index(arm.split("-")[0])
        x = [float(r["training_flops"]) / float(r["images"]) / 1e9 for r in own]
        figure.add_scatter(
            x=x, y=[accuracy(r) for r in own], mode="markers+text", text=[arm, "", ""],
            textposition="middle left" if arm in LEFT else "middle right", showlegend=False,
            textfont_color=COLOURS[n],
            marker={"color": COLOURS[n], "symbol": SYMBOLS[n], "size": 9},
        )  # fmt: skip
    figure.update_xaxes(
        type="log", tickvals=[0.006, 0.01, 0.02, 0.04, 0.08], range=[-2.45, -0.95],
        title="GFLOPs of an image (training); fewer images to the right",
    )  # fmt: skip
    return figure


def pairs(rows: list[Row]) -> go.Figure:
    """Runs of each setting, side by side, with a bar at their mean."""
    figure = go.Figure()
    groups = list(itertools.product(("AdamW", "SGD"), ("linear", "conv"), range(1, 7)))
    places = [n + 2 * (n // 6) for n in range(len(groups))]  # six, and a gap
    for x, (optimizer, stem, pair) in zip(places, groups, strict=True):
        colour, arm = COLOURS[stem == "conv"], f"{optimizer.lower()}-{pair} / {stem}"
        y = [accuracy(row) for row in rows if row["arm"] == arm]
        runs = {"color": colour, "symbol": "circle-open", "size": 8}
        figure.add_scatter(x=[x] * len(y), y=y, mode="markers", showlegend=False, marker=runs)
        bar = {"color": colour, "width": 4}
        ends = [x - 0.4, x + 0.4]
        figure.add_scatter(x=ends, y=[fmean(y)] * 2, mode="lines", showlegend=False, line=bar)
        if pair == 3:
            where = {"x": x + 0.5, "y": -0.1, "yref": "paper", "yanchor": "top"}
            figure.add_annotation(text=f"{optimizer}, {stem}", showarrow=False, **where)
    title = "<br>optimizer and stem; in each, the six pairs in the order of the file"
    texts = [str(pair) for *_, pair in groups]
    figure.update_xaxes(tickvals=places, ticktext=texts, tickangle=0, title=title)
    return figure


def accuracy(row: Row) -> float:
    """In per cent."""
    return 100 * float(row["value"])


FIGURES: dict[str, tuple[str, Callable[[list[Row]], go.Figure]]] = {
    "0004-pooling": (
        "rates", lambda rows: lines(rows, series=0, title="learning rate for 256 images")
    ),
    "0006-shape": ("shape", budget),
    "0009-training-set-size": (
        "sizes", lambda rows: lines(rows, series=1, title="training images")
    ),
    "0012-optimisability": ("spread", pairs),
}  # fmt: skip


def draw(folder: Path) -> Path:
    """The figure of a study, as a file."""
    name, make = FIGURES[folder.name]
    with (folder / "results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "test/accuracy"]
    figure = make(rows)
    figure.update_yaxes(title="test accuracy, %")
    figure.update_layout(
        template="simple_white", width=SIZE[0], height=SIZE[1], margin={"t": 10, "r": 10},
        legend={"x": 0.98, "y": 0.05, "xanchor": "right", "yanchor": "bottom"},
    )  # fmt: skip
    target = folder / "figures" / f"{name}.png"
    with tempfile.TemporaryDirectory() as temporary:
        page = Path(temporary) / "page.html"
        figure.write_html(page, config={"staticPlot": True})
        command = ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars",
                   f"--window-size={SIZE[0] + 16},{SIZE[1] + 16}", "--virtual-time-budget=5000",
                   f"--screenshot={target.absolute()}", page.as_uri()]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    for given in parser.parse_args().folders:
        print(draw(given.resolve()))
