"""Differences between the arms of a study that its report does not compare: `python
experiments/contrasts.py FOLDER 'ARM vs OTHER' ...`, where `* vs OTHER` is every other arm.

Reads FOLDER/results.csv and prints a Markdown table: test accuracy, or another `--metric` such as
test/linear, in points, paired by seed; a 95 % interval of each by itself and Holm's over all that
are asked for (docs/statistics.md).
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hybridvit.studies.statistics import Difference, paired_difference, together


def read(folder: Path, metric: str) -> dict[str, dict[int, float]]:
    """A metric in per cent by arm and seed, of complete runs."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    with (folder / "results.csv").open() as lines:
        for row in csv.DictReader(lines):
            if row["metric"] == metric and row["status"] == "complete":
                # Runs that the report does not count come last.
                found[row["arm"]].setdefault(int(row["seed"]), 100 * float(row["value"]))
    return dict(found)


def diverged(folder: Path) -> set[str]:
    """Arms of which a run did."""
    with (folder / "results.csv").open() as lines:
        return {row["arm"] for row in csv.DictReader(lines) if row["status"] == "diverged"}


def pairs(asked: list[str], arms: list[str]) -> list[tuple[str, str]]:
    """(arm, other) of each contrast that is asked for.

    Raises:
        ValueError: an arm that the study does not have.
    """
    found = []
    for contrast in asked:
        left, _, other = contrast.partition(" vs ")
        wanted = [arm for arm in arms if arm != other] if left == "*" else [left]
        for arm in (*wanted, other):
            if arm not in arms:
                raise ValueError(
                    f"no arm {arm!r} in the results; there are: {', '.join(arms) or 'none'}"
                )
        found += [(arm, other) for arm in wanted]
    return found


def line(arm: str, other: str, alone: Difference, joint: Difference) -> str:
    """One row: difference, deviation, interval by itself, interval and verdict among all."""
    spread = "" if alone.std is None else f"{alone.std:.1f}"
    cells = (arm, other, f"{alone.mean:+.1f}", spread, ends(alone), ends(joint), joint.verdict)
    return f"| {' | '.join(cells)} |"


def ends(d: Difference) -> str:
    """An interval; an end of zero is itself outside."""
    if d.low is None or d.high is None:
        return ""
    left, right = "(" if d.low == 0 else "[", ")" if d.high == 0 else "]"
    return f"{left}{d.low:.1f}, {d.high:.1f}{right}"


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("asked", nargs="+", metavar="ARM vs OTHER")
    parser.add_argument("--metric", default="test/accuracy")
    arguments = parser.parse_args(words)
    values = read(arguments.folder, arguments.metric)
    try:
        chosen = pairs(arguments.asked, list(values))
    except ValueError as error:
        parser.error(f"{arguments.metric}: {error}")
    lost, alone = diverged(arguments.folder), []
    for arm, other in chosen:
        seeds = sorted(values[arm].keys() & values[other].keys())
        found = paired_difference(
            [values[arm][s] for s in seeds], [values[other][s] for s in seeds]
        )
        if lost & {arm, other}:  # what is left went well
            found = replace(found, low=None, high=None, verdict="diverged")
        alone.append(found)
    print("| arm | other | points | deviation | by itself | among all here | verdict |")
    print("|---|---|---|---|---|---|---|")
    for (arm, other), one, joint in zip(chosen, alone, together(alone), strict=True):
        print(line(arm, other, one, joint))


if __name__ == "__main__":
    main()
