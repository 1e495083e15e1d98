"""How often the interval of a crossing holds the true one: the numbers of docs/reports.md.

Three costs a factor e apart; the hybrid's lead grows by one from each to the next and is zero at
the true crossing. Every arm and seed adds noise to it.

    python tests/report/crossing_coverage.py
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from hybridvit.report.arms import compare, group
from hybridvit.report.cost import COSTS, crossovers
from hybridvit.report.runs import Run

STUDIES = 1000
LOGS = (0, 1, 2)  # of the costs


def runs(crossing: float, noise: float, seeds: int, rng: np.random.Generator) -> list[Run]:
    """Of one study; noise is the standard deviation of a lead."""
    made = []
    for stem in ("linear", "conv"):
        for x in LOGS:
            model = {"patch_local": stem == "linear", "flops": {"forward": 1e9 * math.exp(x)}}
            for seed in range(seeds):
                lead = 0.01 * (x - crossing + noise * rng.normal()) if stem == "conv" else 0
                config = {"stem": {"name": stem}, "encoder": {"args": {"depth": x}}}
                made.append(
                    Run(
                        Path("x"), stem, f"{stem}{x}{seed}", "train", "complete", seed, {},
                        {**config, "objective": {"name": "supervised"}}, {"model": model},
                        results={"test/accuracy": 0.5 + lead},
                    )
                )  # fmt: skip
    return made


def main() -> None:
    """Print a line for each setting."""
    print("seeds  noise  crossing at  interval shown  holds the crossing")
    for seeds in (3, 5):
        for noise in (0.1, 0.3, 0.6):
            for share in (0.5, 0.2, 0.1):
                rng, crossing, shown, held = np.random.default_rng(0), 2 * share, 0, 0
                for _ in range(STUDIES):
                    pairs = compare(group(runs(crossing, noise, seeds, rng)))
                    (found,) = crossovers(pairs, COSTS[0][1])
                    if found.interval:
                        low, high = map(math.log, found.interval)
                        shown, held = shown + 1, held + (low <= crossing <= high)
                of_all, of_shown = shown / STUDIES, held / max(1, shown)
                print(f"{seeds:5}  {noise:5}  {share:11}  {of_all:14.0%}  {of_shown:18.0%}")


if __name__ == "__main__":
    main()
