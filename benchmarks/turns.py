"""Turns of a contestant: so many seconds of work, and the rate that was reached."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

WARMUP = 1  # steps until all is compiled and tuned


@dataclass
class Turns:
    """A contestant that is ready.

    `turn` takes seconds and gives a rate; `found` is told at the end: what belongs in the record.
    """

    turn: Callable[[float], float]
    memory: Callable[[], int]  # bytes at the most
    found: dict[str, Any] = field(default_factory=dict)


class Paced:
    """The rate of a step that gives how much it did.

    The number of steps is chosen beforehand, so that a GPU's host need not wait in between.

    Args:
        uncounted: steps at the start of each turn, while caches and queues fill.
    """

    def __init__(self, step: Callable[[], int], uncounted: int = 1) -> None:
        self.step, self.uncounted = step, uncounted
        self.pace: float | None = None  # seconds of a step in the last turn

    def __call__(self, seconds: float) -> float:
        for _ in range(self.uncounted):
            self.step()
        steps = 1 if self.pace is None else max(1, round(seconds / self.pace))
        wait_for_device()
        started = time.perf_counter()
        done = sum(self.step() for _ in range(steps))
        wait_for_device()
        took = time.perf_counter() - started
        self.pace = took / steps
        return done / took


def ready(step: Callable[[], int], *, uncounted: int = 1, **found: Any) -> Turns:
    """A contestant whose steps have been compiled, tuned and timed."""
    for _ in range(WARMUP):
        step()
    paced = Paced(step, uncounted)
    paced(0)
    reset_memory()
    return Turns(paced, memory_used, found)


def wait_for_device() -> None:
    """Let a GPU finish what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device() -> torch.device:
    """Where contestants compute."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def reset_memory() -> None:
    """Forget what building and compiling took."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # no Linux, or not allowed: the peak is that of the whole process


def memory_used() -> int:
    """Bytes at the most: allocated on a GPU, else resident of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
