"""What stems mix and what runs leak, as run records hold it: table cells and small pictures.

Numbers of a record that are missing or unsound are left out; a record of before the meter has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hybridvit.report.arms import Arm
from hybridvit.report.runs import Run, mapping
from hybridvit.studies.status import number

HEADINGS = (
    "arm",
    "tokens that one patch moves",
    "after training",
    "squared gradient outside the patch, %",
    "after training",
    "tokens / predictions that hidden pixels reach",
)
WHEN = ("fresh", "trained")
MAX_SIDE = 32  # cells of a picture, and
MAX_DISTANCE = 4096  # entries of a curve that are believed
FAINTEST = 1e-3  # relative change below which a cell is hardly coloured


@dataclass(frozen=True)
class Measured:
    """One measurement of a run, before or after its training. Shares, not per cent."""

    tokens: float | None  # an image
    moved: float | None  # share of them, by editing one patch
    outside: float | None  # share of the squared gradient
    moved_by_distance: tuple[float, ...]
    gradient_by_distance: tuple[float, ...]
    picture: tuple[tuple[float, ...], ...]  # change of each token when the middle patch is edited
    # Shares of the tokens and of the predictions that hidden pixels reach, and of the gradient on
    # them; none where nothing is hidden.
    hidden: tuple[float, ...] | None


def measured(run: Run, when: str) -> Measured | None:
    """What the record of a run says of its stem and its hidden pixels, `fresh` or `trained`."""
    section = run.section("leakage") if when == "fresh" else run.summary.get("leakage")
    mixing = mapping(section, ("mixing",))
    if not mixing:
        return None
    hidden = mapping(section, ("hidden",))
    shares = [number(hidden.get(key)) for key in ("tokens", "outputs", "gradient")]
    known = tuple(share for share in shares if share is not None)
    return Measured(
        tokens=number(mixing.get("tokens")),
        moved=number(mixing.get("moved")),
        outside=number(mixing.get("jacobian_outside")),
        moved_by_distance=_numbers(mixing.get("moved_by_distance"), MAX_DISTANCE),
        gradient_by_distance=_numbers(mixing.get("jacobian_by_distance"), MAX_DISTANCE),
        picture=_grid(mixing.get("picture")),
        hidden=known if len(known) == len(shares) else None,
    )


def leaked(run: Run) -> tuple[float, ...] | None:
    """`Measured.hidden` of a run, the larger of before and after training."""
    found = [m.hidden for when in WHEN if (m := measured(run, when)) and m.hidden]
    return tuple(map(max, zip(*found, strict=True))) if found else None


def table(arms: Sequence[Arm]) -> list[tuple[str, ...]]:
    """Cells under `HEADINGS` of each arm that has a measurement."""
    lines: list[tuple[str, ...]] = []
    for arm in arms:
        fresh, trained = (measured(arm.first, when) for when in WHEN)
        if fresh:
            lines.append(
                (
                    arm.label,
                    _moved(fresh),
                    _moved(trained),
                    _per_cent(fresh.outside),
                    _per_cent(trained.outside if trained else None),
                    _leaked(arm.first),
                )
            )
    return lines


def pictures(arms: Sequence[Arm], most: int) -> list[dict[str, Any]]:
    """At most so many arms' grids of cells (x, y, opacity, text), fresh and trained."""
    found = []
    for arm in arms[:most]:
        grids = []
        for when in WHEN:
            grid = (m := measured(arm.first, when)) and m.picture
            if grid:
                grids.append({"when": when, **_cells(grid)})
        if grids:
            found.append({"label": arm.label, "grids": grids})
    return found


def opacity(change: float) -> float:
    """How strongly a change is coloured: evenly by its logarithm, from 0.1 % to 100 %."""
    if change <= 0:
        return 0.0
    depth = 1 - math.log(max(change, FAINTEST)) / math.log(FAINTEST)
    return round(max(0.05, min(1.0, depth)), 2)


def _cells(grid: tuple[tuple[float, ...], ...]) -> dict[str, Any]:
    height, width = len(grid), len(grid[0])
    cells = [
        {"x": x, "y": y, "opacity": opacity(change), "text": f"{100 * change:.3g} %"}
        for y, row in enumerate(grid)
        for x, change in enumerate(row)
    ]
    return {"width": width, "height": height, "cells": cells, "x": width // 2, "y": height // 2}


def _moved(found: Measured | None) -> str:
    if found is None or found.moved is None or found.tokens is None:
        return ""
    return f"{found.moved * found.tokens:.3g} of {found.tokens:.0f}"


def _leaked(run: Run) -> str:
    found = leaked(run)
    if found is None:
        return "hides nothing"
    return " / ".join(f"{100 * share:.3g} %" for share in found[:2]) if any(found) else "0"


def _per_cent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.3g}"


def _numbers(node: Any, most: int) -> tuple[float, ...]:
    """A list of numbers of at least 0; nothing for all else."""
    if not isinstance(node, list) or len(node) > most:
        return ()
    values = [value for item in node if (value := number(item)) is not None and value >= 0]
    return tuple(values) if len(values) == len(node) else ()


def _grid(node: Any) -> tuple[tuple[float, ...], ...]:
    if not isinstance(node, list) or len(node) > MAX_SIDE:
        return ()
    grid = tuple(_numbers(row, MAX_SIDE) for row in node)
    return grid if len({len(row) for row in grid}) == 1 and grid[0] else ()
