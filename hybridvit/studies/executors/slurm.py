"""Cells as tasks of Slurm job arrays, through submitit: the extra `slurm`."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from hybridvit.engine.signals import terminable
from hybridvit.studies.executors import THREADS, Job, ready

MINUTES = 60  # of a task until it is requeued, unless `time` says otherwise
SAVE_SECONDS = 90  # before that, it is asked to save
TIMEOUTS = 100  # a job that has not ended after so many makes no progress
ARRAY = 1000  # tasks; Slurm by default allows 1001
POLL_SECONDS = 1.0  # between looks for results
QUEUE_SECONDS = 5.0  # between questions to Slurm
LAG_SECONDS = 20.0  # until the result of another node is seen, or a task is queued again
CANCEL_SECONDS = 120.0  # for cancelled tasks to save and end
DIED = -signal.SIGKILL  # the exit code of a task that has left none
# Options that are set here, and the states of a task that will not run again.
OURS = {"array", "chdir", "error", "nodes", "no-requeue", "ntasks", "ntasks-per-node", "open-mode",
        "output", "signal", "wait", "wrap"}  # fmt: skip
FINAL = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
         "TIMEOUT"}  # fmt: skip


class Slurm:
    """Job arrays whose tasks are requeued at their time limit and go on from where they saved.

    A job that waits for another is submitted when that one has ended.

    Args:
        options: of sbatch, by their long names, such as partition, time or gpus-per-node; an
            empty value for one that takes none.
        folder: for submissions and logs, on a disk that all nodes share.
        threads: CPU threads of each job; its cpus-per-task, unless the options say otherwise.
        slots: tasks at once.

    Raises:
        ValueError: no submitit, no Slurm, or options that it refuses.
    """

    def __init__(
        self, options: Mapping[str, str], folder: Path, threads: int, slots: int | None = None
    ) -> None:
        _submitit()
        self.folder, self.threads, self.slots = folder, threads, slots or ARRAY
        self.minutes = minutes(options["time"]) if "time" in options else MINUTES
        self.options = {"cpus-per-task": str(threads), **options, "time": str(self.minutes)}
        _check(self.options)

    def run(
        self,
        jobs: Sequence[Job],
        *,
        watch: Callable[[list[str]], None],
        ended: Callable[[str, int], None],
    ) -> None:
        """See `Executor.run`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # A new one: numbers of tasks may come again, and their results are pickles.
        folder = Path(tempfile.mkdtemp(prefix="", dir=self.folder.absolute()))
        waiting, tasks = list(jobs), dict[str, Any]()  # submitted and not ended, by names of jobs
        queue, codes = Queue(), list[int]()
        with terminable():
            try:
                while waiting or tasks:
                    tasks |= self._submit(ready(waiting, tasks), folder)
                    waiting = [job for job in waiting if job.name not in tasks]
                    time.sleep(POLL_SECONDS)
                    queue.look(list(tasks.values()))
                    for name, task in list(tasks.items()):
                        if (code := queue.result(task)) is not None:
                            del tasks[name]
                            codes.append(code)
                            ended(name, code)
                    watch([name for name, task in tasks.items() if queue.is_running(task)])
            except BaseException:  # whatever ends the loop, no task is left behind
                _cancel(list(tasks.values()), queue)
                raise
        if DIED not in codes:  # else the logs may say why
            shutil.rmtree(folder)

    def _submit(self, jobs: Sequence[Job], folder: Path) -> dict[str, Any]:
        """Arrays of jobs: their tasks by the jobs' names.

        Raises:
            ValueError: Slurm takes no more.
        """
        executor = _submitit().SlurmExecutor(folder=folder, max_num_timeout=TIMEOUTS)
        executor.update_parameters(
            job_name=f"hybridvit-{self.folder.absolute().parent.name}",
            time=self.minutes,
            signal_delay_s=min(SAVE_SECONDS, 15 * self.minutes),
            setup=[f"export {name}={self.threads}" for name in THREADS],
            # Since Slurm 22.05, srun does not take this over from sbatch.
            srun_args=[f"--cpus-per-task={self.options['cpus-per-task']}"],
            array_parallelism=self.slots,
            additional_parameters={k: v or True for k, v in self.options.items()},
        )
        tasks: list[Any] = []
        try:
            with _outside_of_jobs():
                calls = [Resumable(pickle.dumps(job)) for job in jobs]
                for i in range(0, len(calls), ARRAY):
                    tasks += executor.submit_array(calls[i : i + ARRAY])
        except Exception as error:  # submitit's own kinds, with all that sbatch has printed
            _cancel(tasks, Queue())
            raise ValueError(f"Slurm takes no job: {_reason(str(error))}") from None
        return dict(zip([job.name for job in jobs], tasks, strict=True))


class Resumable:
    """A job as submitit calls it on a node: in a child process, which can be asked to save.

    Slurm's signals go to all processes of a task. SIGTERM, ahead of a preemption or when it is
    cancelled, is for the child: it saves and ends, and Slurm knows whether the task comes again.
    The signal ahead of the time limit is submitit's: it calls `checkpoint` and requeues the task.

    Args:
        pickled: the job, which the child alone reads: this process stays small and quick to end.
    """

    def __init__(self, pickled: bytes) -> None:
        self.pickled = pickled
        self.is_stopped = False

    def __call__(self) -> int:
        """Run the job; its exit code."""
        signal.signal(signal.SIGTERM, self._stop)
        fork = multiprocessing.get_context("fork")
        self.process = fork.Process(target=_enter, args=(self.pickled,))
        self.process.start()
        self.process.join()
        code = self.process.exitcode or 0
        if self.is_stopped and code != 0:
            sys.exit(128 + signal.SIGTERM)  # and no result, since the task may come again
        return code

    def checkpoint(self) -> Any:
        """Let the job save; returns what is called when the task comes again."""
        self.process.terminate()
        self.process.join(SAVE_SECONDS)  # else it goes on from an earlier checkpoint
        return _submitit().helpers.DelayedSubmission(Resumable(self.pickled))

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self.is_stopped = True


class Queue:
    """How tasks are: their results, and what Slurm says of them when asked every few seconds.

    It is asked with squeue, which works everywhere; sacct needs a data base.
    """

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.missing: dict[str, float] = {}  # since when a task is not queued any more
        self.last = -math.inf

    def look(self, tasks: Sequence[Any]) -> None:
        """Ask for the states of tasks, if it is time."""
        now = time.monotonic()
        if now - self.last < QUEUE_SECONDS:
            return
        self.last = now
        command = ["squeue", "--me", "--states=all", "--array", "--noheader", "--format=%i %T"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:  # the controller may be starting anew
            return
        self.states = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
        lost = [t.job_id for t in tasks if self.states.get(t.job_id, "COMPLETED") in FINAL]
        self.missing = {number: self.missing.get(number, now) for number in lost}

    def is_running(self, task: Any) -> bool:
        """Whether a task was at work when Slurm was last asked."""
        return self.states.get(task.job_id) == "RUNNING"

    def result(self, task: Any) -> int | None:
        """The exit code of a task that has ended."""
        path = task.paths.result_pickle
        if path.exists():
            kind, code = pickle.loads(path.read_bytes())
            return code if kind == "success" else 1
        since = self.missing.get(task.job_id, math.inf)
        return DIED if time.monotonic() - since > LAG_SECONDS else None


def minutes(text: str) -> int:
    """A time limit as sbatch takes it: minutes, M:SS, H:MM:SS, or D-H with :MM and :SS.

    Raises:
        ValueError: it is none, or 0.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None or not any(int(part or 0) for part in found.groups()):
        raise ValueError(f"time={text!r} should be minutes or H:MM:SS, as sbatch --time takes it")
    days, *parts = [int(part or 0) for part in found.groups()]
    if found[1] is None and found[4] is None:  # without hours
        parts = [0, *parts[:2]]
    hours, rest, seconds = parts
    return (days * 24 + hours) * 60 + rest + math.ceil(seconds / 60)


def _check(options: Mapping[str, str]) -> None:
    """Let Slurm itself say whether it would take a job with such options."""
    if own := sorted(OURS & options.keys()):
        raise ValueError(f"--executor-args {own[0]}: that option of sbatch is set by hybridvit")
    if shutil.which("sbatch") is None:
        raise ValueError("--executor slurm: there is no sbatch here; start it where jobs are sent")
    flags = [f"--{key}={value}" if value else f"--{key}" for key, value in options.items()]
    with _outside_of_jobs():
        command = ["sbatch", "--test-only", *flags, "--wrap=true"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"Slurm takes no job with {' '.join(flags)}: {_reason(done.stderr)}")


def _reason(text: str) -> str:
    """The line that says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if re.search("error|failure|unrecognized", line)]
    return (telling or lines or ["no reason given"])[0]


def _cancel(tasks: Sequence[Any], queue: Queue) -> None:
    """Let tasks save and end; a second Ctrl-C does not wait for them."""
    if not tasks:
        return
    subprocess.run(["scancel", "--quiet", *{t.job_id.partition("_")[0] for t in tasks}])
    end = time.monotonic() + CANCEL_SECONDS
    while time.monotonic() < end:
        queue.last = -math.inf
        queue.look(tasks)
        if len(queue.missing) == len(tasks):
            return
        time.sleep(POLL_SECONDS)


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Without the variables of the job in which a study itself may run."""
    hidden = {}
    if "SLURM_JOB_ID" in os.environ:
        names = [n for n in os.environ if n.startswith("SLURM_") and n != "SLURM_CONF"]
        hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ |= hidden


def _enter(pickled: bytes) -> None:
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # the time limit's, which the parent answers
        signal.signal(number, signal.SIG_IGN)
    with suppress(KeyboardInterrupt), terminable():
        job: Job = pickle.loads(pickled)
        job.function(*job.args)
        return
    sys.exit(130)


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise ValueError(
            "--executor slurm needs submitit: pip install 'hybridvit[slurm]'"
        ) from None
    return submitit
