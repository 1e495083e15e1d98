"""What an arm of a study is and costs before it is trained, counted without training it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridvit import build
from hybridvit.config import RunConfig, config_hash
from hybridvit.contracts import DataSpec
from hybridvit.engine.describe import describe_model, planned_data, training_memory
from hybridvit.engine.optim import freeze
from hybridvit.studies.grid import Cell
from hybridvit.studies.status import PLAN, read_json


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


def known(arms: Iterable[Sequence[Cell]], kept: dict[str, Facts]) -> list[Facts]:
    """What was kept of each arm, or is counted now."""
    data: dict[str, tuple[DataSpec, int | None]] = {}
    found = []
    for cells in arms:
        key = key_of(cells[0].config)
        found.append(kept[key] if key in kept else _count(cells[0].config, data))
    return found


def key_of(config: RunConfig) -> str:
    """What names the facts of an arm, which neither seed nor length changes, but code may."""
    train = dataclasses.replace(config.train, epochs=1.0)
    name = config_hash(dataclasses.replace(config, seed=0, init=None, train=train))
    versions = build.make_parts(config.plugins)[1] if config.plugins else {}
    return ", ".join([name, *versions.values()])


def _count(config: RunConfig, data: dict[str, tuple[DataSpec, int | None]]) -> Facts:
    parts, _ = build.make_parts(config.plugins)
    key = json.dumps(dataclasses.asdict(config.data), sort_keys=True)
    if key not in data:
        spec, dataset = planned_data(config, parts)
        images = None if dataset is None else len(build.make_splits(config, dataset)[0])
        data[key] = spec, images
    spec, images = data[key]
    objective = build.make_objective(config, parts, spec)
    freeze(objective, config.optim.freeze)
    model = describe_model(objective, spec, config)
    parameters, flops = model["parameters"], model["flops"]
    return Facts(
        data=f"{config.data.name} at {spec.image_size[0]} x {spec.image_size[1]} px",
        images=images,
        tokens=model["tokens"],
        patch_px=model["patch_px"],
        parameters=parameters["total"],
        compared=parameters["stem"] + parameters["encoder"],
        flops=None if flops["forward"] is None else flops["forward"] + flops["backward"],
        memory=training_memory(model, config),
    )


def kept_facts(out: Path) -> dict[str, Facts]:
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
