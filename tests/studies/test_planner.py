from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
from run_directories import write_run
from two_stems import FACTS, STUDY, TINY, read

from hybridvit import build
from hybridvit.analysis import cost
from hybridvit.config import RunConfig, config_hash
from hybridvit.engine.fit import total_steps
from hybridvit.report import find_runs
from hybridvit.report.page import Report
from hybridvit.studies.cells import run_study
from hybridvit.studies.facts import key_of
from hybridvit.studies.planner import plan
from hybridvit.studies.status import study_status


def counted_flops(config: RunConfig) -> int:
    """Of one training image, without the matching."""
    parts, _ = build.make_parts([])
    spec = build.make_dataset(config, parts).spec()
    spent = cost.measure(build.make_objective(config, parts, spec), spec.image_size)
    assert spent.forward_flops
    assert spent.backward_flops
    return spent.forward_flops + spent.backward_flops


def test_arms_matched_in_flops_cost_the_same_and_end_their_own_schedules(tmp_path: Path) -> None:
    out = tmp_path / "out"
    study = plan(read(tmp_path / "s", "flops"), out)
    assert run_study(study, out) == []
    spent, steps = [], []
    for cell in study.cells:
        folder = out / cell.name
        summary = json.loads((folder / "summary.json").read_text())
        spent.append(summary["images"] * counted_flops(cell.config))
        steps.append(summary["steps"])
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rates = [line["lr"] for line in lines if "lr" in line]
        peak = cell.config.optim.lr * 64 / 256
        assert rates[-1] < 5e-3 * peak  # a cosine's last step is all but at zero
        assert cell.name.endswith(json.loads((folder / "run.json").read_text())["hash"])
    assert study.cells[0].config.train.epochs == 8  # the first arm as configured
    assert steps[1] < 0.95 * steps[0]
    assert max(spent) <= 1.01 * min(spent)

    kept = json.loads((out / "plan.json").read_text())
    assert [arm["steps"] for arm in kept["arms"]] == steps
    assert [arm["flops"] for arm in kept["arms"]] == spent
    assert "2 of 2 cells complete" in study_status(out)


def test_a_plan_is_measured_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    study = read(tmp_path / "s", "seconds")
    first, second = (key_of(cells[0].config) for cells in study.arms())
    speeds = {first: 0.01, second: 0.03}
    measured = {k: vars(dataclasses.replace(FACTS, seconds_per_step=s)) for k, s in speeds.items()}
    out.mkdir()
    (out / "plan.json").write_text(json.dumps({"measured": measured}))
    planned = plan(study, out)  # measuring would not find 0.03
    linear, resnet = planned.cells
    assert total_steps(linear.config, 1000) == round(8 * 1000 / 64) == 125
    assert total_steps(resnet.config, 1000) == 42  # a third
    # More seeds of the same arms need no other plan.
    more = plan(read(tmp_path / "s", "seconds", seeds=3), out)
    assert {c.name for c in planned.cells} < {c.name for c in more.cells}
    assert {c.config.train.epochs for c in more.arms()[1]} == {resnet.config.train.epochs}
    (out / "plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"plan\.json is broken"):
        plan(study, out)


def test_equal_images_are_other_epochs_of_a_smaller_set(tmp_path: Path) -> None:
    axes = "axes: {size: {all: {}, half: {data: {train_images: 647}}}}"
    text = f"title: T\nquestion: Q\nconfig: digits.yaml\n{axes}\nseeds: [0]\n"
    study = plan(read(tmp_path / "s", "images", text), tmp_path / "out")
    assert [c.config.train.epochs for c in study.cells] == [8, 16]  # of 1,294 and 647 images
    same = read(tmp_path / "s", "epochs", text)
    assert plan(same, tmp_path / "other").cells == same.cells


STAGES = """
title: T
question: Q
config: digits.yaml
stages:
  pretrain: {objective: {name: simmim, args: {unit: 1}}, train: {epochs: 8}}
  probe: {optim: {freeze: [model.stem, model.encoder]}, train: {epochs: 12}}
axes:
  stem:
    linear: {}
    conv: {stem: {name: conv, args: {channels: [16], strides: [2]}}}
  lr:
    low: {probe: {optim: {lr: 1e-3}}}
    high: {probe: {optim: {lr: 1e-2}}}
seeds: [0, 1]
"""
SMALL = [text for text in TINY if "epochs" not in text or "warmup" in text]


def test_stages_are_matched_one_by_one_and_start_from_each_other(tmp_path: Path) -> None:
    out = tmp_path / "out"
    study = plan(read(tmp_path / "s", "flops", STAGES, over=SMALL), out)
    known = {c.name: c for c in study.cells}
    assert len(known) == 2 * (2 + 4)
    for cell in study.cells:
        assert cell.name.endswith(config_hash(cell.config))
        assert cell.after == cell.config.init
        if cell.after is not None:
            first = known[cell.after]
            assert first.stage == "pretrain"
            assert (first.arm["stem"], first.config.seed) == (cell.arm["stem"], cell.config.seed)
    epochs: dict[str | None, set[float]] = {}
    spent: dict[str | None, list[int]] = {}
    chosen = [c for c in study.cells if c.config.seed == 0 and c.arm.get("lr") != "high"]
    assert run_study(dataclasses.replace(study, cells=chosen), out) == []
    for cell in chosen:
        summary = json.loads((out / cell.name / "summary.json").read_text())
        flops = json.loads((out / cell.name / "run.json").read_text())["model"]["flops"]
        epochs.setdefault(cell.stage, set()).add(cell.config.train.epochs)
        image = flops["forward"] + flops["backward"]
        spent.setdefault(cell.stage, []).append(image * summary["images"])
        if cell.stage == "probe":  # nothing but the head has a gradient
            assert flops["backward"] == 2 * 10 * 16
    assert {stage: len(found) for stage, found in epochs.items()} == {"pretrain": 2, "probe": 2}
    assert 8 in epochs["pretrain"]
    assert 12 in epochs["probe"]
    for found in spent.values():
        assert max(found) <= 1.01 * min(found)
    kept = json.loads((out / "plan.json").read_text())
    planned = [arm["flops"] for arm in kept["arms"] if arm["arm"].get("lr") != "high"]
    assert sorted(planned) == sorted(itertools.chain(*spent.values()))


def test_stages_have_budgets_of_their_own(tmp_path: Path) -> None:
    study = read(tmp_path / "s", "epochs", STAGES, over=SMALL)
    assert plan(study, tmp_path / "out").cells == study.cells
    other = STAGES.replace("{lr: 1e-3}", "{lr: 1e-3}, train: {epochs: 3}")
    with pytest.raises(ValueError, match="linear / low / probe: 3, linear / high / probe: 12"):
        plan(read(tmp_path / "t", "epochs", other, over=SMALL), tmp_path / "out2")


def test_the_baseline_goes_from_the_study_to_the_report(tmp_path: Path) -> None:
    out = tmp_path / "out"
    study = plan(read(tmp_path / "s", "epochs", f"{STUDY}baseline: {{stem: linear}}\n"), out)
    for cell in study.cells:
        write_run(
            out, cell.arm["stem"], results={"test/accuracy": 0.5}, folder=cell.name,
            record={"arm": cell.arm},
        )  # fmt: skip
    report = Report(find_runs([out]), out)
    assert report.plan.baseline == {"stem": "linear"}
    assert all(subject.split(", ")[0].endswith("against linear") for subject, _ in report.verdicts)
    assert len(report.verdicts) == len(study.arms()) - 1


def test_the_difference_of_interest_goes_from_the_study_to_the_report(tmp_path: Path) -> None:
    out = tmp_path / "out"
    study = plan(read(tmp_path / "s", "epochs", f"{STUDY}smallest_difference: 0.5\n"), out)
    for cell in study.cells:
        write_run(out, cell.arm["stem"], results={"test/accuracy": 0.5}, folder=cell.name)
    report = Report(find_runs([out]), out)
    assert report.plan.smallest_difference == 0.5
    assert "seeds for 0.5 points" in report.comparisons[0]
