"""After how many seeds a study was looked at, which its later pages tell."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from hybridvit.report.page import Report
from hybridvit.report.runs import MAX_PLAN, Run, load_json
from hybridvit.studies.plan_file import looks, update_plan
from hybridvit.studies.status import PLAN


def keep_look(folder: Path, runs: Sequence[Run]) -> None:
    """Note in a study's plan that a page of so many seeds is made."""
    try:
        is_plan = "measured" in load_json(folder, PLAN, MAX_PLAN)
    except ValueError:  # none, or a broken one, which is to stay as it is
        return
    seeds, before = Report(runs, folder).seeds, looks(folder)
    if is_plan and seeds is not None and seeds not in before:
        with contextlib.suppress(OSError):  # of a study that one may only read
            update_plan(folder, looks=[*before, seeds])
