"""Where the numbers of a report come from, and how to get them again."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hybridvit.report.arms import NOT_COMPARED, Arm, settings, varying
from hybridvit.report.caveats import environment
from hybridvit.report.runs import Run

RUN_HEADINGS = ("run", "arm", "seed", "status", "results", "hash", "commit", "started")
MISSING = "none"

Relative = Callable[[Path], str]


def run_table(runs: Sequence[tuple[str, Run]], relative: Relative) -> list[tuple[str, ...]]:
    """Cells under `RUN_HEADINGS` of each (arm label, run); results on a line each."""
    lines: list[tuple[str, ...]] = []
    for label, run in runs:
        code = run.section("code")
        commit = str(code.get("commit") or MISSING)[:12]
        dirty = " (dirty)" if code.get("dirty") is True else ""
        lines.append(
            (
                relative(run.path),
                label,
                str(run.seed),
                run.status,
                "\n".join(f"{k}: {100 * v:.1f}\u00a0%" for k, v in run.results.items()),
                run.hash,
                commit + dirty,
                str(run.record.get("started", ""))[:10],
            )
        )
    return lines


def commands(runs: Sequence[tuple[str, Run]], relative: Relative) -> str:
    """A command for each training run, below a comment with the code that it was made with."""
    by_code: dict[str, list[str]] = {}
    for _, run in runs:
        if run.kind == "train":
            config = shlex.quote(relative(run.path / "config.yaml"))
            by_code.setdefault(_code(run), []).append(f"hybridvit train {config}")
    return "\n".join(line for code, lines in by_code.items() for line in (f"# {code}", *lines))


def command_notes(runs: Sequence[Run]) -> list[str]:
    """What to know before running the commands again, in sentences."""
    notes = [
        "From the folder of this page, with the code named. A run directory's config.yaml is "
        "complete, defaults and seed included; the hash of the new run is the same under the same "
        "version."
    ]
    if any(run.config.get("init") for run in runs):
        notes.append(
            "Runs that start from another one (init) name its folder as seen from where they were "
            "started: run those there."
        )
    if any(":" in name for run in runs for name in run.section("plugins")):
        notes.append(
            "Plug-ins named module:function are imported from the folder that a command is started "
            "from: add the one that holds them to PYTHONPATH."
        )
    if any(run.section("data").get("name") != "digits" for run in runs):
        notes.append(
            "Data are looked for in $HYBRIDVIT_DATA unless the config names their root: set it."
        )
    if any(run.kind == "pixels" for run in runs):
        notes.append("Raw pixels are run by hybridvit study, on the study's file.")
    return notes


def made_with(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Each item of the environment, with the number of runs where they differ."""
    found = [environment(run) for run in runs]
    lines = []
    for name in dict.fromkeys(k for env in found for k in env if k != "commit"):
        values = Counter(env.get(name, MISSING) for env in found)
        several = len(values) > 1
        texts = (f"{v} ({n} runs)" if several else v for v, n in values.most_common())
        lines.append((name, "; ".join(texts)))
    return lines


def protocols(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """How results were measured, by name."""
    found: dict[tuple[str, str], None] = {}
    for run in runs:
        protocol = run.summary.get("protocol")
        if isinstance(protocol, dict):
            found.update({(k, _value(v)): None for k, v in protocol.items()})
    return sorted(found)


def differing(arms: Sequence[Arm]) -> list[tuple[str, ...]]:
    """The config values that are not the same in all arms, under headings: arms in columns, or in
    lines where there are more of them than of values."""
    values = varying([arm.first for arm in arms])
    if not values:
        return []
    texts = (["" if v is None else _value(v) for v in row] for row in values.values())
    labels = [arm.label for arm in arms]
    table = [("config", *labels), *((key, *row) for key, row in zip(values, texts, strict=True))]
    return table if len(arms) <= len(values) else [*zip(*table, strict=True)]


def same(arms: Sequence[Arm]) -> str:
    """How many config values are the same in all arms, and which were not compared."""
    keys = {key for arm in arms for key in settings(arm.first)} - set(NOT_COMPARED)
    count = len(keys) - len(varying([arm.first for arm in arms]))
    return (
        f"{count} further config values are the same in all runs of all arms. "
        "Not compared: the seed, the folder of the data, and of a run that is started from, its "
        "seed."
    )


def _code(run: Run) -> str:
    code = run.section("code")
    dirty = ", with uncommitted changes" if code.get("dirty") is True else ""
    return f"hybridvit {code.get('version')}, commit {code.get('commit') or MISSING}{dirty}"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
