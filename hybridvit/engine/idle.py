"""Whether others use a machine that is measured: one busy neighbour costs many times its share."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BUSY = 0.15  # share of one core that other processes may use
SECONDS = 0.5  # to look for them; in less, single ticks of the clock would count


@contextmanager
def alone(beside_load: bool) -> Iterator[None]:
    """Measure something inside, while no other process works; beside any, if `beside_load`.

    Raises:
        ValueError: others work beforehand, or have done meanwhile.
    """
    if beside_load:
        yield
        return
    check_idle()
    started, before = time.perf_counter(), busy_seconds() - own_seconds()
    yield
    refuse(busy_seconds() - own_seconds() - before, time.perf_counter() - started)


def check_idle(seconds: float = SECONDS) -> None:
    """Refuse a machine that others use.

    Raises:
        ValueError: other processes used more than `BUSY` of a core meanwhile.
    """
    with_others = busy_seconds() - own_seconds()
    time.sleep(seconds)
    refuse(busy_seconds() - own_seconds() - with_others, seconds)


def refuse(taken: float, seconds: float) -> None:
    """Refuse CPU time that others took in so many seconds, if it is too much.

    Raises:
        ValueError: it was more than `BUSY` of a core.
    """
    share = taken / max(seconds, SECONDS)
    if share > BUSY:
        raise ValueError(
            f"other processes use {100 * share:.0f} % of a core, which would be measured instead; "
            "wait for them, or add --beside-load"
        )


def busy_seconds() -> float:
    """CPU time that all processes have taken since the machine started; 0 where unknown."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    ticks = [int(field) for field in fields]
    idle = ticks[3] + ticks[4]  # idle, and waiting for a disk
    return (sum(ticks[:8]) - idle) / 100


def own_seconds() -> float:
    """CPU time of this process, of its decode workers, and of its children that have ended."""
    ended = sum(os.times()[:4])
    return ended + sum(_seconds(child.pid) for child in multiprocessing.active_children())


def _seconds(pid: int | None) -> float:
    try:
        # The name in parentheses may hold spaces.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended
        return 0.0
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
