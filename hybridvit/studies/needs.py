"""What the cells of a study take of a machine, so that as many run beside each other as fit."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from hybridvit import build
from hybridvit.config import RunConfig
from hybridvit.data.resident import LIMIT_BYTES, fits, stored_bytes
from hybridvit.studies.facts import kept_facts, known
from hybridvit.studies.grid import Cell, Study

# What a plan's memory leaves out: CUDA itself, kernels' workspaces, the resident images, and what
# the allocator keeps.
GPU_FACTOR, GPU_BYTES = 1.25, 2 << 30


@dataclass(frozen=True)
class Needs:
    """CPU cores of a cell, and the bytes it takes of a GPU at most; None where not known."""

    cores: int
    memory: int | None


def needs(study: Study, out: Path, *, gpu: bool) -> dict[str, Needs]:
    """What each cell takes, by its name.

    Args:
        gpu: also count memory, from plan.json or anew.
    """
    memory = _memory(study, out) if gpu else {}
    of_data: dict[str, tuple[bool, int]] = {}
    found = {}
    for cell in study.cells:
        config = cell.config
        key = json.dumps(dataclasses.asdict(config.data), sort_keys=True)
        if key not in of_data:
            of_data[key] = _streams_and_keeps(config)
        streams, kept = of_data[key]
        model = memory.get(cell.name)
        taken = 0 if cell.kind == "pixels" else None if model is None else model + kept
        found[cell.name] = Needs(study.threads + (config.data.workers if streams else 0), taken)
    return found


def _memory(study: Study, out: Path) -> dict[str, int | None]:
    """Bytes of each cell; none where they cannot be counted, so that it has a GPU for itself."""
    kept, arms = kept_facts(out), dict[tuple[str, ...], list[Cell]]()
    for cell in study.cells:
        if cell.kind != "pixels":
            labels = (label for axis, label in cell.arm.items() if axis != "tune")
            arms.setdefault(tuple(labels), []).append(cell)
    try:
        facts = known(arms.values(), kept)
    except ValueError:  # a cell that cannot be made will say why
        return {}
    return {
        cell.name: None if f.memory is None else int(GPU_FACTOR * f.memory) + GPU_BYTES
        for cells, f in zip(arms.values(), facts, strict=True)
        for cell in cells
    }


def _streams_and_keeps(config: RunConfig) -> tuple[bool, int]:
    """Whether processes beside a run's own decode its images, and the bytes of images that it
    keeps on the device beyond those of `GPU_BYTES`; neither if that cannot be known."""
    resident = config.data.resident
    try:
        train = build.make_dataset(config, build.make_parts(config.plugins)[0]).train
    except (ValueError, OSError):  # the cell will say why
        return config.data.workers > 0 and resident is False, 0
    if resident is None:
        resident = fits(train)
    beyond = max(0, stored_bytes(train) - LIMIT_BYTES)
    return config.data.workers > 0 and not resident, beyond if resident else 0
