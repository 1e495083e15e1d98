"""Running the cells of a study: what is finished is reused, what fails does not stop the rest."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hybridvit import build
from hybridvit.config import RunConfig, config_hash, resolved
from hybridvit.engine.runlog import RunDirectory, plugin_change
from hybridvit.registry import suggest
from hybridvit.studies.executors import Executor, Job
from hybridvit.studies.executors.local import Local
from hybridvit.studies.grid import Cell, Study
from hybridvit.studies.needs import Needs, needs
from hybridvit.studies.plan_file import planned_names
from hybridvit.studies.status import ERROR, Live, Place, State, is_held, read_json

LOG = ".log"  # what a cell and its libraries print
BUSY = 75  # exit code of a cell that another process is running


def run_study(
    study: Study,
    out: Path,
    *,
    only: str | None = None,
    retry_failed: bool = False,
    executor: Executor | None = None,
) -> list[str]:
    """Run the cells that have not ended; returns the names of those that failed or diverged.

    Args:
        only: a pattern such as `resnet-*-seed0` of the cells to run; the others wait.
        retry_failed: run those again that failed or diverged before.
        executor: where they run; by default on this machine.

    Raises:
        ValueError: no cell has such a name.
        KeyboardInterrupt: SIGINT or SIGTERM; the running cells have saved.
    """
    executor = executor or Local(study.threads)
    chosen = select(study.cells, only)
    reused = [c for c in chosen if not (out / c.name).exists() and _reuse(c, out)]
    live = Live([place(c, out) for c in study.cells])
    statuses = {c.name: live.known[c.name].status for c in chosen}
    bad = [n for n, s in statuses.items() if s in ("diverged", "failed")]
    complete = [n for n, s in statuses.items() if s == "complete"]
    if complete:
        others = f", {len(reused)} of them from other studies" if reused else ""
        print(f"{len(complete)} of {len(study.cells)} cells are complete{others}")
    if bad and not retry_failed:
        print(f"{len(bad)} failed or diverged before; --retry-failed runs them again")
    skipped = complete if retry_failed else complete + bad
    failed = [] if retry_failed else list(bad)
    cells = {c.name: c for c in chosen if c.name not in skipped}

    def ended(name: str, code: int) -> None:
        now = live.ended(name)
        if code == BUSY:
            live.say(f"cell {name} is run by another process")
        elif code != 0:
            failed.append(name)
            live.say(f"cell {name} {_ending(now)}")

    taken = _needs(study, out, executor) if cells else {}
    jobs = [_job(cell, out, taken.get(name)) for name, cell in cells.items()]
    try:
        executor.run(jobs, watch=live.update, ended=ended)
    except KeyboardInterrupt:
        live.say("stopped; run the same command again to go on")
        raise
    finally:
        live.clear()
    return failed


def select(cells: Sequence[Cell], only: str | None) -> list[Cell]:
    """The cells that are named.

    Raises:
        ValueError: none is.
    """
    found = named(cells, only)
    if not found:
        names = [c.name.rpartition("-")[0] for c in cells]
        raise ValueError(
            f"--only {only!r} names no cell{suggest(only or '', names)}; "
            f"a cell is called {names[-1]}"
        )
    return found


def named(cells: Sequence[Cell], only: str | None) -> list[Cell]:
    """The cells whose name has a part that matches a pattern, with * for anything."""
    return [c for c in cells if fnmatch.fnmatchcase(c.name, f"*{only or ''}*")]


def place(cell: Cell, out: Path) -> Place:
    """A cell as its progress is read."""
    return Place(out / cell.name, cell.label, cell.config.train.epochs, cell.kind)


def run_cell(cell: Cell, out: Path) -> None:
    """Train a cell in this process, which ends with 0 only if it is complete."""
    # Imported here, where the fork server has paid for it: the study itself needs neither.
    from hybridvit.engine.pixels import pixel_baseline
    from hybridvit.engine.run import train

    folder = out / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    if is_held(folder) or (cell.after is not None and is_held(out / cell.after)):
        sys.exit(BUSY)
    (folder / ERROR).unlink(missing_ok=True)
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    config = _with_init(cell, out)
    try:
        if cell.kind == "pixels":
            outcome = pixel_baseline(config, folder)
        else:
            tunes = cell.kind == "tune"
            outcome = train(
                config, name=cell.name, out=folder, arm=cell.arm, tunes=tunes, show=False
            )
    except Exception as error:  # whatever ends a cell must not end the study; it is shown as failed
        if is_held(folder):  # another process was quicker, and may succeed
            sys.exit(BUSY)
        is_mistake = isinstance(error, ValueError)
        kind = "" if is_mistake else f"{type(error).__name__}: "
        (folder / ERROR).write_text(f"{kind}{error}")
        if is_mistake:
            sys.exit(2)
        raise
    sys.exit(0 if outcome.status == "complete" else 1)


def check_plugins(study: Study, out: Path) -> None:
    """A study's runs are compared with each other, and so are those that chose for its arms.

    Raises:
        ValueError: a complete one, as planned before or now, is of other code of a plug-in.
    """
    now = {name: version for cell in study.cells for name, version in _plugins(cell).items()}
    if not now:
        return
    for folder in sorted(planned_names(out) | {cell.name for cell in study.cells}):
        record = read_json(out / folder / "run.json") or {}
        has = {name: version for name, version in now.items() if name in record.get("plugins", {})}
        if record.get("status") == "complete" and (change := plugin_change(record, has)):
            raise ValueError(
                f"{out / folder} was made with {change}; choose another --out, remove {out}, or "
                "restore the code"
            )


def _plugins(cell: Cell) -> dict[str, str]:
    """Versions of a cell's plug-ins, as a record has them."""
    return build.make_parts(cell.config.plugins)[1] if cell.config.plugins else {}


def _with_init(cell: Cell, out: Path) -> RunConfig:
    """A cell's config, in which the name of the run that it starts from, which alone is a part of
    the hash, becomes its place."""
    if cell.after is None:
        return cell.config
    return dataclasses.replace(cell.config, init=str(out / cell.after))


def _needs(study: Study, out: Path, executor: Executor) -> dict[str, Needs]:
    """What the cells take, where the executor has to divide this machine by itself."""
    if not isinstance(executor, Local) or executor.given is not None:
        return {}
    return needs(study, out, gpu=executor.gpus > 0)


def _job(cell: Cell, out: Path, taken: Needs | None) -> Job:
    cores, memory = (taken.cores, taken.memory) if taken else (None, None)
    return Job(cell.name, run_cell, (cell, out), cell.after, cores, memory)


def _reuse(cell: Cell, out: Path) -> bool:
    """Take a finished run of the same config from beside the study's folder, if there is one.

    Its files are linked, so that nothing is lost when either folder is removed.
    """
    for source in _twins(cell, out):
        record = read_json(source / "run.json") or {}
        found = (record.get("hash"), record.get("kind"), record.get("status"))
        if found != (config_hash(cell.config), cell.kind, "complete"):
            continue
        if plugin_change(record, _plugins(cell)):
            continue
        temporary = out / f".{cell.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        hidden = shutil.ignore_patterns(".*")
        shutil.copytree(source, temporary, symlinks=True, ignore=hidden, copy_function=_link)
        own = {**record, "name": cell.name, "arm": cell.arm, "reused_from": str(source)}
        RunDirectory(temporary).write_record(own)
        # Its own, too: the run that it started from may have another name here.
        RunDirectory(temporary).write_config(resolved(_with_init(cell, out)))
        temporary.rename(out / cell.name)
        return True
    return False


def _twins(cell: Cell, out: Path) -> Iterator[Path]:
    """Folders named by the same hash: of single runs beside the study's, and of other studies."""
    name = f"*-{config_hash(cell.config)}"
    yield from sorted(out.absolute().parent.glob(name))
    yield from sorted(out.absolute().parent.glob(f"*/{name}"))


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one that knows no links
        shutil.copy2(source, target)
    return target


def _ending(now: State) -> str:
    if now.status in ("waiting", "running") or (now.status == "stopped" and not now.error):
        return "failed: its process died; memory, perhaps"
    word = "was stopped" if now.status == "stopped" else now.status
    return f"{word}: {' '.join((now.error or 'no reason given').split())}"
