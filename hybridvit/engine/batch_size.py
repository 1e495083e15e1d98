"""The batch sizes that a config can train with in this machine's memory, and how fast each is.

On a GPU a batch fits when it does not run out of memory, on a CPU while the process stays within
`SHARE` of what is available. Each size trains for a few steps in a process of its own, whose peak
is that of this size alone.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hybridvit import build
from hybridvit.config import RunConfig
from hybridvit.engine.bench import Steps, both_ways, warm_up
from hybridvit.engine.device import memory_used, out_of_memory
from hybridvit.engine.idle import alone, check_unused

SHARE = 0.8  # of the memory that is available, for training on a CPU
STEP = 8  # above it, batch sizes are multiples of it
WARMUP, LEAST = 1, 2  # steps; the second holds the optimizer's state, too


@dataclass(frozen=True)
class Trial:
    """A batch size that was tried. Without images a second it did not fit."""

    batch_size: int
    images_per_second: float | None
    memory_bytes: int | None  # at the most

    @property
    def fits(self) -> bool:
        return self.images_per_second is not None


def find_batch_size(
    config: RunConfig,
    *,
    seconds: float = 2.0,
    beside_load: bool = False,
    tried: Callable[[Trial], None] = lambda trial: None,
) -> dict[str, Any]:
    """Try batch sizes, without accumulation: doubled until one does not fit, then between.

    Args:
        seconds: to train with each, three steps at least.
        tried: called with each trial as it ends.

    Returns:
        `trials` in order of size, the `largest` that fits (too small by less than an eighth, or
        than 8 images, or below 8 than half), the `fastest`, the one `configured`, and the
        `memory_limit` in bytes, none on a GPU, and how many training `images` there are.

    Raises:
        ValueError: other processes use the machine, the config does not train, or no batch fits.
    """
    if not beside_load:
        check_unused()
    parts, _ = build.make_parts(config.plugins)
    train, _ = build.make_splits(config, build.make_dataset(build.resolve(config, parts), parts))
    limit = memory_limit()

    def attempt(batch_size: int) -> Trial:
        trial = within(limit, measure(config, batch_size, seconds, beside_load))
        tried(trial)
        return trial

    trials = search(attempt, len(train), limit)
    fitting = [trial for trial in trials if trial.fits]
    if not fitting:
        raise ValueError(
            "not even one image fits into memory; set train.grad_checkpointing=true, or take a "
            "smaller encoder or smaller images"
        )
    return {
        "trials": [dataclasses.asdict(trial) for trial in trials],
        "largest": fitting[-1].batch_size,
        "fastest": max(fitting, key=lambda trial: trial.images_per_second or 0.0).batch_size,
        "configured": config.train.batch_size,
        "memory_limit": limit,
        "images": len(train),
    }


def search(attempt: Callable[[int], Trial], most: int, limit: int | None = None) -> list[Trial]:
    """The trials that lead to the largest batch of at most `most` images, in order of size.

    Sizes that two smaller ones predict to need more than `limit` bytes are left out: trying them
    could take down the machine.
    """
    trials: list[Trial] = []

    def fits(batch_size: int) -> bool:
        if limit is not None and predicted(trials, batch_size) > limit:
            return False
        trials.append(attempt(batch_size))
        return trials[-1].fits

    most = most // STEP * STEP or most
    low = start = min(STEP, most)
    while not fits(low) and low > 1:
        low //= 2
    high = most + STEP if low == start else low + 1
    while low < min(most, high - 1):  # while the next is not known to be too large
        larger = min(2 * low, most)
        low, high = (larger, high) if fits(larger) else (low, larger)
        if low != larger:
            break
    while low >= STEP and high <= most and high - low > max(STEP, low // 8):
        middle = (low + high) // 2 // STEP * STEP
        low, high = (middle, high) if fits(middle) else (low, middle)
    return sorted(trials, key=lambda trial: trial.batch_size)


def predicted(trials: Sequence[Trial], batch_size: int) -> float:
    """Bytes that a batch size takes, by a line through the two largest that fitted."""
    known = sorted((t.batch_size, t.memory_bytes or 0) for t in trials if t.fits)
    if len(known) < 2:
        return 0.0
    (a, less), (b, more) = known[-2:]
    return more + (more - less) / (b - a) * (batch_size - b)


def within(limit: int | None, trial: Trial) -> Trial:
    """The trial, which fits only if it took at most `limit` bytes."""
    if limit is None or trial.memory_bytes is None or trial.memory_bytes <= limit:
        return trial
    return dataclasses.replace(trial, images_per_second=None)


def memory_limit() -> int | None:
    """Bytes that training may take on this machine's CPU; none where a GPU decides."""
    if torch.cuda.is_available():
        return None
    return int(SHARE * available_memory())


def available_memory() -> int:
    """Bytes that could be taken now: the machine's, less if a container allows less."""
    try:
        text = Path("/proc/meminfo").read_text()
        free = 1024 * int(text.partition("MemAvailable:")[2].split()[0])
    except (OSError, IndexError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        group = Path("/sys/fs/cgroup")
        most, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        return min(free, int(most) - int(used))
    except (OSError, ValueError):  # no such file, or "max"
        return free


def measure(config: RunConfig, batch_size: int, seconds: float, beside_load: bool) -> Trial:
    """Train a few steps in a process of its own.

    Raises:
        ValueError: what is wrong with the config; other processes use the machine; the process
            died for another reason than memory.
    """
    train = dataclasses.replace(config.train, batch_size=batch_size, accumulate=1)
    config = dataclasses.replace(config, train=train)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(config, seconds, beside_load, sender))
    process.start()
    sender.close()
    try:
        found: Trial | str = receiver.recv()
        process.join()
    except EOFError:
        process.join()
        killed = process.exitcode == -signal.SIGKILL  # as the system does when memory runs out
        found = Trial(batch_size, None, None) if killed else "its process died"
    finally:  # where this process was told to stop
        process.kill()
        process.join()
    if isinstance(found, str):
        raise ValueError(f"a batch of {batch_size} images was not measured: {found}")
    return found


def _train(config: RunConfig, seconds: float, beside_load: bool, results: Connection) -> None:
    """Send a trial, or what is wrong with the config in words."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's
    size = config.train.batch_size
    try:
        steps = Steps(config)
        warm_up(steps, WARMUP)
        _, taken = alone(lambda: both_ways(steps, seconds, least=LEAST), beside_load)
        rate = median(size / spent for spent in taken)
        results.send(Trial(size, rate, memory_used(steps.fabric.device)))
    except ValueError as error:
        results.send(str(error))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        results.send(Trial(size, None, None))


def trial_text(trial: Trial) -> str:
    """A line of the table."""
    if trial.images_per_second is None:
        return f"{trial.batch_size:>6}  does not fit"
    memory = (trial.memory_bytes or 0) / 2**30
    return f"{trial.batch_size:>6}  {trial.images_per_second:10,.1f} images/s  {memory:6.2f} GiB"


def result_text(found: dict[str, Any]) -> str:
    """What the trials say, below their table."""
    limit = found["memory_limit"]
    where = "on the GPU"
    if limit is not None:
        where = f"in {limit / 2**30:.1f} GiB, {SHARE:.0%} of what is available"
    largest = f"largest that fits {where}"
    if found["images"] - found["largest"] < STEP:
        largest = f"largest of {found['images']} training images"
    return (
        f"{largest}: {found['largest']}; fastest: {found['fastest']}\n"
        f"the config still has train.batch_size={found['configured']}; another one changes what is "
        "learnt (optim.lr is per 256 images and follows)"
    )
