"""Cells of a study beside other processes, and cells that other studies have run."""

from __future__ import annotations

import dataclasses
import fcntl
import json
from pathlib import Path

import pytest
import yaml

from hybridvit import build
from hybridvit.config import RunConfig, config_hash, resolved
from hybridvit.engine.runlog import RunDirectory
from hybridvit.studies.cells import BUSY, _reuse, run_cell
from hybridvit.studies.grid import Cell, Study
from hybridvit.studies.plan_file import write_plan
from hybridvit.studies.planner import plan
from hybridvit.studies.status import ERROR, PLAN, read_json


def test_a_cell_waits_for_one_that_another_process_runs(tmp_path: Path) -> None:
    before = tmp_path / "before-01234567"
    before.mkdir()
    cell = Cell("cell-01234567", RunConfig(), {}, after=before.name)
    with (before / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as ended:
            run_cell(cell, tmp_path)
    assert ended.value.code == BUSY
    assert not (tmp_path / cell.name / ERROR).exists()


def test_a_reused_cell_starts_from_the_runs_of_its_own_study(tmp_path: Path) -> None:
    """Or the report would take it for another arm than the seeds that are trained here."""
    there, out = tmp_path / "there", tmp_path / "here"
    cell = Cell("a-seed0-01234567", RunConfig(init="mine-seed0-89abcdef"), {"x": "a"})
    cell = dataclasses.replace(cell, after="mine-seed0-89abcdef")
    cell = dataclasses.replace(cell, name=f"a-seed0-{config_hash(cell.config)}")
    source = there / f"b-seed0-{config_hash(cell.config)}"
    source.mkdir(parents=True)
    out.mkdir()
    record = {"hash": config_hash(cell.config), "kind": "train", "status": "complete"}
    (source / "run.json").write_text(json.dumps(record))
    theirs = dataclasses.replace(cell.config, init="elsewhere/theirs-seed0-89abcdef")
    RunDirectory(source).write_config(resolved(theirs))
    assert _reuse(cell, out)
    found = yaml.safe_load((out / cell.name / "config.yaml").read_text())
    assert found["init"] == str(out / "mine-seed0-89abcdef")
    kept = yaml.safe_load((source / "config.yaml").read_text())
    assert kept["init"] == "elsewhere/theirs-seed0-89abcdef"


def test_a_plan_is_replaced_whole(tmp_path: Path) -> None:
    write_plan(tmp_path, {"schema": 1})
    write_plan(tmp_path, {"schema": 2})
    assert read_json(tmp_path / PLAN) == {"schema": 2}
    assert [path.name for path in tmp_path.iterdir()] == [PLAN]


def test_cells_of_other_code_of_a_plugin_are_neither_compared_nor_reused(tmp_path: Path) -> None:
    config = RunConfig(plugins=["own_parts:register"])
    cell = Cell(f"a-seed0-{config_hash(config)}", config, {"x": "a"})
    study = Study("s", "S", "?", None, 1, [cell])
    now = build.make_parts(config.plugins)[1]
    record = {"hash": config_hash(config), "kind": "train", "status": "complete"}

    def write(out: Path, plugins: dict[str, str]) -> None:
        (out / cell.name).mkdir(parents=True, exist_ok=True)
        (out / cell.name / "run.json").write_text(json.dumps({**record, "plugins": plugins}))

    out = tmp_path / "here"
    for same in (now, {"own_parts:register": "unversioned"}):  # of a record without its code
        write(out, same)
        plan(study, out)
    write(out, {"own_parts:register": "unversioned, code 01234567"})
    with pytest.raises(ValueError, match="was made with other code of plug-in 'own_parts"):
        plan(study, out)
    # Also where the study has no such cell any more, as of another length that cost was matched at.
    shorter = dataclasses.replace(cell, name="a-seed0-76543210")
    with pytest.raises(ValueError, match=cell.name):
        plan(dataclasses.replace(study, cells=[shorter]), out)
    # A run of the new code is taken from another study's folder, one of the old code is not.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert not _reuse(cell, elsewhere)
    write(tmp_path / "there", now)
    assert _reuse(cell, elsewhere)
