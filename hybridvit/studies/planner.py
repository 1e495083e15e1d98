"""A study's budgets, matched, and what they rest on, kept in plan.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridvit.studies.cells import check_plugins
from hybridvit.studies.executors import Executor
from hybridvit.studies.executors.local import Local
from hybridvit.studies.facts import Facts, kept_facts, key_of, known
from hybridvit.studies.grid import Study
from hybridvit.studies.matching import (
    SET_BY_MATCH,
    Arm,
    check_budgets,
    check_known,
    match,
    with_arms,
)
from hybridvit.studies.plan_file import looks, planned_names, write_plan
from hybridvit.studies.timing import timed
from hybridvit.studies.tuning import check_validation, kept_choices, planned

SCHEMA = 1
WARMUP_STEPS, TIMED_STEPS = 5, 20  # to match seconds


def plan(study: Study, out: Path, executor: Executor | None = None) -> Study:
    """The study with matched budgets; what it rests on is measured once and kept in plan.json.

    Args:
        executor: where the cells will run, and so steps are timed; by default on this machine.

    Raises:
        ValueError: the arms cannot be matched, or some were run with other code of a plug-in.
    """
    check_plugins(study, out)
    check_budgets(study)
    check_validation(study)
    kept = kept_facts(out)
    arms: list[Arm] = []
    if study.match in (*SET_BY_MATCH, "params"):
        facts = known(study.arms(), kept)
        if study.match == "seconds":
            out.mkdir(parents=True, exist_ok=True)  # which any machine of the executor can read
            executor = executor or Local(study.threads)
            facts = timed(study, facts, WARMUP_STEPS, TIMED_STEPS, executor, out)
        keys = [key_of(cells[0].config) for cells in study.arms()]
        kept |= {k: f for k, f in zip(keys, facts, strict=True) if f.images is not None}
        arms = match(study, facts)
        check_known(arms, study.match)
        study = with_arms(study, arms)
    _write(study, arms, kept, out)
    return study


def _write(study: Study, arms: Sequence[Arm], kept: dict[str, Facts], out: Path) -> None:
    budgets = [
        {
            "label": arm.label,
            "arm": arm.cells[0].arm,
            "measured": key_of(arm.config),
            "epochs": arm.config.train.epochs,
            "steps": arm.steps,
            "images": None if arm.steps is None else arm.steps * arm.config.train.batch_size,
            "flops": arm.flops,
            "seconds": arm.seconds,
        }
        for arm in arms
    ]
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "study": study.name,
        "title": study.title,
        "question": study.question,
        "match": study.match,
        "smallest_difference": study.smallest_difference,
        "baseline": study.baseline,
        "arms": budgets,
        **planned(study, kept_choices(study, out)),
        "measured": {key: dataclasses.asdict(facts) for key, facts in kept.items()},
    }
    names = {cell["name"] for cell in content["cells"]}
    # Of other runs, as of another length, there was no look.
    content["looks"] = looks(out) if names & planned_names(out) else []
    write_plan(out, content)
