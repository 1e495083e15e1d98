import json
from pathlib import Path

import pytest
from run_directories import write_run

from hybridvit.cli import main
from hybridvit.report import find_study
from hybridvit.report.runs import find_runs
from hybridvit.report.study import read_plan

STUDY = """
title: A title of <its> own
question: Does it help?
longer: hybridvit study experiments/0042-mine train.epochs=300
config: digits.yaml
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of two runs, with a third planned and a fourth of an earlier plan beside them."""
    monkeypatch.chdir(tmp_path)
    folder = Path("experiments/0042-mine")
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(STUDY)
    runs = Path("runs/0042-mine")
    for name, stem in (("a", "linear"), ("b", "conv"), ("old", "resnet")):
        write_run(runs, stem, results={"test/accuracy": 0.5}, folder=name)
    cells = [{"name": name, "kind": "train"} for name in ("a", "b", "c")]
    cells.append({"name": "t", "kind": "tune"})
    plan = {"schema": 1, "title": "of the plan", "question": "Q", "cells": cells}
    (runs / "plan.json").write_text(json.dumps(plan))
    return folder


@pytest.mark.parametrize("given", ["experiments/0042-mine", "experiments/0042-mine/study.yaml"])
def test_a_study_is_reported_by_its_name(
    study: Path, given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", given]) == 0
    assert "report: runs/0042-mine/report.html" in capsys.readouterr().out
    text = Path("runs/0042-mine/report.html").read_text("utf-8")
    assert "<h1>A title of &lt;its&gt; own</h1>" in text
    assert "Does it help?" in text
    assert "2 runs (2 complete)" in text  # as planned, without the old one
    assert "1 of the study&#39;s 3 runs are not on this page" in text
    assert "left out): c." in text


def test_a_folder_of_runs_brings_its_title_and_all_its_runs(study: Path) -> None:
    assert main(["report", "runs/0042-mine", "--out", "page"]) == 0
    text = Path("page/report.html").read_text("utf-8")
    assert "<h1>of the plan</h1>" in text
    assert "3 runs (3 complete)" in text
    assert main(["report", "runs/0042-mine", "--out", "page", "--title", "mine"]) == 0
    assert "<h1>mine</h1>" in Path("page/report.html").read_text("utf-8")


def test_runs_of_an_older_study_have_no_plan(study: Path) -> None:
    Path("runs/0042-mine/plan.json").unlink()
    found = find_study(study)
    assert found is not None
    assert found.runs == (Path("runs/0042-mine"),)
    assert found.title == "A title of <its> own"
    assert find_study(Path("runs/0042-mine")) is None
    assert find_study(Path("runs")) is None


def test_a_study_that_was_not_started_says_what_to_do(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study.rename("experiments/0043-new")
    assert main(["report", "experiments/0043-new"]) == 2
    words = capsys.readouterr().err
    assert (
        "no runs in runs/0043-new; run `hybridvit study experiments/0043-new/study.yaml`" in words
    )
    assert words.count("\n") == 1


def test_a_broken_study_file_is_named(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (study / "study.yaml").write_text("title: [1")
    assert main(["report", str(study)]) == 2
    assert "study.yaml is no plain YAML" in capsys.readouterr().err


def test_a_planted_plan_points_nowhere_else(study: Path) -> None:
    cells = [{"name": "../../../etc", "kind": "train"}, {"name": 3, "kind": "train"}, "x", None]
    cells += [{"name": "a", "kind": "train"}, {"kind": "train"}, {"name": "b", "kind": ["x"]}]
    plan = {"schema": 1, "cells": cells, "title": [1], "question": 2}
    Path("runs/0042-mine/plan.json").write_text(json.dumps(plan))
    found = find_study(study)
    assert found is not None
    assert found.runs == (Path("runs/0042-mine/a"),)
    assert read_plan(find_runs([Path("runs/0042-mine")])).cells == ("etc", "a")
    other = find_study(Path("runs/0042-mine"))
    assert other is not None
    assert (other.title, other.question) == (None, None)
