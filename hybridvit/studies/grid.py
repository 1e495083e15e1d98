"""A study: the grid of axes x seeds, one process a cell, the cores divided between them."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from hybridvit import build
from hybridvit import config as configs
from hybridvit.config import RunConfig
from hybridvit.engine.runlog import cores
from hybridvit.registry import fits, suggest

if TYPE_CHECKING:
    from hybridvit.engine.run import Outcome

POLL_SECONDS = 0.25
KEYS: dict[str, Any] = {
    "title": str,
    "question": str,
    "config": str,
    "axes": dict[str, Any],
    "seeds": list[int],
    "threads": int,
    "pixels": bool,
    "longer": str | None,
}


@dataclass(frozen=True)
class Cell:
    """One run of a study; without an arm, the pixel baselines.

    `name` is its folder: the arm, the seed and the hash of the resolved config, so that a run of
    another config is never taken for it.
    """

    name: str
    config: RunConfig
    arm: dict[str, str]
    kind: str = "train"


@dataclass(frozen=True)
class Study:
    """A study file, read and checked.

    Args:
        question: what is asked, for the report.
        longer: the command that answers what this budget cannot.
        threads: per cell; as many cells run at once as the cores allow.
    """

    name: str
    title: str
    question: str
    longer: str | None
    threads: int
    cells: list[Cell] = field(default_factory=list)


def read_study(path: Path, overrides: list[str]) -> Study:
    """Read a study file and resolve every cell before anything runs.

    Args:
        overrides: `key.path=value`, laid over the base config of all cells.

    Raises:
        ValueError: a bad study file, or a cell whose config is not valid.
    """
    if not path.is_file():
        raise ValueError(f"no study file {str(path)!r}; experiments/ holds the shipped ones")
    content = configs.read_yaml(path)
    _check(content, path)
    base_path = path.parent / content["config"]
    base = configs.compose(base_path if base_path.is_file() else configs.find(content["config"]))
    threads = content.get("threads", 1)
    fixed = OmegaConf.create({"train": {"threads": threads}})
    arms = list(_arms(content["axes"]))
    cells = []
    for arm, seed in itertools.product(arms, content.get("seeds", [0, 1, 2])):
        merged = base
        for layer in (*arm.values(), configs.dotlist(overrides), fixed, {"seed": seed}):
            merged = configs.overlay(merged, OmegaConf.create(layer))
        labels = dict(label.split("=", 1) for label in arm)
        cells.append(_cell(f"{'-'.join(labels.values())}-seed{seed}", merged, labels))
    if content.get("pixels", False):
        plain = configs.overlay(configs.overlay(base, configs.dotlist(overrides)), fixed)
        cells.insert(0, _cell("pixels", plain, {}, "pixels"))
    _check_distinct(cells)
    return Study(
        path.parent.name if path.stem == "study" else path.stem,
        content["title"],
        content["question"],
        content.get("longer"),
        threads,
        cells,
    )


def run_study(study: Study, out: Path) -> list[str]:
    """Run the cells that are not complete; returns the names of those that failed.

    Raises:
        KeyboardInterrupt: SIGINT or SIGTERM; the running cells have saved.
    """
    waiting = [cell for cell in study.cells if not _is_complete(out / cell.name)]
    if len(waiting) < len(study.cells):
        print(f"{len(study.cells) - len(waiting)} of {len(study.cells)} cells are complete")
    slots = torch.cuda.device_count() or max(1, cores() // study.threads)
    # Read by every library that starts threads in a cell.
    os.environ["OMP_NUM_THREADS"] = str(study.threads)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hybridvit.studies.preload"])
    running: dict[str, ForkServerProcess] = {}
    failed: list[str] = []
    with _Status(study, out) as status, _terminable():
        try:
            while waiting or running:
                while waiting and len(running) < slots:
                    cell = waiting.pop(0)
                    process = context.Process(target=_run_cell, args=(cell, out))
                    process.start()
                    running[cell.name] = process
                time.sleep(POLL_SECONDS)
                for name in [n for n, process in running.items() if not process.is_alive()]:
                    if running.pop(name).exitcode != 0:
                        failed.append(name)
                        status.say(f"cell {name} failed: {_error(out / name)}")
                status.update(list(running))
        except KeyboardInterrupt:
            children = multiprocessing.active_children()
            for child in children:
                child.terminate()  # it saves and ends
            for child in children:
                child.join()
            status.say("stopped; run the same command again to go on")
            raise
    return failed


class _Status:
    """A progress bar over the training steps of all cells, or a line a cell without a terminal."""

    def __init__(self, study: Study, out: Path) -> None:
        self.cells, self.out = study.cells, out
        self.seen: set[str] = set()
        self.bar = tqdm(
            total=len(self.cells),
            unit="cell",
            disable=not sys.stderr.isatty(),
            bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}",
        )

    def __enter__(self) -> _Status:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def update(self, running: list[str]) -> None:
        done = 0.0
        for cell in self.cells:
            share = 1.0 if cell.name in self.seen else _share_done(self.out / cell.name, cell)
            done += share
            if share == 1.0 and cell.name not in self.seen:
                self.seen.add(cell.name)
                if self.bar.disable:
                    self.say(f"[{len(self.seen)}/{len(self.cells)}] {cell.name}")
        self.bar.set_description(f"{len(self.seen)}/{len(self.cells)} cells ", refresh=False)
        self.bar.set_postfix_str(", ".join(running), refresh=False)
        self.bar.n = done
        self.bar.refresh()

    def say(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM as Ctrl-C, so that no cell is left behind; and Ctrl-C itself, which a process that
    was started in the background ignores otherwise."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_cell(cell: Cell, out: Path) -> None:
    os.setsid()  # a terminal's Ctrl-C is the study's, which then asks each cell once to stop
    folder = out / cell.name
    (folder / ".error").unlink(missing_ok=True)
    try:
        with _terminable():
            outcome = _start(cell, folder)
    except ValueError as error:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".error").write_text(str(error))
        sys.exit(2)
    except KeyboardInterrupt:  # before or after training, where there is nothing to save
        sys.exit(130)
    sys.exit(0 if outcome.status == "complete" else 1)


def _start(cell: Cell, folder: Path) -> Outcome:
    # Imported here, where the fork server has paid for it: the study itself needs neither.
    from hybridvit.engine.pixels import pixel_baseline
    from hybridvit.engine.run import train

    if cell.kind == "pixels":
        return pixel_baseline(cell.config, folder)
    return train(cell.config, name=cell.name, out=folder, arm=cell.arm, show=False)


def _arms(axes: dict[str, Any]) -> Iterator[dict[str, dict[str, Any]]]:
    """Each combination of one value an axis, as {"axis=value": overrides}."""
    named = [
        [(f"{axis}={v}", layer) for v, layer in values.items()] for axis, values in axes.items()
    ]
    for combination in itertools.product(*named):
        yield dict(combination)


def _cell(name: str, merged: Any, arm: dict[str, str], kind: str = "train") -> Cell:
    try:
        config = configs.validate(configs.to_plain(merged))
        config = build.resolve(config, build.make_parts(config.plugins)[0])
        return Cell(f"{name}-{configs.config_hash(config)}", config, arm, kind)
    except ValueError as error:
        raise ValueError(f"cell {name}: {error}") from None


def _check(content: dict[str, Any], path: Path) -> None:
    for key, value in content.items():
        if key not in KEYS:
            raise ValueError(
                f"{path}: unknown key {key!r}{suggest(key, KEYS)}; valid: {', '.join(KEYS)}"
            )
        if not fits(value, KEYS[key]):
            raise ValueError(f"{path}: {key}={value!r} should be {KEYS[key]}")
    for key in ("title", "question", "config", "axes"):
        if key not in content:
            raise ValueError(f"{path}: needs {key!r}")
    if content.get("threads", 1) < 1:
        raise ValueError(f"{path}: threads={content['threads']} should be at least 1")
    if not content.get("seeds", [0]):
        raise ValueError(f"{path}: seeds is empty; give at least one, and three for an interval")
    _check_axes(content["axes"], path)


def _check_axes(axes: dict[str, Any], path: Path) -> None:
    for axis, values in axes.items():
        if not isinstance(values, dict) or not values:
            raise ValueError(f"{path}: axis {axis!r} should map names to overrides")
        for value, layer in values.items():
            if not re.fullmatch(r"[\w.+-]+", str(value)):
                raise ValueError(
                    f"{path}: {axis}={value} names folders; use letters, digits and . _ + -"
                )
            if not isinstance(layer, dict):
                raise ValueError(f"{path}: {axis}={value} should be a set of overrides")


def _check_distinct(cells: list[Cell]) -> None:
    owners: dict[tuple[str, str], str] = {}
    for cell in cells:
        key = (configs.config_hash(cell.config), cell.kind)
        if key in owners:
            raise ValueError(
                f"cells {owners[key]} and {cell.name} are the same run; "
                "an axis value changes nothing, or a seed stands twice"
            )
        owners[key] = cell.name


def _record(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        return {}
    return record


def _is_complete(folder: Path) -> bool:
    return _record(folder).get("status") == "complete"


def _share_done(folder: Path, cell: Cell) -> float:
    if _is_complete(folder):
        return 1.0
    try:
        last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
        return min(0.99, float(json.loads(last)["epoch"]) / cell.config.train.epochs)
    except (OSError, ValueError, IndexError, KeyError):
        return 0.0


def _error(folder: Path) -> str:
    message = _record(folder).get("error")
    if message is None and (folder / ".error").is_file():
        message = (folder / ".error").read_text()
    return str(message or "its process died; memory, perhaps")
