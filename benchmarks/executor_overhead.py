"""What the local executor costs over the same cells started one by one: one line of JSON.

Three ways, in turn, of running the same few cells of the digits, one at a time:
- study: `run_study` with the local executor;
- loop: a process for each, forked from the same server and waited for, and nothing else;
- commands: `hybridvit train` for each, as one would in a shell.

Run it alone on a machine, and add what it prints to benchmarks/executor_overhead.jsonl.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import yaml

from hybridvit.config import resolved
from hybridvit.engine.idle import check_idle
from hybridvit.engine.runlog import environment
from hybridvit.studies.cells import run_cell, run_study
from hybridvit.studies.executors import Job
from hybridvit.studies.executors.local import Local
from hybridvit.studies.grid import Study, read_study

STUDY = "{title: T, question: Q, config: digits.yaml, axes: {stem: {linear: {}}}}"


def by_study(study: Study, out: Path) -> None:
    """With the executor, on one core."""
    executor = Local(study.threads)
    executor.cores = 1
    assert run_study(study, out, executor=executor) == []


def by_loop(study: Study, out: Path) -> None:
    """Without it."""
    context = multiprocessing.get_context("forkserver")
    for cell in study.cells:
        process = context.Process(target=run_cell, args=(cell, out))
        process.start()
        process.join()
        assert process.exitcode == 0


def by_commands(study: Study, out: Path) -> None:
    """As one would in a shell."""
    out.mkdir(parents=True)
    for cell in study.cells:
        config = out / f"{cell.name}.yaml"
        config.write_text(yaml.safe_dump(resolved(cell.config)))
        command = [sys.executable, "-m", "hybridvit.cli", "train", str(config)]
        subprocess.run([*command, f"out={out / cell.name}"], check=True, capture_output=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    check_idle()
    ways: dict[str, Callable[[Study, Path], None]] = {
        "study": by_study, "loop": by_loop, "commands": by_commands
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "study.yaml").write_text(STUDY)
        study = read_study(folder, [f"train.epochs={options.epochs}"], options.cells)
        start = time.perf_counter()  # of the fork server, which all later processes come from
        Local(1).run([Job("nothing", print, ())], watch=str, ended=lambda name, code: None)
        first = time.perf_counter() - start
        for i in range(options.rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                way(study, folder / f"{name}-{i}" / "cells")
                seconds[name].append(round(time.perf_counter() - start, 3))
    middle = {name: median(values) for name, values in seconds.items()}
    found = environment()
    print(json.dumps({
        "benchmark": "executor_overhead",
        "cells": options.cells,
        "epochs": options.epochs,
        "seconds": seconds,
        "overhead_percent": {
            name: round(100 * (middle["study"] / middle[name] - 1), 2)
            for name in ("loop", "commands")
        },
        "first_process_seconds": round(first, 3),
        **{key: found[key] for key in ("started", "code", "packages", "hardware")},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
