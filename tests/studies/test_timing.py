from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from two_stems import TINY, read

from hybridvit.studies import planner
from hybridvit.studies.executors import Executor
from hybridvit.studies.facts import Facts
from hybridvit.studies.grid import Study
from hybridvit.studies.timing import time_steps


def test_seconds_are_those_of_a_step(tmp_path: Path) -> None:
    (cells, _) = read(tmp_path / "s", "seconds").arms()
    config = dataclasses.replace(
        cells[0].config, train=dataclasses.replace(cells[0].config.train, threads=None)
    )
    time_steps(config, 5, 20, tmp_path / "timed")
    result = json.loads((tmp_path / "timed" / "result.json").read_text())
    assert 1e-5 < result["seconds_per_step"] < 1
    assert result["memory"] > 1 << 20
    lines = (tmp_path / "timed" / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 25
    # Behind the first lap, images/s and seconds a step are one thing.
    rates = [json.loads(line)["images_per_second"] for line in lines[1:]]
    assert result["seconds_per_step"] == pytest.approx(sum(64 / r for r in rates) / 4)


def test_seconds_are_measured_once_over_20_steps_behind_the_warm_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    measure = planner.timed

    def timed(
        study: Study, facts: list[Facts], warmup: int, steps: int, where: Executor, folder: Path
    ) -> Any:
        asked.append((warmup, steps))
        return measure(study, facts, warmup, steps, where, folder)

    monkeypatch.setattr(planner, "timed", timed)
    # So many steps that one of them is less than 1 %, however slow the second arm is.
    out, longer = tmp_path / "out", [*TINY, "train.epochs=40"]
    first = planner.plan(read(tmp_path / "s", "seconds", over=longer), out)
    assert all(warmup >= 1 and steps >= 20 for warmup, steps in asked)
    kept = json.loads((out / "plan.json").read_text())
    speeds = [facts["seconds_per_step"] for facts in kept["measured"].values()]
    assert len(speeds) == 2
    assert all(facts["hardware"]["cores"] >= 1 for facts in kept["measured"].values())
    steps = [arm["steps"] for arm in kept["arms"]]
    assert steps[0] == 808  # 40 epochs of 1,293 images, as configured
    assert steps[1] == round(808 * speeds[0] / speeds[1])
    before = json.dumps(kept["measured"])
    again = planner.plan(read(tmp_path / "s", "seconds", over=longer), out)
    assert again.cells == first.cells
    assert json.dumps(json.loads((out / "plan.json").read_text())["measured"]) == before
