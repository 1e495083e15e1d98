"""Whole processes as contestants: a training from its start to its metrics, and short commands."""

from __future__ import annotations

import gzip
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cases import Command, Whole
from settings import environment
from turns import Paced, Turns

OURS = [sys.executable, "-m", "hybridvit.cli"]
TIMM = [sys.executable, str(Path(__file__).with_name("timm_train.py"))]
ACCURACY = re.compile(r"test/accuracy ([\d.]+) ?%")


def training(framework: str, job: Whole, overrides: list[str], *, compiled: bool = False) -> Turns:
    """Trainings in a new process and folder each, with an empty cache; or, if `compiled`, with
    that of a training before the first turn."""
    holder = tempfile.TemporaryDirectory()  # goes when the contestant does
    data = unpacked(Path(os.environ.get("HYBRIDVIT_DATA", "data")), Path(holder.name))
    accuracies: list[float] = []

    def step(kept: tempfile.TemporaryDirectory[str] = holder) -> int:
        with tempfile.TemporaryDirectory() as folder:
            command = TIMM + timm_arguments(job, data)
            if framework == "ours":
                command = OURS + our_arguments(job, overrides, Path(folder))
            cache = Path(kept.name if compiled else folder) / "cache"
            said = run(command, HYBRIDVIT_DATA=str(data), HYBRIDVIT_CACHE=str(cache))
        found = ACCURACY.search(said)
        if found is None:
            raise ValueError(f"no test accuracy in what {framework} said: {said[-200:]!r}")
        accuracies.append(float(found[1]) / 100)
        return 1

    if compiled:
        step()
        accuracies.clear()
    return Turns(Paced(step, uncounted=0), children_memory, {"accuracy": accuracies})


def our_arguments(job: Whole, overrides: list[str], folder: Path) -> list[str]:
    """`hybridvit train` of the shipped config, for fewer images and epochs."""
    return [
        "train",
        f"{job.data}.yaml",
        f"data.train_images={job.images}",
        "data.val_fraction=0",
        f"train.epochs={job.epochs}",
        f"eval.epochs={job.epochs}",
        *overrides,
        f"out={folder / 'run'}",
    ]


def timm_arguments(job: Whole, data: Path) -> list[str]:
    """The same of the script on timm."""
    return [job.data, str(data), "--images", str(job.images), "--epochs", str(job.epochs)]


def commands(job: Command) -> Turns:
    """A command that trains nothing, in a new process each."""
    holder = tempfile.TemporaryDirectory()
    folder = Path(holder.name)
    command = {
        "import": [sys.executable, "-c", "import torch"],
        "help": [*OURS, "--help"],
        "list": [*OURS, "list"],
        "report": [*OURS, "report", str(folder / "runs"), "--out", str(folder / "report")],
    }[job.what]
    if job.what == "report":
        make_runs(folder / "runs", job.runs)

    def step(kept: tempfile.TemporaryDirectory[str] = holder) -> int:
        run(command)
        return 1

    step()  # with the files in the system's cache
    return Turns(Paced(step, uncounted=0), children_memory)


def make_runs(folder: Path, count: int) -> None:
    """`count` finished runs of two arms: one short training each, copied with other seeds."""
    for arm, stem in enumerate(("{name: linear, args: {patch: 2}}", "{name: conv}")):
        first = folder / f"arm{arm}-00"
        small = [
            "encoder.args={dim: 16, depth: 1, heads: 2}",
            "train.epochs=5",
            "train.log_every=2",
        ]
        shape = [f"stem={stem}", "data.args.image_size=16"]
        run([*OURS, "train", "digits.yaml", *small, *shape, f"out={first}"])
        record = json.loads((first / "run.json").read_text())
        for seed in range(1, count // 2):
            copy = folder / f"arm{arm}-{seed:02}"
            shutil.copytree(first, copy)
            changed = record | {"seed": seed, "hash": f"{arm:04x}{seed:04x}"}
            (copy / "run.json").write_text(json.dumps(changed))
            config = (copy / "config.yaml").read_text()
            (copy / "config.yaml").write_text(re.sub(r"(?m)^seed: 0$", f"seed: {seed}", config))


def run(command: list[str], **variables: str) -> str:
    """What a command prints; hybridvit is that of this checkout.

    Raises:
        ValueError: it fails.
    """
    known = environment() | variables
    done = subprocess.run(
        command, env=known, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise ValueError(f"{' '.join(command[1:4])} ... failed: {lines[-1] if lines else ''}")
    return done.stdout


def unpacked(root: Path, folder: Path) -> Path:
    """The data's folder, with files that torchvision reads only unpacked; a copy where needed."""
    packed = sorted(root.glob("*/raw/*.gz"))
    missing = [path for path in packed if not path.with_suffix("").exists()]
    if not missing:
        return root
    for path in missing:
        target = folder / path.relative_to(root).with_suffix("")
        target.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    for part in root.iterdir():
        if not (folder / part.name).exists():
            (folder / part.name).symlink_to(part.resolve())
    return folder


def children_memory() -> int:
    """Bytes resident at the most of the largest process that was waited for."""
    return 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
