from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from hybridvit import build
from hybridvit.analysis import cost
from hybridvit.config import RunConfig
from hybridvit.engine.fit import total_steps
from hybridvit.studies import planner
from hybridvit.studies.cells import run_study
from hybridvit.studies.grid import Study, read_study
from hybridvit.studies.planner import Facts
from hybridvit.studies.status import study_status

STUDY = """
title: T
question: Q
config: digits.yaml
axes:
  stem:
    linear: {}
    resnet:
      stem:
        name: resnet
        args:
          {width: 0.25, blocks: [1], strides: [2], root_kernel: 3, root_stride: 1, root_pool: false}
seeds: [0]
"""
TINY = [
    "encoder.args.dim=16",
    "encoder.args.depth=1",
    "encoder.args.heads=1",
    "train.epochs=8",
    "eval.epochs=100",
    "optim.warmup_epochs=0.5",
]
FACTS = Facts(
    data="digits",
    images=1000,
    tokens=16,
    patch_px=2,
    parameters=1000,
    compared=1000,
    flops=10**6,
    memory=10**6,
    seconds_per_step=0.1,
)


def read(folder: Path, match: str, text: str = STUDY, seeds: int | None = None) -> Study:
    folder.mkdir(exist_ok=True)
    path = folder / "study.yaml"
    path.write_text(f"{text}match: {match}\n")
    return read_study(path, TINY, seeds)


def counted_flops(config: RunConfig) -> int:
    """Of one training image, without the planner."""
    parts, _ = build.make_parts([])
    spec = build.make_dataset(config, parts).spec()
    spent = cost.measure(build.make_objective(config, parts, spec), spec.image_size)
    assert spent.forward_flops
    assert spent.backward_flops
    return spent.forward_flops + spent.backward_flops


def test_arms_matched_in_flops_cost_the_same_and_end_their_own_schedules(tmp_path: Path) -> None:
    out = tmp_path / "out"
    study = planner.plan(read(tmp_path / "s", "flops"), out)
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
    first, second = (planner._key(cells[0].config) for cells in study.arms())
    speeds = {first: 0.01, second: 0.03}
    measured = {k: vars(dataclasses.replace(FACTS, seconds_per_step=s)) for k, s in speeds.items()}
    out.mkdir()
    (out / "plan.json").write_text(json.dumps({"measured": measured}))
    planned = planner.plan(study, out)  # measuring would not find 0.03
    linear, resnet = planned.cells
    assert total_steps(linear.config, 1000) == round(8 * 1000 / 64) == 125
    assert total_steps(resnet.config, 1000) == 42  # a third
    # More seeds of the same arms need no other plan.
    more = planner.plan(read(tmp_path / "s", "seconds", seeds=3), out)
    assert {c.name for c in planned.cells} < {c.name for c in more.cells}
    assert {c.config.train.epochs for c in more.arms()[1]} == {resnet.config.train.epochs}
    (out / "plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"plan\.json is broken"):
        planner.plan(study, out)


def test_seconds_are_those_of_a_step(tmp_path: Path) -> None:
    (cells, _) = read(tmp_path / "s", "seconds").arms()
    config = dataclasses.replace(
        cells[0].config, train=dataclasses.replace(cells[0].config.train, threads=None)
    )
    planner.time_steps(config, 5, 20, tmp_path / "timed")
    result = json.loads((tmp_path / "timed" / "result.json").read_text())
    assert 1e-5 < result["seconds_per_step"] < 1
    assert result["memory"] > 1 << 20
    lines = (tmp_path / "timed" / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 25
    # Behind the first lap, images/s and seconds a step are one thing.
    rates = [json.loads(line)["images_per_second"] for line in lines[1:]]
    assert result["seconds_per_step"] == pytest.approx(sum(64 / r for r in rates) / 4)


def test_equal_images_are_other_epochs_of_a_smaller_set(tmp_path: Path) -> None:
    axes = "axes: {size: {all: {}, half: {data: {train_images: 647}}}}"
    text = f"title: T\nquestion: Q\nconfig: digits.yaml\n{axes}\nseeds: [0]\n"
    study = planner.plan(read(tmp_path / "s", "images", text), tmp_path / "out")
    assert [c.config.train.epochs for c in study.cells] == [8, 16]  # of 1,294 and 647 images
    same = read(tmp_path / "s", "epochs", text)
    assert planner.plan(same, tmp_path / "other").cells == same.cells


def match(tmp_path: Path, what: str, *changes: dict[str, object]) -> list[planner.Arm]:
    facts = [dataclasses.replace(FACTS, **change) for change in changes]  # type: ignore[arg-type]
    return planner.match(read(tmp_path / "s", what), facts)


def test_a_step_costs_what_its_batch_costs(tmp_path: Path) -> None:
    arms = match(tmp_path, "flops", {"flops": 10**6}, {"flops": 4 * 10**6})
    assert [a.steps for a in arms] == [125, 31]
    assert [a.flops for a in arms] == [125 * 64 * 10**6, 31 * 64 * 4 * 10**6]
    batch = read(tmp_path / "s", "flops").cells[1]
    study = read(tmp_path / "s", "flops")
    halved = dataclasses.replace(
        batch.config, train=dataclasses.replace(batch.config.train, batch_size=32)
    )
    study = dataclasses.replace(study, cells=[study.cells[0], batch.with_config(halved)])
    assert [a.steps for a in planner.match(study, [FACTS, FACTS])] == [125, 250]


def test_what_cannot_be_matched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"resnet would take 4\.17 steps, too few"):
        match(tmp_path, "flops", {}, {"flops": 30 * 10**6})
    with pytest.raises(ValueError, match=r"linear: 1,000, resnet: 1,051"):
        match(tmp_path, "params", {}, {"compared": 1051})
    arms = match(tmp_path, "params", {}, {"compared": 1049})
    assert [a.config.train.epochs for a in arms] == [8, 8]
    text = STUDY.replace("linear: {}", "linear: {train: {epochs: 3}}")
    path = tmp_path / "s" / "study.yaml"
    for what, words in (
        ("flops", "sets the epochs of every arm but"),
        ("epochs", "linear: 3, res"),
    ):
        path.write_text(f"{text}match: {what}\n")
        with pytest.raises(ValueError, match=words):
            planner.plan(read_study(path, []), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("steps", [1, 7, 605, 123_457, 10**7 + 1])
def test_epochs_with_few_digits_are_the_steps_asked_for(steps: int) -> None:
    for images in (1, 647, 1294, 50_000, 1_281_167):
        config = planner.with_steps(RunConfig(), steps, images)
        assert total_steps(config, images) == steps
        assert config.train.epochs == pytest.approx(steps * 128 / images, rel=0.5)


def test_a_dry_run_shows_each_arm_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = STUDY.replace("linear: {}", "linear: {stem: {args: {patch: 4}}}")
    text = text.replace("digits.yaml", "long.yaml")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "long.yaml").write_text("extends: [digits.yaml]\ntrain: {epochs: 80}\n")
    (tmp_path / "s" / "study.yaml").write_text(f"{text}match: flops\n")
    study = read_study(tmp_path / "s", [t for t in TINY if "train.epochs" not in t])
    lines = planner.dry_run(study, out).splitlines()
    assert not out.exists()
    table = {line.split()[0]: line.split() for line in lines[1:] if line}
    assert table["linear"][:5] == ["linear", "1", "4", "4", "px"]
    assert table["resnet"][:5] == ["resnet", "1", "16", "2", "px"]
    planned = planner.plan(study, out)
    assert f"{planned.cells[1].config.train.epochs:g}" in table["resnet"]
    printed = "\n".join(lines)
    for words in ("differ in token counts", "4 in linear; 16 in resnet", "differ in strides"):
        assert words in printed
    assert "differ in data" not in printed
    assert max(map(len, lines[:5])) <= 120


def test_data_that_are_not_here_are_planned_for_but_not_matched(tmp_path: Path) -> None:
    data = [f"data={{name: cifar10, args: {{root: {tmp_path}, image_size: 32}}}}"]
    (tmp_path / "s").mkdir()
    path = tmp_path / "s" / "study.yaml"
    path.write_text(f"{STUDY}match: flops\n")
    study = read_study(path, [*TINY, *data])
    printed = planner.dry_run(study, tmp_path / "out")
    assert "cifar10 at 32 x 32 px is not here" in printed
    with pytest.raises(ValueError, match="cifar10 at 32 x 32 px is not here"):
        planner.plan(study, tmp_path / "out")
