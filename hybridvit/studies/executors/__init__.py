"""Where the cells of a study run: one interface, one file a place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

# Variables of a job's environment that hold its threads: every library that starts some reads the
# one, torch.compile the other.
THREADS = ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")


@dataclass(frozen=True)
class Job:
    """A call in a process of its own, which says how it went by its exit code. It waits for the
    job named `after` to end, if that is among those to run.

    `function` can be imported, and `args` pickled, so that any machine may run it. A SIGTERM asks
    it to save and end; called again, it goes on.

    Args:
        cores: that it keeps busy; by default the executor's threads.
        memory: bytes of a GPU that it takes at most; by default not known.
    """

    name: str
    function: Callable[..., None]
    args: tuple[Any, ...]
    after: str | None = None
    cores: int | None = None
    memory: int | None = None


class Executor(Protocol):
    """Runs jobs, several at once."""

    def run(
        self,
        jobs: Sequence[Job],
        *,
        watch: Callable[[list[str]], None],
        ended: Callable[[str, int], None],
    ) -> None:
        """Run all jobs, whether or not some fail.

        Args:
            watch: called every second or more often with the names of the jobs that run, or wait
                elsewhere for their turn.
            ended: called once for each job, with its exit code (below 0: killed by that signal).

        Raises:
            ValueError: jobs cannot be sent where they should run.
            KeyboardInterrupt: SIGINT or SIGTERM; the running jobs were asked to end, and did.
        """


def ready(waiting: Sequence[Job], running: Iterable[str]) -> list[Job]:
    """The jobs that wait for no other."""
    names = {*running, *(job.name for job in waiting)}
    return [job for job in waiting if job.after not in names]
