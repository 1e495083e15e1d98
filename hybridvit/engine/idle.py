"""Whether others use a machine that is measured: one busy neighbour costs many times its share."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

BUSY = 0.15  # share of one core that other processes may use
ROUNDING = 0.01  # of what this process takes, by which two ways to count it may differ
GPU_BUSY = 5  # per cent of the time in which they may use a GPU
SECONDS = 0.5  # to look for others; in less, single ticks of the clock would count
TRIES = 3
Found = TypeVar("Found")


class Busy(ValueError):
    """Other processes use the machine."""


def alone(measure: Callable[[], Found], beside_load: bool) -> Found:
    """What is measured while no other process works; again where one does. Beside any load, if
    `beside_load`.

    Raises:
        Busy: something disturbs every try.
    """
    if beside_load:
        return measure()
    for left in range(TRIES - 1, -1, -1):
        try:
            check_idle()
            started, before, mine = time.perf_counter(), busy_seconds(), own_seconds()
            found = measure()
            took, busy, own = time.perf_counter(), busy_seconds() - before, own_seconds() - mine
            refuse(busy - own - ROUNDING * own, took - started)
            return found
        except Busy:
            if left == 0:
                raise
    raise AssertionError


def check_idle(seconds: float = SECONDS) -> None:
    """Refuse a machine that others use.

    Raises:
        Busy: other processes used more than `BUSY` of a core meanwhile.
    """
    before = busy_seconds() - own_seconds()
    time.sleep(seconds)
    refuse(busy_seconds() - own_seconds() - before, seconds)


def check_unused() -> None:
    """Refuse a machine that others use, or its GPU, before this process uses them itself.

    Raises:
        Busy: they do.
    """
    check_idle()
    for left in range(TRIES - 1, -1, -1):
        share = gpu_share()
        if share is None or share <= GPU_BUSY:
            return
        if left:
            time.sleep(1)  # it may be of a process that has just ended
    raise Busy(
        f"other processes use the GPU {share} % of the time, which would be measured instead; wait "
        "for them, or add --beside-load"
    )


def gpu_share() -> int | None:
    """Per cent of the last second in which the first GPU that is visible worked, for whatever
    process; None where nvidia-smi does not say."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    asked = (f"--id={gpu}", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits")
    try:
        told = subprocess.run(["nvidia-smi", *asked], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    said = told.stdout.strip()
    return int(said) if gpu and said.isdecimal() else None


def refuse(taken: float, seconds: float) -> None:
    """Refuse CPU time that others took in so many seconds, if it is too much.

    Raises:
        Busy: it was more than `BUSY` of a core.
    """
    share = taken / max(seconds, SECONDS)
    if share > BUSY:
        raise Busy(
            f"other processes use {100 * share:.0f} % of a core, which would be measured instead; "
            "wait for them, or add --beside-load"
        )


def busy_seconds() -> float:
    """CPU time that all processes have taken since the machine started; 0 where unknown."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    return sum(map(int, fields[:3])) / 100  # of users, with a low priority too, and of the system


def own_seconds() -> float:
    """CPU time of this process and of all that it started, those that have ended too; 0 where
    unknown."""
    parents, ticks = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in parentheses may hold spaces.
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        parents[int(stat.parent.name)] = int(fields[1])
        ticks[int(stat.parent.name)] = sum(map(int, fields[11:15]))  # and of ended children
    family, found = set(), {os.getpid()} & ticks.keys()
    while found:
        family |= found
        found = {pid for pid, parent in parents.items() if parent in found}
    return sum(ticks[pid] for pid in family) / os.sysconf("SC_CLK_TCK")
