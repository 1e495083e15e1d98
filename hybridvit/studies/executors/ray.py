"""Cells as core tasks of a Ray cluster: the extra `ray`."""

from __future__ import annotations

import math
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hybridvit.engine.signals import terminable
from hybridvit.registry import suggest
from hybridvit.studies.executors import THREADS, Job, ready

RETRIES = 3  # of a job whose node or process has died
POLL_SECONDS = 0.5
CONNECT_SECONDS = 10.0
CANCEL_SECONDS = 120.0  # for cancelled jobs to save and end
OPTIONS = ("address", "cpus", "gpus")


class Ray:
    """Tasks of a Ray cluster, all of whose nodes share the disk of the cells; those of a node that
    dies go on elsewhere from their last checkpoint.

    Args:
        options: `address` of the cluster (default: RAY_ADDRESS, or the one of this machine);
            `cpus` and `gpus` of a cell, also less than one (default: `threads`, and one GPU where
            the cluster has any).
        threads: CPU threads of each job.
        slots: jobs that are sent at once; by default all, and Ray lets them wait.

    Raises:
        ValueError: no Ray, no such cluster, or options that are not valid.
    """

    def __init__(self, options: Mapping[str, str], threads: int, slots: int | None = None) -> None:
        for key in options.keys() - set(OPTIONS):
            raise ValueError(
                f"--executor-args {key}: ray has no such option{suggest(key, OPTIONS)}; "
                f"valid: {', '.join(OPTIONS)}"
            )
        cpus, gpus = _number(options, "cpus"), _number(options, "gpus")
        self.ray, self.threads, self.given = _ray(), threads, slots
        self._connect(options.get("address", "auto"))
        self.cpus = threads if cpus is None else cpus
        has_gpus = "GPU" in self.ray.cluster_resources()
        self.gpus = float(has_gpus) if gpus is None else gpus
        if self.room() == 0:  # it may grow
            print(f"no node of the cluster has {self.cpus:g} CPUs and {self.gpus:g} GPUs; "
                  "cells wait for one", file=sys.stderr)  # fmt: skip

    def room(self) -> int:
        """Jobs that the cluster holds as it is now."""
        rooms = [
            min(_times(node["Resources"].get("CPU", 0), self.cpus),
                _times(node["Resources"].get("GPU", 0), self.gpus))
            for node in self.ray.nodes()
            if node["Alive"]
        ]  # fmt: skip
        return int(min(sum(rooms), sys.maxsize))

    def run(
        self,
        jobs: Sequence[Job],
        *,
        watch: Callable[[list[str]], None],
        ended: Callable[[str, int], None],
    ) -> None:
        """See `Executor.run`."""
        task = self.ray.remote(max_calls=1, max_retries=RETRIES)(_enter)  # a process for each
        task = task.options(num_cpus=self.cpus, num_gpus=self.gpus)
        waiting, sent = list(jobs), dict[Any, str]()  # names of jobs by Ray's references
        with terminable():
            try:
                while waiting or sent:
                    free = None if self.given is None else self.given - len(sent)
                    for job in ready(waiting, sent.values())[:free]:
                        waiting.remove(job)
                        pickled = pickle.dumps(job)
                        sent[task.remote(pickled, os.getcwd(), self._environment())] = job.name
                    for reference in self._ended(sent):
                        ended(sent.pop(reference), self._code(reference))
                    watch(list(sent.values()))
            except BaseException:  # whatever ends the loop, no job is left behind
                self._cancel(list(sent))
                raise

    def _connect(self, address: str) -> None:
        try:
            if ":" in address:  # Ray itself would try for minutes
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
            self.ray.init(
                address=address,
                ignore_reinit_error=True,
                log_to_driver=False,
                logging_level="error",
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()
            raise ValueError(
                f"no Ray cluster at {address!r} ({reason[0] if reason else 'no reason given'}); "
                "start one with `ray start --head`, or give --executor-args address=HOST:PORT"
            ) from None

    def _environment(self) -> dict[str, str]:
        """What Ray does not hand on to the nodes: where data are, and how many threads."""
        own = {name: value for name, value in os.environ.items() if name.startswith("HYBRIDVIT_")}
        return {**own, **dict.fromkeys(THREADS, str(self.threads))}

    def _ended(self, sent: Mapping[Any, str]) -> list[Any]:
        found, _ = self.ray.wait(list(sent), num_returns=len(sent), timeout=POLL_SECONDS)
        return list(found)

    def _code(self, reference: Any) -> int:
        """The exit code of a task that has ended; that of a killed process, if it has left none."""
        try:
            return int(self.ray.get(reference))
        except self.ray.exceptions.RayError:
            return -signal.SIGKILL

    def _cancel(self, references: list[Any]) -> None:
        """Let jobs save and end; a second Ctrl-C does not wait for them."""
        for reference in references:
            self.ray.cancel(reference)  # as Ctrl-C in that process
        if references:
            self.ray.wait(references, num_returns=len(references), timeout=CANCEL_SECONDS)


def _enter(pickled: bytes, folder: str, environment: dict[str, str]) -> int:
    """Run a job in the process of a task; its exit code."""
    os.chdir(folder)
    os.environ |= environment  # before the job's libraries are imported
    job: Job = pickle.loads(pickled)
    try:
        job.function(*job.args)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except Exception:  # printed into the job's log, and its code says that it failed
        traceback.print_exc()
        return 1
    return 0


def _times(there: float, wanted: float) -> float:
    return math.floor(there / wanted) if wanted else math.inf


def _number(options: Mapping[str, str], key: str) -> float | None:
    if key not in options:
        return None
    try:
        value = float(options[key])
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"--executor-args {key}={options[key]} should be a number, 0 or more")
    return value


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ValueError("--executor ray needs Ray: pip install 'hybridvit[ray]'") from None
    return ray
