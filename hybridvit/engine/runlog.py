"""The run directory: the record of a run and the interface between training and reporting."""

from __future__ import annotations

import datetime
import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from hybridvit.engine import ranks
from hybridvit.registry import CODE
from hybridvit.version import RESULTS_VERSION, __version__

SCHEMA = 1
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "lightly",
    "pytorch-lightning",
    "omegaconf",
    "numpy",
    "scikit-learn",
    "pillow",
)


class RunDirectory:
    """Files of one run. Metrics are only ever appended; the others are replaced whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.figures = path / "figures"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for this process.

        Raises:
            ValueError: another process holds it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise ValueError(f"cannot write to {self.path}: {error.strerror}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"{self.path} is in use by another process; wait for it or set out=DIR"
                ) from None
            yield

    def read_record(self) -> dict[str, Any] | None:
        """The content of run.json, or None for a new directory."""
        file = self.path / "run.json"
        if not file.exists():
            return None
        try:
            record = json.loads(file.read_text())
        except ValueError:  # no JSON, or no text
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"{file} is no record of a run; remove {self.path} to start anew")
        return record

    def write_record(self, record: dict[str, Any]) -> None:
        """Replace run.json."""
        self._replace("run.json", json.dumps(record, indent=1))

    @contextmanager
    def open_record(self, record: dict[str, Any]) -> Iterator[None]:
        """run.json says `running` meanwhile, and how it ended where that was early: `stopped` by
        a signal or `failed`. What ends as it should writes its own last record."""
        try:
            self.write_record(record)
            yield
        except BaseException as error:
            end = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
            if isinstance(error, KeyboardInterrupt):
                end = {"status": "stopped", "error": "stopped outside of training"}
            self.write_record({**record, **end})
            raise

    def write_config(self, config: dict[str, Any]) -> None:
        """Replace config.yaml by the resolved config."""
        self._replace("config.yaml", yaml.safe_dump(config, sort_keys=False))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json, which only complete runs have."""
        self._replace("summary.json", json.dumps({"schema": SCHEMA, **summary}, indent=1))

    def check_summary(self) -> None:
        """See whether a complete run has its results.

        Raises:
            ValueError: it has none.
        """
        if not (self.path / "summary.json").is_file():
            raise ValueError(
                f"{self.path} says that it is complete but has no summary.json; remove it to train "
                "anew"
            )

    def write_predictions(self, labels: list[int], predicted: dict[str, list[int]]) -> None:
        """Write predictions.json: classes of the test images, in order, by the results' keys."""
        content = {"schema": SCHEMA, "labels": labels, "predicted": predicted}
        self._replace("predictions.json", json.dumps(content, separators=(",", ":")))

    def append_metrics(self, line: dict[str, float]) -> None:
        """Add a line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _replace(self, name: str, text: str) -> None:
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(text)
        os.replace(temporary, self.path / name)


def check_same_run(
    directory: RunDirectory,
    before: dict[str, Any] | None,
    config_hash: str,
    plugins: dict[str, str],
) -> None:
    """Refuse a directory that holds something else.

    What other code of a plug-in left behind is no more than a record where it saved nothing.

    Raises:
        ValueError: another config's run, one of other code of a plug-in, or files that are no run.
    """
    saved = any(directory.checkpoints.glob("step-*"))
    if before is None:
        foreign = [p.name for p in directory.path.iterdir() if not p.name.startswith(".")]
        if foreign:
            raise ValueError(
                f"{directory.path} is not empty and holds no run ({foreign[0]} ...); "
                "choose another out=DIR"
            )
    elif before.get("hash") != config_hash:
        raise ValueError(
            f"{directory.path} holds the run {before.get('hash')} of another config, this one is "
            f"{config_hash}; choose another out=DIR or remove it"
        )
    elif (saved or before.get("status") == "complete") and (
        change := plugin_change(before, plugins)
    ):
        raise ValueError(
            f"{directory.path} was begun with {change}; choose another out=DIR, remove it, or "
            "restore the code"
        )


def plugin_change(before: dict[str, Any], plugins: dict[str, str]) -> str | None:
    """How the plug-ins of a run's record differ from those that are here now, if they do.

    Where one of them does not tell its code, versions are compared.
    """
    for name, now in plugins.items():
        then = str(before.get("plugins", {}).get(name))
        told = [text.partition(CODE) for text in (then, now)]
        if then != now and (all(code for *_, code in told) or told[0][0] != told[1][0]):
            return f"other code of plug-in {name!r} ({then}, now {now})"
    return None


def check_same_data(directory: RunDirectory, before: dict[str, Any], data: dict[str, Any]) -> None:
    """Refuse a directory whose run had other images: to train on, and to test on if it has tested.

    Raises:
        ValueError: the fingerprint of the training or of the test images has changed.
    """
    checked = [("fingerprint", "images")]
    if before.get("status") == "complete":
        checked.append(("test_fingerprint", "test images"))
    for key, which in checked:
        old, new = before.get("data", {}).get(key), data.get(key)
        if None not in (old, new) and old != new:
            raise ValueError(
                f"{directory.path} was begun on other {which} (fingerprint {str(old)[:8]}, now "
                f"{str(new)[:8]}); choose another out=DIR or restore the data"
            )


def new_record(
    kind: str, name: str, config_hash: str, seed: int, plugins: dict[str, str]
) -> dict[str, Any]:
    """run.json of a run that begins now; its maker adds `data`, `model` and `leakage`."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "name": name,
        "hash": config_hash,
        "arm": {},
        "status": "running",
        "error": None,
        "seed": seed,
        **environment(),
        "plugins": plugins,
    }


def earlier(before: dict[str, Any], step: int) -> list[dict[str, Any]]:
    """What the processes were made of that have brought a run to a step, the first one first."""
    history: list[dict[str, Any]] = before.get("earlier", [])
    if step <= before.get("begins_at", 0):  # the last one saved nothing
        return history
    kept = ("started", "code", "python", "packages", "hardware", "plugins", "data")
    return [*history, {key: before.get(key) for key in kept}]


def environment() -> dict[str, Any]:
    """Code, package versions and hardware of this process, for run.json."""
    cuda = torch.cuda.is_available()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "code": {"version": __version__, "results_version": RESULTS_VERSION, **git_state()},
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "hardware": {
            "cpu": _cpu(),
            "cores": cores(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if cuda else None,
            "ranks": ranks.count(),
            "memory_gb": round(memory / 2**30, 1),
        },
    }


def cores() -> int:
    """CPU cores that this process may use: its affinity, less if a container allows less."""
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return allowed


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache  # of the code that was imported, whatever is checked out later
def git_state() -> dict[str, Any]:
    """The commit of the imported code and whether its checkout is changed; none outside of one."""
    source = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(source), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may lie inside some other repository.
    if not (source / "setup.cfg").is_file() or git("rev-parse", "--show-toplevel") != str(source):
        return {"commit": None, "dirty": None}
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
