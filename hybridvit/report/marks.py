"""What all plots are made of: colours, symbols, points, and texts that plotly may show.

Colours are numbers here and become colours in the browser, which knows whether the reader's
scheme is light or dark. Plotly reads a subset of HTML in every text, so names are escaped.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, NamedTuple

# Colours and symbols have no common cycle below 56 arms; each symbol with its glyph in the key.
COLOURS = 7
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")
GLYPHS = ("●", "■", "◆", "▲", "▼", "✚", "✖", "★")
DASHES = ("solid", "dash", "dashdot", "longdash")

Plot = dict[str, Any]


class Point(NamedTuple):
    """A symbol with what is said of it; `i` is the place of its arm."""

    x: float
    y: float
    text: str
    i: int


def points(found: Sequence[Point], size: float, hollow: str = "") -> Plot:
    """A trace of symbols; `hollow` is "" or "-open"."""
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [point.x for point in found],
        "y": [point.y for point in found],
        "text": [point.text for point in found],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {
            "symbol": [SYMBOLS[point.i % len(SYMBOLS)] + hollow for point in found],
            "size": size,
            "c": [point.i % COLOURS for point in found],
        },
    }


def line(xs: Sequence[float | None], ys: Sequence[float | None], i: int, text: str) -> Plot:
    """A trace of the lines of one arm, with gaps where there is none."""
    return {
        "type": "scatter",
        "mode": "lines",
        "x": list(xs),
        "y": list(ys),
        "text": text,
        "hovertemplate": "%{text}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
        "line": {"c": i % COLOURS, "width": 1.5, "dash": DASHES[i % len(DASHES)]},
    }


def safe(text: str) -> str:
    """A text that plotly shows as it is."""
    return html.escape(text, quote=False)


def slug(text: str) -> str:
    """A text that may stand in an id."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in text.lower()).strip("-")
