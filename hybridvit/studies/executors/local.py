"""The default executor: processes of this machine, its cores or GPUs divided between them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess

import torch

from hybridvit.engine.runlog import cores
from hybridvit.engine.signals import terminable
from hybridvit.studies.executors import THREADS, Job, ready

POLL_SECONDS = 0.25
USABLE = 0.9  # of a GPU's free memory


@dataclass(frozen=True)
class Running:
    """A job that has been started, and the GPU that it was given."""

    job: Job
    process: ForkServerProcess
    gpu: int | None


class Local:
    """As many jobs as the cores allow; with GPUs, those that fit side by side into their memory,
    and one a GPU where that is not known.

    Args:
        threads: CPU threads of each job, which no two jobs share.
        slots: jobs at once, which then share the GPUs in turn whatever their memory.

    Raises:
        ValueError: more jobs at once than there are threads for.
    """

    def __init__(self, threads: int, slots: int | None = None) -> None:
        self.threads, self.cores, self.gpus = threads, cores(), torch.cuda.device_count()
        room = max(1, self.cores // threads)
        if slots is not None and not 1 <= slots <= room:
            raise ValueError(
                f"--jobs {slots} should be 1 to {room}: {self.cores} cores and {threads} threads "
                "a cell"
            )
        self.given = slots
        self.slots = slots or (min(self.gpus, room) if self.gpus else room)

    def run(
        self,
        jobs: Sequence[Job],
        *,
        watch: Callable[[list[str]], None],
        ended: Callable[[str, int], None],
    ) -> None:
        """See `Executor.run`."""
        for name in THREADS:
            os.environ[name] = str(self.threads)
        context = multiprocessing.get_context("forkserver")
        start_server()
        waiting, running = list(jobs), list[Running]()
        with terminable():
            free = self._free(jobs)
            try:
                while waiting or running:
                    while found := self._next(waiting, running, free):
                        job, gpu = found
                        waiting.remove(job)
                        process = context.Process(target=_enter, args=(job, self._visible(gpu)))
                        process.start()
                        running.append(Running(job, process, gpu))
                    wait([r.process.sentinel for r in running], POLL_SECONDS)
                    for done in [r for r in running if not r.process.is_alive()]:
                        running.remove(done)
                        ended(done.job.name, done.process.exitcode or 0)
                    watch([r.job.name for r in running])
            except KeyboardInterrupt:
                for r in running:
                    r.process.terminate()  # it saves and ends
                for r in running:
                    r.process.join()
                raise

    def _next(
        self, waiting: Sequence[Job], running: Sequence[Running], free: Sequence[int]
    ) -> tuple[Job, int | None] | None:
        """The first job that may start now, and its GPU where there are any."""
        if self.given is not None and len(running) >= self.given:
            return None
        busy = sum(r.job.cores or self.threads for r in running)
        for job in ready(waiting, [r.job.name for r in running]):
            fits = busy + (job.cores or self.threads) <= self.cores
            if running and not fits and self.given is None:
                continue
            if not self.gpus:
                return job, None
            gpu = place(job, running, free, in_turn=self.given is not None)
            if gpu is not None:
                return job, gpu
        return None

    def _free(self, jobs: Sequence[Job]) -> list[int]:
        """Bytes of each GPU that jobs may share; 0 where each job gets one for itself."""
        if self.given is not None or all(job.memory is None for job in jobs):
            return [0] * self.gpus
        # In a process of its own: this one starts no CUDA, which takes memory of each GPU.
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                return [int(USABLE * free) for free in pool.submit(_free_memory).result()]
            except RuntimeError:  # CUDA's; a job that cannot use its GPU will say why
                return [0] * self.gpus

    def _visible(self, gpu: int | None) -> str | None:
        """A GPU as CUDA_VISIBLE_DEVICES has it."""
        if gpu is None:
            return None
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return visible.split(",")[gpu] if visible else str(gpu)


def place(job: Job, running: Sequence[Running], free: Sequence[int], in_turn: bool) -> int | None:
    """The GPU for a job: the one with most memory left, if the job fits or has it for itself.

    Args:
        free: bytes of each GPU before any job has started.
        in_turn: the GPU with the fewest jobs instead, whether or not it fits.
    """
    count, left = [0] * len(free), list(free)
    for r in running:
        assert r.gpu is not None
        count[r.gpu] += 1
        left[r.gpu] -= free[r.gpu] if r.job.memory is None else r.job.memory
    best = min(range(len(free)), key=lambda gpu: (count[gpu] if in_turn else -left[gpu], gpu))
    fits = job.memory is not None and job.memory <= left[best]
    empty = [gpu for gpu, jobs in enumerate(count) if jobs == 0]
    if in_turn or fits:
        return best
    return empty[0] if empty else None


def _free_memory() -> list[int]:
    return [torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count())]


def start_server() -> None:
    """Start the process that cells are forked from, unless it runs. A terminal's Ctrl-C, which it
    would tell of as long as it imports, is the study's."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["hybridvit.studies.preload"])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


def _enter(job: Job, gpu: str | None) -> None:
    os.setsid()  # a terminal's Ctrl-C is the study's, which then asks each job once to stop
    if gpu is not None:  # before anything in this process has looked for GPUs
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    with contextlib.suppress(KeyboardInterrupt), terminable():
        job.function(*job.args)
        return
    sys.exit(130)
