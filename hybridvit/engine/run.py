"""One run: build, fit, evaluate, write. Started again, it resumes or says that it is complete."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hybridvit import build
from hybridvit.config import RunConfig, config_hash, resolved
from hybridvit.data.files import one_line
from hybridvit.engine import checkpoint, ranks
from hybridvit.engine.describe import fingerprints
from hybridvit.engine.fabric import Fabric, make_fabric
from hybridvit.engine.fit import Diverged, Stopped
from hybridvit.engine.runlog import (
    RunDirectory,
    check_same_data,
    check_same_run,
    cores,
    earlier,
    new_record,
)
from hybridvit.engine.session import Outcome, Session
from hybridvit.engine.signals import terminable
from hybridvit.launcher import wanted
from hybridvit.registry import Parts

COMPLETE = -1  # in place of the step that a run begins at


def train(
    config: RunConfig,
    *,
    name: str,
    out: Path | None = None,
    arm: dict[str, str] | None = None,
    tunes: bool = False,
    show: bool = True,
) -> Outcome:
    """Run a config to its end, or on from where it stopped.

    Args:
        name: of the config, for the record and the default directory.
        out: the run directory; by default `runs/<name>-<hash>`.
        arm: the run's values on a study's axes.
        tunes: the run is to choose values by, so it is scored on validation alone.
        show: a progress bar, or plain lines where the output is no terminal.

    Raises:
        ValueError: anything wrong with the config, the data or the directory.
    """
    parts, plugins = build.make_parts(config.plugins)
    config = build.resolve(config, parts)
    directory = RunDirectory(out or Path("runs") / f"{name}-{config_hash(config)}")
    with terminable(), ranks.joined():
        ranks.check_shares(config.train.batch_size, config.train.accumulate, wanted())
        fabric = make_fabric(config.train.precision, joins=True)
        if ranks.rank():
            return _follow(fabric, config, parts, directory, tunes)
        with directory.locked():
            before = directory.read_record()
            check_same_run(directory, before, config_hash(config), plugins)
            if before and before["status"] == "complete":
                directory.check_summary()
                unknown = _check_images(directory, before, config, parts)
                message = f"{directory.path} is already complete{unknown}"
                fabric.broadcast(COMPLETE)
                return Outcome(directory.path, "complete", message)
            begins_at = checkpoint.step_of(checkpoint.latest(directory.checkpoints))
            history = earlier(before, begins_at) if before and begins_at else []
            _set_threads(config.train.threads, history)
            session = Session(config, parts, directory, fabric, show)
            kind = "tune" if tunes else "train"
            record = new_record(kind, name, config_hash(config), config.seed, plugins)
            record |= {"begins_at": begins_at, "earlier": history, "arm": arm or {}}
            record |= session.described(tests=not tunes)
            if before:
                check_same_data(directory, before, record["data"])
            fabric.broadcast(begins_at)
            try:
                with directory.open_record(record), ranks.joined():
                    directory.write_config(resolved(config))
                    return session.run(record)
            except KeyboardInterrupt:  # the last checkpoint, if there is one, has everything
                again = "run the same command again to go on"
                return Outcome(directory.path, "stopped", f"stopped by a signal; {again}")


def _follow(
    fabric: Fabric, config: RunConfig, parts: Parts, directory: RunDirectory, tunes: bool
) -> Outcome:
    """A share of what is computed in a run that rank 0 takes care of, which also says how it ends.

    Raises:
        ValueError: the run directory of rank 0 is not seen from here.
    """
    try:
        begins_at = fabric.broadcast(COMPLETE)  # its data are there, and it has checked all
        if begins_at == COMPLETE:
            return Outcome(directory.path, "complete", "")
        found = checkpoint.step_of(checkpoint.latest(directory.checkpoints))
        if found != begins_at:
            raise ValueError(
                f"rank {ranks.rank()} finds step {found} in {directory.path}, rank 0 {begins_at}; "
                "give all machines the same folder"
            )
        _set_threads(config.train.threads, [])
        session = Session(config, parts, directory, fabric, show=False)
        session.fit()
        session.results(tunes)
        return Outcome(directory.path, "complete", "")
    except (Stopped, KeyboardInterrupt):
        return Outcome(directory.path, "stopped", "")
    except Diverged:
        return Outcome(directory.path, "diverged", "")


def _set_threads(wanted: int | None, history: list[dict[str, Any]]) -> None:
    """As many as the config says, or the user's OMP_NUM_THREADS; else, as sums follow their number,
    as many as a run that goes on began with, where there are cores for them."""
    if wanted is None and history and "OMP_NUM_THREADS" not in os.environ:
        hardware = history[0]["hardware"] or {}
        alike = hardware.get("ranks", 1) == ranks.count()
        began = hardware.get("threads") if alike else None
        wanted = began if isinstance(began, int) and began <= cores() else None
    if wanted is not None:
        torch.set_num_threads(wanted)


def _check_images(
    directory: RunDirectory, before: dict[str, Any], config: RunConfig, parts: Parts
) -> str:
    """Why images could not be compared with those of a run, if so: whoever has them no more may
    still ask for the result.

    Raises:
        ValueError: they are not those that the run had.
    """
    args = config.data.args | ({"download": False} if "download" in config.data.args else {})
    config = replace(config, data=replace(config.data, args=args))
    try:
        dataset = build.make_dataset(config, parts)
        data = fingerprints(dataset, tests=before["kind"] != "tune")
    except Exception as error:  # a stranger's set that is not there may raise anything
        return f" (whether its images are still the same is not known: {one_line(error)})"
    check_same_data(directory, before, data)
    return ""
