"""Budgets under which the arms of a study cost the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from hybridvit.analysis.cost import UNCOUNTED
from hybridvit.config import RunConfig
from hybridvit.engine.fit import total_steps
from hybridvit.studies.facts import Facts
from hybridvit.studies.grid import Cell, Study, check_distinct, with_configs

SET_BY_MATCH = ("images", "flops", "seconds")  # what decides how long each arm trains
WITHIN = 0.01  # of the budget: how equal matched arms must come out
WITHIN_PARAMS = 0.05


@dataclass(frozen=True)
class Arm:
    """An arm of a planned study: its cells under the budget that they will train for."""

    cells: tuple[Cell, ...]
    facts: Facts
    steps: int | None

    @property
    def label(self) -> str:
        return self.cells[0].label

    @property
    def stage(self) -> str | None:
        return self.cells[0].stage

    @property
    def config(self) -> RunConfig:
        return self.cells[0].config

    @property
    def flops(self) -> int | None:
        """Of one whole training."""
        if self.steps is None or self.facts.flops is None:
            return None
        return self.steps * self.config.train.batch_size * self.facts.flops

    @property
    def seconds(self) -> float | None:
        """Of one whole training."""
        speed = self.facts.seconds_per_step
        return None if self.steps is None or speed is None else self.steps * speed


def check_budgets(study: Study) -> None:
    """See that axes set no budget that the match decides. Stages have budgets of their own.

    Raises:
        ValueError: they do.
    """
    if study.match in (None, "params"):
        return
    for stage in {cells[0].stage: None for cells in study.arms()}:
        first = [cells[0] for cells in study.arms() if cells[0].stage == stage]
        epochs = {cell.label: cell.config.train.epochs for cell in first}
        if len(set(epochs.values())) == 1:
            continue
        shown = ", ".join(f"{label}: {value:g}" for label, value in epochs.items())
        if study.match == "epochs":
            raise ValueError(f"match: epochs, but the arms train for other epochs ({shown})")
        raise ValueError(
            f"match: {study.match} sets the epochs of every arm but the first; "
            f"take train.epochs out of the axes ({shown})"
        )


def match(study: Study, facts: Sequence[Facts]) -> list[Arm]:
    """Arms with the budgets that make them equal: the first arm trains for its config's epochs,
    each other one for the steps that cost the same. Its schedule ends at its own last step. With
    stages, arms are matched stage by stage.

    Where a cost is not known, steps are None.

    Raises:
        ValueError: parameters over 5 % apart, or a run too short to come out within 1 %.
    """
    arms = [
        Arm(tuple(cells), known, _own_steps(cells[0].config, known))
        for cells, known in zip(study.arms(), facts, strict=True)
    ]
    if study.match == "params":
        for stage in by_stage(arms):
            _check_params(stage)
    if study.match not in SET_BY_MATCH:
        return arms
    firsts = {stage[0].stage: stage[0] for stage in by_stage(arms)}
    return [_matched(arm, firsts[arm.stage], study.match) for arm in arms]


def by_stage(arms: Sequence[Arm]) -> list[list[Arm]]:
    """The arms that are compared with each other: all, or with stages those of each."""
    found: dict[str | None, list[Arm]] = {}
    for arm in arms:
        found.setdefault(arm.stage, []).append(arm)
    return list(found.values())


def check_known(arms: Sequence[Arm], what: str) -> None:
    """See that the cost of every arm is known.

    Raises:
        ValueError: data that are not here, or FLOPs that cannot be counted.
    """
    for arm in arms:
        if arm.facts.images is None:
            raise ValueError(f"match: {what}: {arm.label}: {arm.facts.data} is not here")
        # The first arm, which sets the others' budgets, has steps all the same.
        if arm.steps is None or (what == "flops" and arm.facts.flops is None):
            raise ValueError(
                f"match: {what}: the FLOPs of {arm.label} cannot be counted, {UNCOUNTED}; "
                "exclude it or match images or seconds"
            )


def with_arms(study: Study, arms: Sequence[Arm]) -> Study:
    """The study whose cells train for the arms' budgets.

    Raises:
        ValueError: two cells have become the same run.
    """
    changed = {
        old.name: new.config
        for cells, arm in zip(study.arms(), arms, strict=True)
        for old, new in zip(cells, arm.cells, strict=True)
    }
    cells = with_configs(study.cells, changed)
    check_distinct(cells)
    return dataclasses.replace(study, cells=cells)


def with_steps(config: RunConfig, steps: int, images: int) -> RunConfig:
    """A config whose epochs, with as few digits as do, are `steps` steps on `images` images; the
    same one where its own are, so that a run of another study serves."""
    if total_steps(config, images) == steps:
        return config
    exact = steps * config.train.batch_size / images
    for digits in range(17):
        train = dataclasses.replace(config.train, epochs=round(exact, digits) or exact)
        found = dataclasses.replace(config, train=train)
        if total_steps(found, images) == steps:
            return found
    return dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=exact))


def equality(what: str, arms: Sequence[Arm]) -> str:
    """How equal the arms are planned to be, in words."""
    stages = [(stage[0].stage, _equality(what, stage)) for stage in by_stage(arms)]
    return "; ".join(words if name is None else f"{name}: {words}" for name, words in stages)


def _equality(what: str, arms: Sequence[Arm]) -> str:
    if what == "epochs":
        return f"{arms[0].config.train.epochs:g} each"
    if what == "params":
        counts = [arm.facts.compared for arm in arms]
        return f"stem and encoder at most {max(counts) / min(counts) - 1:.2%} apart"
    spent = [
        arm.steps * price
        for arm in arms
        if arm.steps is not None and (price := _step_price(arm, what)) is not None
    ]
    if len(spent) < len(arms):
        return "measured when the study starts" if what == "seconds" else "not known for all arms"
    off = max(abs(value / spent[0] - 1) for value in spent)
    return f"all arms within {off:.2%} of the first, which trains as configured"


def _own_steps(config: RunConfig, facts: Facts) -> int | None:
    return None if facts.images is None else total_steps(config, facts.images)


def _step_price(arm: Arm, what: str) -> float | None:
    """What one step costs of the matched quantity."""
    if what == "seconds":
        return arm.facts.seconds_per_step
    if what == "images":
        return arm.config.train.batch_size
    return arm.facts.flops and arm.facts.flops * arm.config.train.batch_size


def _matched(arm: Arm, first: Arm, what: str) -> Arm:
    if arm is first:
        return arm
    price, images, whole = _step_price(arm, what), arm.facts.images, _step_price(first, what)
    if price is None or images is None or whole is None or first.steps is None:
        return dataclasses.replace(arm, steps=None)
    budget = first.steps * whole
    steps = max(1, round(budget / price))
    if abs(steps * price / budget - 1) > WITHIN:
        raise ValueError(
            f"match: {what}: {arm.label} would take {budget / price:.3g} steps, too few to come "
            f"out within {WITHIN:.0%}; train longer, or with smaller batches"
        )
    cells = tuple(c.with_config(with_steps(c.config, steps, images)) for c in arm.cells)
    return dataclasses.replace(arm, cells=cells, steps=steps)


def _check_params(arms: Sequence[Arm]) -> None:
    counts = {arm.label: arm.facts.compared for arm in arms}
    if max(counts.values()) > (1 + WITHIN_PARAMS) * min(counts.values()):
        shown = ", ".join(f"{label}: {count:,}" for label, count in counts.items())
        raise ValueError(
            f"match: params: stem and encoder are more than {WITHIN_PARAMS:.0%} apart ({shown}); "
            "change a width or a depth, or exclude arms"
        )
