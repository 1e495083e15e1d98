"""How long a step of each arm takes here and how much memory, measured by training a few."""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from hybridvit import build
from hybridvit.config import RunConfig
from hybridvit.engine.device import memory_used
from hybridvit.engine.fit import Diverged
from hybridvit.engine.runlog import RunDirectory, environment
from hybridvit.studies.executors import Executor, Job
from hybridvit.studies.facts import Facts
from hybridvit.studies.grid import Study
from hybridvit.studies.matching import with_steps
from hybridvit.studies.status import read_json


def timed(
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

    Raises:
        ValueError: an arm that does not train.
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
    from hybridvit.engine.fabric import make_fabric
    from hybridvit.engine.session import Session

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
        fabric = make_fabric(config.train.precision)
        session = Session(config, parts, RunDirectory(out / "run"), fabric, show=False)
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
    """Bytes that the process has taken at most: of a GPU what torch keeps from other cells."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return memory_used(torch.device("cpu"))
