"""Tuning: every arm tries the same values on validation before its seeds run (`tune`).

Until an arm has chosen, its cells have the config of the study's file. Choices are kept in
plan.json: a study that goes on, or gets more seeds, keeps them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridvit import build
from hybridvit.config import RunConfig, config_hash
from hybridvit.engine.describe import planned_data
from hybridvit.engine.evaluate import evaluated, validation_metric
from hybridvit.studies.cells import check_plugins, named, place, run_study, select
from hybridvit.studies.choices import (
    Choice,
    Trial,
    best,
    from_plain,
    to_plain,
    tried_in_words,
    values_in_words,
    warning,
)
from hybridvit.studies.executors import Executor
from hybridvit.studies.grid import TUNING_SEED, Cell, Study
from hybridvit.studies.plan_file import update_plan
from hybridvit.studies.status import PLAN, read_json, state


def candidates(study: Study) -> list[dict[str, Any]]:
    """What each arm tries: all combinations of the values of the tuned keys."""
    combinations = itertools.product(*study.tune.values()) if study.tune else ()
    return [dict(zip(study.tune, values, strict=True)) for values in combinations]


def tuned_arms(study: Study) -> list[list[Cell]]:
    """The arms that choose: all, or with stages those of the last one."""
    if not study.tune:
        return []
    last = study.stages[-1] if study.stages else None
    return [cells for cells in study.arms() if cells[0].stage == last]


def tuning_cells(study: Study) -> list[list[Cell]]:
    """The runs that choose, of each tuned arm: the same candidates with the same seed, which is
    no seed of the study, so that no result comes from a run that was picked for its luck. With
    stages they start from the weights that the arm's first seed starts from."""
    tried = candidates(study)
    return [[_tuning_cell(cells[0], values) for values in tried] for cells in tuned_arms(study)]


def check_validation(study: Study) -> None:
    """See that every arm can be judged on validation images.

    Raises:
        ValueError: an arm without such images, or with neither a head nor a k-NN probe.
    """
    for cells in tuned_arms(study):
        config, label = cells[0].config, cells[0].label
        if config.data.val_fraction == 0:
            raise ValueError(
                f"tune: {label} has no validation images to choose by; set data.val_fraction "
                "above 0, such as 0.1"
            )
        parts, _ = build.make_parts(config.plugins)
        objective = build.make_objective(config, parts, planned_data(config, parts)[0])
        if validation_metric(evaluated(objective, config), config) is None:
            raise ValueError(
                f"tune: objective {config.objective.name!r} of {label} has no number on "
                "validation images; add knn to eval.probes"
            )


def kept_choices(study: Study, out: Path) -> list[Choice | None]:
    """What plan.json holds of each tuned arm's choice, if that rests on the runs it has now.

    Raises:
        ValueError: a choice of what was not tried.
    """
    content = read_json(out / PLAN) or {}
    known = {choice.cells: choice for choice in from_plain(content.get("tuning"))}
    found = [known.get(tuple(c.name for c in cells)) for cells in tuning_cells(study)]
    for choice in found:
        if choice is not None and choice.chosen not in candidates(study):
            raise ValueError(
                f"{out / PLAN}: {choice.label} has {values_in_words(choice.chosen)}, which it did "
                "not try; restore the file, or remove it to choose anew"
            )
    return found


def with_choices(study: Study, choices: Sequence[Choice | None]) -> Study:
    """The study whose arms train with what they chose, without those that have not chosen."""
    chosen = _chosen(study, choices)
    cells = [chosen.get(cell.name, cell) for cell in study.cells]
    return dataclasses.replace(study, cells=[cell for cell in cells if cell is not None])


def planned(study: Study, choices: Sequence[Choice | None]) -> dict[str, Any]:
    """The keys of plan.json that choices decide. A cell that waits for one has no hash yet."""
    chosen = _chosen(study, choices)
    cells = [*itertools.chain(*tuning_cells(study))]
    for cell in study.cells:
        nameless = dataclasses.replace(cell, name=cell.name.rpartition("-")[0])
        cells.append(chosen.get(cell.name, cell) or nameless)
    return {
        "cells": [
            {"name": c.name, "label": c.label, "epochs": c.config.train.epochs, "kind": c.kind}
            for c in cells
        ],
        "tuning": to_plain([choice for choice in choices if choice is not None]),
    }


def run_tuned(
    study: Study,
    out: Path,
    *,
    only: str | None = None,
    retry_failed: bool = False,
    executor: Executor | None = None,
) -> tuple[Study, list[str]]:
    """Let the arms choose whose cells are to run, then run these.

    Args:
        only, retry_failed, executor: see `run_study`.

    Returns:
        the study as it was run, without arms that have not chosen, and the names of the cells
        that failed. A candidate that diverged has lost, not failed.

    Raises:
        ValueError: no cell has such a name, or some were run with other code of a plug-in.
    """
    tried = [*itertools.chain(*tuning_cells(study))]
    check_plugins(dataclasses.replace(study, cells=tried), out)
    choices = kept_choices(study, out)
    asked = _asked(study, choices, only)
    failed: list[str] = []
    if asked:
        cells = _with_predecessors(study, [c for i in asked for c in tuning_cells(study)[i]])
        trials = dataclasses.replace(study, cells=cells)
        run_study(trials, out, retry_failed=retry_failed, executor=executor)
        for i in asked:
            choices[i], missing = _choose(study, i, out)
            failed += missing
        # Another process may have tuned other arms meanwhile.
        later = kept_choices(study, out)
        choices = [mine or theirs for mine, theirs in zip(choices, later, strict=True)]
        update_plan(out, **planned(study, choices))
    study = with_choices(study, choices)
    check_plugins(study, out)
    if named(study.cells, only):
        failed += run_study(study, out, only=only, retry_failed=retry_failed, executor=executor)
    return study, failed


def _asked(study: Study, choices: Sequence[Choice | None], only: str | None) -> list[int]:
    """Which tuned arms have not chosen, of those whose cells or tuning runs are to run."""
    seeds, trials = tuned_arms(study), tuning_cells(study)
    known = with_choices(study, choices).cells
    select([*itertools.chain(*trials), *study.cells, *known], only)  # raises if there is none
    return [
        i
        for i, choice in enumerate(choices)
        if choice is None and named([*seeds[i], *trials[i]], only)
    ]


def _choose(study: Study, arm: int, out: Path) -> tuple[Choice | None, list[str]]:
    """The best on validation of what an arm tried, or the runs that stand in the way: each
    candidate is to have its chance."""
    label, cells = tuned_arms(study)[arm][0].label, tuning_cells(study)[arm]
    results = {cell.name: _results(cell, out) for cell in cells}
    missing = [name for name, found in results.items() if found is None]
    if missing:
        print(f"{label} is not tuned, its seeds wait: {missing[0]} is not complete")
        return None, missing
    metric = next((key for found in results.values() for key in found or ()), None)
    if metric is None:
        print(f"{label} is not tuned, its seeds wait: all that it tried diverged")
        return None, list(results)
    trials = tuple(
        Trial(name, values, (found or {}).get(metric))
        for (name, found), values in zip(results.items(), candidates(study), strict=True)
    )
    choice = Choice(label, metric, trials, best(trials) or {})
    print(f"{label} takes {values_in_words(choice.chosen)} by {metric}: {tried_in_words(choice)}")
    if text := warning(choice):
        print(f"Warning: {text}")
    return choice, []


def _results(cell: Cell, out: Path) -> dict[str, float] | None:
    """What a tuning run says of its validation images: nothing if it diverged, none if it has not
    ended."""
    status = state(place(cell, out)).status
    if status == "diverged":
        return {}
    summary = read_json(out / cell.name / "summary.json")
    if status != "complete" or summary is None:
        return None
    results: dict[str, float] = summary["results"]
    return results


def _with_predecessors(study: Study, cells: Sequence[Cell]) -> list[Cell]:
    """The cells and before them those whose weights they start from."""
    known = {c.name: c for c in study.cells}
    found: dict[str, Cell] = {}
    for cell in cells:
        chain = [cell]
        while (after := chain[0].after) is not None:
            chain.insert(0, known[after])
        found |= {c.name: c for c in chain}
    return list(found.values())


def _tuning_cell(first: Cell, values: dict[str, Any]) -> Cell:
    """The run of an arm's first seed, but for the values and the seed."""
    config = dataclasses.replace(_with(first.config, values), seed=TUNING_SEED)
    short = [f"{key.rpartition('.')[2]}{value}" for key, value in values.items()]
    name = "-".join([*first.arm.values(), "tune", *short, config_hash(config)])
    arm = {**first.arm, "tune": values_in_words(values)}
    return Cell(name, config, arm, "tune", first.after)


def _chosen(study: Study, choices: Sequence[Choice | None]) -> dict[str, Cell | None]:
    """By name each cell of a tuned arm with what the arm chose; none where it has not chosen."""
    return {
        cell.name: cell.with_config(_with(cell.config, choice.chosen)) if choice else None
        for cells, choice in zip(tuned_arms(study), choices, strict=True)
        for cell in cells
    }


def _with(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    changed = {key.partition(".")[2]: value for key, value in values.items()}
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, **changed))
