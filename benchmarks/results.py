"""From the rates of each round to the rows of the table."""

from __future__ import annotations

from statistics import median
from typing import Any

from cases import Case, Row

Spread = dict[str, Any]  # median, min and max


def spread(values: list[float]) -> Spread:
    """Median, least and greatest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def rows(case: Case, contestants: dict[str, dict[str, Any]]) -> list[Spread]:
    """The rows of a case whose contestants were all there: what is said and its spread."""
    return [
        {"what": row.what, "against": row.against, "kind": row.kind, **spread(values)}
        for row in case.rows
        if (values := of_rounds(row, contestants)) is not None
    ]


def of_rounds(row: Row, contestants: dict[str, dict[str, Any]]) -> list[float] | None:
    """A row's value in each round; None where a contestant is missing.

    Args:
        contestants: of each, `rates` by round, and `flops_per_image` where the row asks for it.
    """
    first = contestants.get(row.first)
    second = contestants.get(row.second or row.first)
    if first is None or second is None:
        return None
    pairs = list(zip(first["rates"], second["rates"], strict=True))
    match row.kind:
        case "ratio":
            return [a / b for a, b in pairs]
        case "utilisation":
            factor = first["flops_per_image"] / second["flops_per_image"]
            return [factor * a / b for a, b in pairs]
        case "share":
            return [first["flops_per_image"] * a / b for a, b in pairs]
        case "rate":
            return [a for a, _ in pairs]
        case "seconds":
            return [1 / a for a, _ in pairs]
        case "seconds above":
            return [1 / a - 1 / b for a, b in pairs]


def reached(row: Row, value: float) -> bool | None:
    """Whether a value reaches the row's goal; None without one."""
    if row.goal is None:
        return None
    return value <= row.goal if row.kind.startswith("seconds") else value >= row.goal
