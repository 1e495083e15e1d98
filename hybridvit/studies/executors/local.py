"""The default executor: processes of this machine, its cores or GPUs divided between them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess

import torch

from hybridvit.engine.runlog import cores
from hybridvit.engine.signals import terminable
from hybridvit.studies.executors import Job

POLL_SECONDS = 0.25


class Local:
    """A queue with slots: by default one a GPU, or without one as many as the cores allow.

    Args:
        threads: CPU threads of each job, which no two jobs share.
        slots: jobs at once; more than there are GPUs share them in turn.

    Raises:
        ValueError: more jobs at once than there are threads for.
    """

    def __init__(self, threads: int, slots: int | None = None) -> None:
        self.threads, self.gpus = threads, torch.cuda.device_count()
        room = max(1, cores() // threads)
        if slots is not None and not 1 <= slots <= room:
            raise ValueError(
                f"--jobs {slots} should be 1 to {room}: {cores()} cores, {threads} threads a cell"
            )
        self.slots = slots or (min(self.gpus, room) if self.gpus else room)

    def run(
        self,
        jobs: Sequence[Job],
        *,
        watch: Callable[[list[str]], None],
        ended: Callable[[str, int], None],
    ) -> None:
        """See `Executor.run`."""
        # Read by every library that starts threads in a job.
        os.environ["OMP_NUM_THREADS"] = str(self.threads)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["hybridvit.studies.preload"])
        waiting, free = list(jobs), list(range(self.slots))
        running: dict[int, tuple[str, ForkServerProcess]] = {}
        with terminable():
            try:
                while waiting or running:
                    while free and (job := _ready(waiting, [name for name, _ in running.values()])):
                        waiting.remove(job)
                        slot = free.pop(0)
                        process = context.Process(target=_enter, args=(job, self._gpu(slot)))
                        process.start()
                        running[slot] = (job.name, process)
                    wait([process.sentinel for _, process in running.values()], POLL_SECONDS)
                    for slot in [s for s, (_, p) in running.items() if not p.is_alive()]:
                        name, process = running.pop(slot)
                        free.append(slot)
                        ended(name, process.exitcode or 0)
                    watch([name for name, _ in running.values()])
            except KeyboardInterrupt:
                for _, process in running.values():
                    process.terminate()  # it saves and ends
                for _, process in running.values():
                    process.join()
                raise

    def _gpu(self, slot: int) -> str | None:
        """The GPU of a slot as CUDA_VISIBLE_DEVICES has it."""
        if not self.gpus:
            return None
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(self.gpus)]
        return names[slot % self.gpus]


def _ready(waiting: Sequence[Job], running: Sequence[str]) -> Job | None:
    """The first job that waits for no other."""
    open_jobs = {*running, *(job.name for job in waiting)}
    return next((job for job in waiting if job.after not in open_jobs), None)


def _enter(job: Job, gpu: str | None) -> None:
    os.setsid()  # a terminal's Ctrl-C is the study's, which then asks each job once to stop
    if gpu is not None:  # before anything in this process has looked for GPUs
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    with contextlib.suppress(KeyboardInterrupt), terminable():
        job.function(*job.args)
        return
    sys.exit(130)
