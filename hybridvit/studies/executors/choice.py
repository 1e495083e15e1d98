"""The executor that a command line names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hybridvit.studies.executors import Executor


def choose(
    name: str, args: Sequence[str], *, threads: int, slots: int | None, out: Path
) -> Executor:
    """Make an executor; only the one chosen is imported.

    Args:
        name: local, slurm or ray.
        args: its options, each as key=value.
        threads: CPU threads of a cell.
        slots: cells at once; by default as many as fit.
        out: the folder of the cells.

    Raises:
        ValueError: options that are not valid, or software that is missing.
    """
    options = {}
    for arg in args:
        key, is_pair, value = arg.partition("=")
        if not is_pair or not re.fullmatch(r"[a-z][a-z-]*", key):
            raise ValueError(
                f"--executor-args {arg!r} should be key=value; the study's file and its overrides "
                "stand before --executor-args"
            )
        options[key] = value
    if name != "local" and slots is not None and slots < 1:
        raise ValueError(f"--jobs {slots} should be at least 1")
    if name == "slurm":
        from hybridvit.studies.executors.slurm import Slurm

        return Slurm(options, out / ".slurm", threads, slots)
    if name == "ray":
        from hybridvit.studies.executors.ray import Ray

        return Ray(options, threads, slots)
    if options:
        raise ValueError("--executor-args are for --executor slurm and ray")
    from hybridvit.studies.executors.local import Local

    return Local(threads, slots)
