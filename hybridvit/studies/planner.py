"""What a study will cost before it runs, and budgets that make its arms cost the same."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybridvit import build
from hybridvit.analysis import cost
from hybridvit.config import RunConfig, config_hash
from hybridvit.contracts import DataSpec
from hybridvit.data.dataset import AbsentData
from hybridvit.engine.describe import ASSUMED_CLASSES, describe_model
from hybridvit.engine.fit import Diverged, total_steps
from hybridvit.engine.runlog import RunDirectory, environment
from hybridvit.registry import Parts
from hybridvit.studies.executors import Executor, Job
from hybridvit.studies.executors.local import Local
from hybridvit.studies.grid import Cell, Study, check_distinct
from hybridvit.studies.status import PLAN, columns, duration, read_json

SCHEMA = 1
SET_BY_MATCH = ("images", "flops", "seconds")  # what decides how long each arm trains
WITHIN = 0.01  # of the budget: how equal matched arms must come out
WITHIN_PARAMS = 0.05
WARMUP_STEPS, TIMED_STEPS = 5, 20  # to match seconds
PROBE_STEPS = 3  # of --probe; the first is warm-up
MUCH_WARMUP = 0.3  # of an arm's steps
LABEL = 40  # columns
SHOWN = 3  # arms that a warning names
HEADINGS = (
    "arm", "seeds", "tokens", "stride", "params", "GFLOPs", "epochs", "steps", "FLOPs", "time",
    "memory",
)  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What an arm is and costs before it is trained; None where that cannot be known here.

    `flops` are those of one image, forward and backward. `compared` are the parameters of stem
    and encoder: heads, decoders and teachers come and go with the objective.
    """

    data: str
    images: int | None  # to train on
    tokens: int
    patch_px: int
    parameters: int
    compared: int
    flops: int | None
    memory: int | None  # bytes
    seconds_per_step: float | None = None
    hardware: dict[str, Any] | None = None  # that the seconds were measured on


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


def plan(study: Study, out: Path, executor: Executor | None = None) -> Study:
    """The study with matched budgets; what it rests on is measured once and kept in plan.json.

    Args:
        executor: where the cells will run, and so steps are timed; by default on this machine.

    Raises:
        ValueError: the arms cannot be matched.
    """
    check_budgets(study)
    kept = _kept(out)
    arms: list[Arm] = []
    if study.match in (*SET_BY_MATCH, "params"):
        facts = _known(study, kept)
        if study.match == "seconds":
            out.mkdir(parents=True, exist_ok=True)  # which any machine of the executor can read
            executor = executor or Local(study.threads)
            facts = _timed(study, facts, WARMUP_STEPS, TIMED_STEPS, executor, out)
        kept |= {k: f for k, f in zip(_keys(study), facts, strict=True) if f.images is not None}
        arms = match(study, facts)
        _check_known(arms, study.match)
        study = _with_arms(study, arms)
    _write(study, arms, kept, out)
    return study


def dry_run(study: Study, out: Path, *, probe: bool = False) -> str:
    """What `hybridvit study --dry-run` prints: the grid, its costs, and what is not comparable.

    Args:
        probe: time three steps of each arm; otherwise only what plan.json has is known.

    Raises:
        ValueError: the arms cannot be matched.
    """
    check_budgets(study)
    facts = _known(study, _kept(out))
    executor = Local(study.threads)
    if probe:
        facts = _timed(study, facts, 1, PROBE_STEPS - 1, executor)
    arms = match(study, facts)
    lines = [study.title, *_table(arms), "", *_totals(study, arms, executor)]
    return "\n".join([*lines, *(f"Warning: {text}" for text in warnings(study, arms))])


def check_budgets(study: Study) -> None:
    """See that axes set no budget that the match decides.

    Raises:
        ValueError: they do.
    """
    epochs = {cells[0].label: cells[0].config.train.epochs for cells in study.arms()}
    if len(set(epochs.values())) == 1 or study.match in (None, "params"):
        return
    shown = ", ".join(f"{label}: {value:g}" for label, value in epochs.items())
    if study.match == "epochs":
        raise ValueError(f"match: epochs, but the arms train for other epochs ({shown})")
    raise ValueError(
        f"match: {study.match} sets the epochs of every arm but the first; "
        f"take train.epochs out of the axes ({shown})"
    )


def match(study: Study, facts: Sequence[Facts]) -> list[Arm]:
    """Arms with the budgets that make them equal: the first arm trains for its config's epochs,
    each other one for the steps that cost the same. Its schedule ends at its own last step.

    Where a cost is not known, steps are None.

    Raises:
        ValueError: parameters over 5 % apart, or a run too short to come out within 1 %.
    """
    arms = [
        Arm(tuple(cells), known, _own_steps(cells[0].config, known))
        for cells, known in zip(study.arms(), facts, strict=True)
    ]
    if study.match == "params":
        _check_params(arms)
    if study.match not in SET_BY_MATCH:
        return arms
    first, price = arms[0], _step_price(arms[0], study.match)
    if first.steps is None or price is None:
        return [first, *(dataclasses.replace(arm, steps=None) for arm in arms[1:])]
    budget = first.steps * price
    return [first, *(_matched(arm, budget, study.match) for arm in arms[1:])]


def warnings(study: Study, arms: Sequence[Arm]) -> list[str]:
    """Why arms are not comparable, each reason once."""
    found = []
    same = {
        "token counts": [f"{a.facts.tokens}" for a in arms],
        "strides": [f"{a.facts.patch_px} px" for a in arms],
        "data": [
            a.facts.data if a.facts.images is None else f"{a.facts.data}, {a.facts.images:,} images"
            for a in arms
        ],
    }
    for what, values in same.items():
        if len(set(values)) > 1:
            groups: dict[str, list[str]] = {}
            for arm, value in zip(arms, values, strict=True):
                groups.setdefault(value, []).append(arm.label)
            shown = "; ".join(f"{value} in {_some(labels)}" for value, labels in groups.items())
            found.append(f"arms differ in {what}, and so in more than one part: {shown}")
    if uncounted := [a.label for a in arms if a.facts.flops is None]:
        found.append(f"FLOPs cannot be counted, shapes depend on the data: {_some(uncounted)}")
    if absent := sorted({a.facts.data for a in arms if a.facts.images is None}):
        found.append(f"{', '.join(absent)} is not here, so steps are not known")
    total = [a.flops for a in arms if a.flops]
    if study.match != "flops" and total and max(total) > 1.1 * min(total):
        found.append(
            f"training FLOPs differ by a factor of {max(total) / min(total):.2f} between arms"
        )
    for arm in arms:
        warmup = arm.config.optim.warmup_epochs / arm.config.train.epochs
        if warmup > MUCH_WARMUP:
            found.append(f"{arm.label} spends {warmup:.0%} of its steps in warm-up")
    return found


def _own_steps(config: RunConfig, facts: Facts) -> int | None:
    return None if facts.images is None else total_steps(config, facts.images)


def _step_price(arm: Arm, what: str) -> float | None:
    """What one step costs of the matched quantity."""
    if what == "seconds":
        return arm.facts.seconds_per_step
    if what == "images":
        return arm.config.train.batch_size
    return arm.facts.flops and arm.facts.flops * arm.config.train.batch_size


def _matched(arm: Arm, budget: float, what: str) -> Arm:
    price, images = _step_price(arm, what), arm.facts.images
    if price is None or images is None:
        return dataclasses.replace(arm, steps=None)
    steps = max(1, round(budget / price))
    if abs(steps * price / budget - 1) > WITHIN:
        raise ValueError(
            f"match: {what}: {arm.label} would take {budget / price:.3g} steps, too few to come "
            f"out within {WITHIN:.0%}; train longer, or with smaller batches"
        )
    cells = tuple(c.with_config(with_steps(c.config, steps, images)) for c in arm.cells)
    return dataclasses.replace(arm, cells=cells, steps=steps)


def with_steps(config: RunConfig, steps: int, images: int) -> RunConfig:
    """A config whose epochs, with as few digits as do, are `steps` steps on `images` images."""
    exact = steps * config.train.batch_size / images
    for digits in range(17):
        train = dataclasses.replace(config.train, epochs=round(exact, digits) or exact)
        found = dataclasses.replace(config, train=train)
        if total_steps(found, images) == steps:
            return found
    return dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=exact))


def _check_params(arms: Sequence[Arm]) -> None:
    counts = {arm.label: arm.facts.compared for arm in arms}
    if max(counts.values()) > (1 + WITHIN_PARAMS) * min(counts.values()):
        shown = ", ".join(f"{label}: {count:,}" for label, count in counts.items())
        raise ValueError(
            f"match: params: stem and encoder are more than {WITHIN_PARAMS:.0%} apart ({shown}); "
            "change a width or a depth, or exclude arms"
        )


def _check_known(arms: Sequence[Arm], what: str) -> None:
    for arm in arms:
        if arm.facts.images is None:
            raise ValueError(f"match: {what}: {arm.label}: {arm.facts.data} is not here")
        if arm.steps is None:
            raise ValueError(
                f"match: {what}: the FLOPs of {arm.label} cannot be counted, its shapes depend on "
                "its data; exclude it or match images or seconds"
            )


def _with_arms(study: Study, arms: Sequence[Arm]) -> Study:
    planned = iter([cell for arm in arms for cell in arm.cells])
    by_order = {id(c): next(planned) for cells in study.arms() for c in cells}
    cells = [by_order.get(id(c), c) for c in study.cells]
    check_distinct(cells)
    return dataclasses.replace(study, cells=cells)


def _keys(study: Study) -> list[str]:
    """Names of what was measured of each arm, which neither seed nor length changes."""
    return [_key(cells[0].config) for cells in study.arms()]


def _key(config: RunConfig) -> str:
    train = dataclasses.replace(config.train, epochs=1.0)
    return config_hash(dataclasses.replace(config, seed=0, init=None, train=train))


def _known(study: Study, kept: dict[str, Facts]) -> list[Facts]:
    """What was kept of each arm, or is counted now."""
    data: dict[str, tuple[DataSpec, int | None]] = {}
    found = []
    for cells in study.arms():
        key = _key(cells[0].config)
        found.append(kept[key] if key in kept else _count(cells[0].config, data))
    return found


def _count(config: RunConfig, data: dict[str, tuple[DataSpec, int | None]]) -> Facts:
    parts, _ = build.make_parts(config.plugins)
    key = json.dumps(dataclasses.asdict(config.data), sort_keys=True)
    if key not in data:
        data[key] = _data(config, parts)
    spec, images = data[key]
    model = describe_model(build.make_objective(config, parts, spec), spec, config)
    parameters, flops = model["parameters"], model["flops"]
    is_counted = flops["forward"] is not None
    memory = None
    if is_counted:
        micro_batch = config.train.batch_size // config.train.accumulate
        activations = model["activation_bytes"] * micro_batch
        memory = cost.memory_bytes(
            parameters["total"], activations, ema=config.train.ema is not None
        )
    return Facts(
        data=f"{config.data.name} at {spec.image_size[0]} x {spec.image_size[1]} px",
        images=images,
        tokens=model["tokens"],
        patch_px=model["patch_px"],
        parameters=parameters["total"],
        compared=parameters["stem"] + parameters["encoder"],
        flops=flops["forward"] + flops["backward"] if is_counted else None,
        memory=memory,
    )


def _data(config: RunConfig, parts: Parts) -> tuple[DataSpec, int | None]:
    """What the model must fit, and how many images train; a set that is not here may still be
    planned for, if the config says its image size."""
    try:
        dataset = build.make_dataset(config, parts)
    except AbsentData:
        size = config.data.args.get("image_size")
        if not size:
            raise
        return DataSpec(ASSUMED_CLASSES, (size, size), 3, (0.5,) * 3, (0.5,) * 3), None
    return dataset.spec(), len(build.make_splits(config, dataset)[0])


def _timed(
    study: Study,
    facts: Sequence[Facts],
    warmup: int,
    steps: int,
    executor: Executor,
    folder: Path | None = None,
) -> list[Facts]:
    """The facts with the seconds of a step, measured one arm after the other where not known.

    Args:
        folder: for files while it lasts; by default the system's.
    """
    arms = study.arms()
    found = list(facts)
    with tempfile.TemporaryDirectory(prefix=".timing-", dir=folder) as scratch:
        places = {cells[0].name: Path(scratch) / cells[0].name for cells in arms}
        jobs: list[Job] = []
        for cells, known in zip(arms, facts, strict=True):
            if known.seconds_per_step is None:
                name, config = cells[0].name, cells[0].config
                after = jobs[-1].name if jobs else None  # none beside another
                jobs.append(Job(name, time_steps, (config, warmup, steps, places[name]), after))
        executor.run(jobs, watch=lambda running: None, ended=lambda name, code: None)
        for i, cells in enumerate(arms):
            if facts[i].seconds_per_step is not None:
                continue
            result = read_json(places[cells[0].name] / "result.json") or {}
            if "seconds_per_step" not in result:
                why = result.get("error", "its process died; memory, perhaps")
                raise ValueError(f"{cells[0].label} cannot be timed: {why}")
            found[i] = dataclasses.replace(facts[i], **result)
    return found


def time_steps(config: RunConfig, warmup: int, steps: int, out: Path) -> None:
    """Train a few steps in this process; write the seconds of one and the memory to `out`.

    Args:
        warmup: steps before those that count; `steps` is a multiple of it.
    """
    from hybridvit.engine.run import Session

    assert steps % warmup == 0
    (out / "run").mkdir(parents=True)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    train = dataclasses.replace(config.train, log_every=warmup, tensorboard=False)
    # Without validation images, nothing is evaluated behind the last step.
    data = dataclasses.replace(config.data, val_fraction=0.0)
    config = dataclasses.replace(config, train=train, data=data, init=None)
    try:
        parts, _ = build.make_parts(config.plugins)
        session = Session(config, parts, RunDirectory(out / "run"), show=False)
        session.config = with_steps(config, warmup + steps, session.length)
        rates = session.fit().rates[1:]
    except (ValueError, Diverged) as error:
        (out / "result.json").write_text(json.dumps({"error": str(error)}))
        return
    result = {
        "seconds_per_step": statistics.fmean(config.train.batch_size / rate for rate in rates),
        "memory": _peak_memory(),
        "hardware": environment()["hardware"],
    }
    (out / "result.json").write_text(json.dumps(result))


def _peak_memory() -> int:
    """Bytes that the process has taken at most, on the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _kept(out: Path) -> dict[str, Facts]:
    """What plan.json has of arms, by their key.

    Raises:
        ValueError: it is broken, and with it the budget of runs that may be half done.
    """
    path = out / PLAN
    if not path.exists():
        return {}
    content = read_json(path)
    try:
        assert content is not None
        return {key: Facts(**facts) for key, facts in content["measured"].items()}
    except (AssertionError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is broken; restore it, or remove it to measure anew") from None


def _write(study: Study, arms: Sequence[Arm], kept: dict[str, Facts], out: Path) -> None:
    budgets = [
        {
            "label": arm.label,
            "arm": arm.cells[0].arm,
            "measured": _key(arm.config),
            "epochs": arm.config.train.epochs,
            "steps": arm.steps,
            "images": None if arm.steps is None else arm.steps * arm.config.train.batch_size,
            "flops": arm.flops,
            "seconds": arm.seconds,
        }
        for arm in arms
    ]
    content = {
        "schema": SCHEMA,
        "study": study.name,
        "title": study.title,
        "question": study.question,
        "match": study.match,
        "smallest_difference": study.smallest_difference,
        "arms": budgets,
        "cells": [
            {"name": c.name, "label": c.label, "epochs": c.config.train.epochs, "kind": c.kind}
            for c in study.cells
        ],
        "measured": {key: dataclasses.asdict(facts) for key, facts in kept.items()},
    }
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f".{PLAN}.tmp"
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, out / PLAN)


def _table(arms: Sequence[Arm]) -> list[str]:
    rows: list[Sequence[str]] = [HEADINGS]
    for arm in arms:
        facts = arm.facts
        rows.append(
            (
                _shorten(arm.label),
                str(len(arm.cells)),
                str(facts.tokens),
                f"{facts.patch_px} px",
                f"{facts.parameters / 1e6:.3g} M",
                _or_unknown(facts.flops, lambda x: f"{x / 1e9:.3g}"),
                "?" if arm.steps is None else f"{arm.config.train.epochs:g}",
                _or_unknown(arm.steps, lambda x: f"{x:,}"),
                _or_unknown(arm.flops, _scientific),
                _or_unknown(arm.seconds, duration),
                _or_unknown(facts.memory, lambda x: f"{x / 2**30:.2f} GiB"),
            )
        )
    return columns(rows, right=range(1, len(HEADINGS)))


def _totals(study: Study, arms: Sequence[Arm], executor: Executor) -> list[str]:
    """What the table's columns are, how equal the arms are, and what the whole study takes."""
    pixels = any(c.kind == "pixels" for c in study.cells)
    runs = sum(len(arm.cells) for arm in arms)
    lines = [
        f"{runs} runs{' and the pixel baselines' if pixels else ''}, {executor.slots} at once here",
        "GFLOPs: forward and backward of one image; FLOPs and time: one whole run",
    ]
    if study.match is not None:
        lines.append(f"match: {study.match}, {_equality(study.match, arms)}")
    flops = [arm.flops * len(arm.cells) for arm in arms if arm.flops is not None]
    seconds = [arm.seconds * len(arm.cells) for arm in arms if arm.seconds is not None]
    total = [f"{_scientific(sum(flops))} FLOPs"] if len(flops) == len(arms) else []
    if len(seconds) == len(arms):
        total.append(
            f"{duration(sum(seconds))} of training, {duration(sum(seconds) / executor.slots)} with "
            f"{executor.slots} at once"
        )
    else:
        total.append("time not known; --probe times three steps of each arm")
    return [*lines, f"in total {', '.join(total)}"]


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


def _or_unknown(value: float | None, text: Callable[[float], str]) -> str:
    return "?" if value is None else text(value)


def _scientific(value: float) -> str:
    return f"{value:.2e}".replace("e+", "e")


def _some(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else ""
    return ", ".join(labels[:SHOWN]) + more


def _shorten(text: str) -> str:
    """Within the column, its middle left out: ends tell arms apart."""
    half = LABEL // 2
    return text if len(text) <= LABEL else f"{text[: half - 1]}…{text[-half:]}"
