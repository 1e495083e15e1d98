from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from two_stems import FACTS, STUDY, read

from hybridvit.config import RunConfig, TrainConfig, config_hash
from hybridvit.engine.fit import total_steps
from hybridvit.studies import matching
from hybridvit.studies.grid import read_study
from hybridvit.studies.planner import plan


def match(tmp_path: Path, what: str, *changes: dict[str, object]) -> list[matching.Arm]:
    facts = [dataclasses.replace(FACTS, **change) for change in changes]  # type: ignore[arg-type]
    return matching.match(read(tmp_path / "s", what), facts)


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
    assert [a.steps for a in matching.match(study, [FACTS, FACTS])] == [125, 250]


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
            plan(read_study(path, []), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("flops", "label"), [((None, 10**6), "linear"), ((10**6, None), "resnet")])
def test_the_arm_whose_flops_cannot_be_counted_is_named(
    tmp_path: Path, flops: tuple[int | None, int | None], label: str
) -> None:
    arms = match(tmp_path, "flops", *({"flops": count} for count in flops))
    with pytest.raises(ValueError, match=f"the FLOPs of {label} cannot be counted"):
        matching.check_known(arms, "flops")


def test_a_config_of_as_many_steps_stays_the_run_that_it_was() -> None:
    config = RunConfig(train=TrainConfig(epochs=3))  # as a file has it: an integer
    steps = total_steps(config, 1000)
    assert config_hash(matching.with_steps(config, steps, 1000)) == config_hash(config)
    assert config_hash(matching.with_steps(config, steps + 8, 1000)) != config_hash(config)


@pytest.mark.parametrize("steps", [1, 7, 605, 123_457, 10**7 + 1])
def test_epochs_with_few_digits_are_the_steps_asked_for(steps: int) -> None:
    never = RunConfig(train=TrainConfig(epochs=1e12))  # has other steps
    for images in (1, 647, 1294, 50_000, 1_281_167):
        config = matching.with_steps(never, steps, images)
        assert total_steps(config, images) == steps
        assert config.train.epochs == pytest.approx(steps * 128 / images, rel=0.5)
