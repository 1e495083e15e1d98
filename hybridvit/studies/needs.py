"""What the cells of a study take of a machine, so that as many run beside each other as fit."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from hybridvit import build
from hybridvit.config import RunConfig
from hybridvit.data.resident import fits
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
    streams: dict[str, bool] = {}
    found = {}
    for cell in study.cells:
        config = cell.config
        key = json.dumps(dataclasses.asdict(config.data), sort_keys=True)
        if key not in streams:
            streams[key] = _streams(config)
        cores = study.threads + (config.data.workers if streams[key] else 0)
        found[cell.name] = Needs(cores, 0 if cell.kind == "pixels" else memory.get(cell.name))
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


def _streams(config: RunConfig) -> bool:
    """Whether processes beside a run's own decode its images; not if that cannot be known."""
    if config.data.workers == 0:
        return False
    if config.data.resident is not None:
        return not config.data.resident
    try:
        return not fits(build.make_dataset(config, build.make_parts(config.plugins)[0]).train)
    except (ValueError, OSError):  # the cell will say why
        return False
