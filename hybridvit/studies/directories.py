"""Run directories as files: what there is, how large it is, and removing it. No torch."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from hybridvit.studies.status import clean, columns, is_held, read_json

DEPTH = 4  # folders below a path in which runs are looked for
# What a run directory holds; a folder with anything else is not removed.
CONTENT = {"run.json", "config.yaml", "metrics.jsonl", "predictions.json", "summary.json"}
FOLDERS = {"checkpoints", "figures", "tensorboard"}


def find(paths: Sequence[Path]) -> list[Path]:
    """Run directories at the paths and up to four folders below, those with a damaged record, too;
    links are not followed.

    Raises:
        ValueError: a path that does not exist or holds no run.
    """
    found: dict[str, Path] = {}
    for path in paths:
        below = _below(path, DEPTH)
        if not below:
            what = "holds no run" if path.exists() else "does not exist"
            raise ValueError(f"{path} {what}; give run directories or folders of them")
        found |= {os.path.realpath(p): p for p in below}
    return list(found.values())


def listing(paths: Sequence[Path]) -> str:
    """A table of the runs at the paths, and their size altogether.

    Raises:
        ValueError: a path that holds no run.
    """
    rows = [("run", "kind", "status", "started", "size")]
    seen: set[tuple[int, int]] = set()
    total = 0
    for path in find(paths):
        record = read_json(path / "run.json") or {"kind": "", "status": "damaged"}
        status = str(record.get("status"))
        if status == "running" and not is_held(path):
            status = "stopped"
        size = _size(path, seen)
        total += size
        started = str(record.get("started", ""))[:16].replace("T", " ")
        rows.append((clean(str(path)), clean(str(record.get("kind"))), clean(status),
                     clean(started), _bytes(size)))  # fmt: skip
    return "\n".join([*columns(rows, right=(4,)), f"{len(rows) - 1} runs, {_bytes(total)}"])


def removable(paths: Sequence[Path]) -> list[Path]:
    """The runs at the paths, after a check that each may be removed.

    Raises:
        ValueError: one is running, is a link, or holds what no run has written.
    """
    found = find(paths)
    for path in found:
        if path.is_symlink():
            raise ValueError(f"{path} is a link; give the run directory itself")
        if is_held(path):
            raise ValueError(f"{path} is running; stop it first. Nothing was removed")
        foreign = [p.name for p in path.iterdir() if not _is_own(p)]
        if foreign:
            raise ValueError(
                f"{path} holds {clean(foreign[0])}, which no run has written; move it away first. "
                "Nothing was removed"
            )
    return found


def remove(runs: Sequence[Path]) -> None:
    """Remove run directories, each while holding its lock.

    Raises:
        ValueError: one has been started meanwhile.
    """
    for path in runs:
        with (path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{path} is running; it and those after it are kept") from None
            shutil.rmtree(path)


def _below(path: Path, depth: int) -> list[Path]:
    if _is_run(path):
        return [path]
    if depth == 0 or not path.is_dir():
        return []
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.is_symlink())
    return [r for p in folders if not p.name.startswith(".") for r in _below(p, depth - 1)]


def _is_run(path: Path) -> bool:
    record = read_json(path / "run.json")
    if record is None:  # damaged, where there is something else that every run has
        return (path / "run.json").is_file() and (path / ".lock").is_file()
    return {"schema", "kind", "hash", "status"} <= record.keys()


def _is_own(path: Path) -> bool:
    if path.name.startswith("."):
        return path.is_file()
    return path.name in (FOLDERS if path.is_dir() else CONTENT)


def _size(path: Path, seen: set[tuple[int, int]]) -> int:
    """Bytes below a path; a file that several runs share counts once."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            status = os.lstat(os.path.join(folder, name))
            key = (status.st_dev, status.st_ino)
            total += 0 if key in seen else status.st_size
            seen.add(key)
    return total


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"
