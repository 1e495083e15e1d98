from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from executor_jobs import count, die, leave, stay
from executor_seen import Seen, wait_for

from hybridvit.studies.cells import run_study
from hybridvit.studies.executors import Job, slurm
from hybridvit.studies.executors.choice import choose
from hybridvit.studies.executors.slurm import DIED, Queue, Slurm, minutes
from hybridvit.studies.grid import read_study

HERE = Path(__file__).parent
TINY = ["encoder.args.dim=8", "encoder.args.depth=1", "encoder.args.heads=1", "train.log_every=5"]
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel")
SBIN = f"{os.environ['PATH']}:/usr/sbin"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The configuration of a Slurm of this machine."""
    pytest.importorskip("submitit", reason="submitit is not installed: extra slurm")
    if absent := [name for name in NEEDED if shutil.which(name, path=SBIN) is None]:
        pytest.skip(f"Slurm is not installed: no {', '.join(absent)}; Debian's slurm-wlm and munge")
    folder = tmp_path_factory.mktemp("slurm")
    script = [str(HERE / "slurm_here.sh"), str(folder), "sh", "-c", "echo ready; cat"]
    with subprocess.Popen(
        script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as here:
        assert here.stdin is not None
        assert here.stdout is not None
        assert here.stderr is not None
        if here.stdout.readline() != "ready\n":
            pytest.skip(here.stderr.read().strip())
        yield folder / "slurm.conf"
        here.stdin.close()


@pytest.fixture
def here(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, its children and its jobs use that Slurm, and find the same modules."""
    monkeypatch.setenv("SLURM_CONF", str(cluster))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    monkeypatch.setattr(slurm, "QUEUE_SECONDS", 1.0)
    monkeypatch.setattr(slurm, "LAG_SECONDS", 3.0)


def queued() -> list[str]:
    done = subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


# First of all: Slurm looks at time limits 30 and 60 s after it has started, and so on.
@pytest.mark.usefixtures("here")
def test_an_array_of_four_of_which_one_is_requeued_at_its_time_limit(tmp_path: Path) -> None:
    long = tmp_path / "long"
    jobs = [Job("long", count, (long, 460))]  # more than the minute, less the time to save
    jobs += [Job(name, stay, (tmp_path, name, 1.0)) for name in "abc"]
    seen = Seen()
    executor = Slurm({"time": "1"}, tmp_path / ".slurm", threads=1)
    executor.run(jobs, watch=seen.watch, ended=seen.ended)
    assert seen.codes == {"long": 0, "a": 0, "b": 0, "c": 0}
    number, calls = map(int, long.read_text().split())
    assert number == 460
    assert calls in (2, 3)
    assert Path(f"{long}.saved").exists()
    done = subprocess.run(["scontrol", "show", "job"], capture_output=True, text=True, check=True)
    tasks = dict(re.findall(r"ArrayTaskId=(\d) .*?Restarts=(\d)", done.stdout, re.DOTALL))
    assert tasks == {"0": str(calls - 1), "1": "0", "2": "0", "3": "0"}
    assert list((tmp_path / ".slurm").iterdir()) == []


STUDY = """
title: T
question: Q
config: digits.yaml
axes:
  stem: {slow: {plugins: ["slow_parts:register"], stem: {name: slow}}}
seeds: [0]
"""


@pytest.mark.usefixtures("here")
def test_a_preempted_cell_saves_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(STUDY)
    study = read_study(tmp_path, [*TINY, "train.epochs=2"])
    out = tmp_path / "out"
    metrics = out / study.cells[0].name / "metrics.jsonl"

    def preempt() -> None:
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2)
        subprocess.run(["scontrol", "requeue", queued()[0].split()[0]], check=True)

    with ThreadPoolExecutor(1) as pool:
        preempted = pool.submit(preempt)
        assert run_study(study, out, executor=Slurm({}, out / ".slurm", 1)) == []
        preempted.result()
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == sorted(set(steps))  # it went on from where it was stopped
    assert any(step % 5 for step in steps[:-1])  # which was between two log points


@pytest.mark.usefixtures("here")
def test_jobs_end_with_their_codes_and_in_their_order(tmp_path: Path) -> None:
    jobs = [
        Job("fails", leave, (3,)),
        Job("dies", die, ()),
        Job("long", stay, (tmp_path, "long", 2.0)),
        Job("then", stay, (tmp_path, "then", 0.1), after="fails"),
        Job("cancelled", stay, (tmp_path, "cancelled", 100.0), after="then"),
        Job("last", stay, (tmp_path, "last", 0.1), after="long"),
    ]
    seen = Seen()

    def watch(names: list[str]) -> None:
        seen.watch(names)
        if "cancelled" in names:  # by hand, from elsewhere
            lines = [line.split() for line in queued()]
            subprocess.run(["scancel", *[line[0] for line in lines]], check=True)

    executor = Slurm({"time": "5"}, tmp_path / ".slurm", threads=2)
    executor.run(jobs, watch=watch, ended=seen.ended)
    assert seen.codes == {
        "fails": 3, "dies": -signal.SIGKILL, "long": 0, "then": 0, "cancelled": DIED, "last": 0
    }  # fmt: skip
    assert "long" in seen.running
    (start, _, *_), (_, end, *_) = (
        (tmp_path / name).read_text().split() for name in ("last", "long")
    )
    assert float(start) > float(end)
    assert (tmp_path / "last").read_text().split()[-1] == "2"  # threads


@pytest.mark.usefixtures("here")
def test_ctrl_c_lets_jobs_save_and_leaves_none_behind(tmp_path: Path) -> None:
    driver = [sys.executable, str(HERE / "executor_driver.py"), "slurm", str(tmp_path), "time=5"]
    with subprocess.Popen(driver) as process:
        wait_for(lambda: len(list(tmp_path.glob("[0-9]"))) >= 2)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    running = {path.name for path in tmp_path.glob("[0-9]")}
    assert {path.stem for path in tmp_path.glob("*.saved")} == running
    assert queued() == []


@pytest.mark.usefixtures("here")
def test_what_slurm_refuses_is_said_in_a_line_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"partition=nope .*: sbatch: error: invalid partition"):
        Slurm({"partition": "nope"}, tmp_path, 1)
    with pytest.raises(ValueError, match="unrecognized option '--partitoin=here'"):
        Slurm({"partitoin": "here"}, tmp_path, 1)
    with pytest.raises(ValueError, match="Requested node configuration is not available"):
        Slurm({"cpus-per-task": "999"}, tmp_path, 1)
    assert Slurm({"partition": "here", "exclusive": ""}, tmp_path, 1).minutes == 60


def test_time_limits_are_read_as_sbatch_reads_them() -> None:
    limits = {"90": 90, "2:30": 3, "4:00:00": 240, "1-0": 1440, "1-2:30": 1590, "1-0:0:1": 1441}
    assert {text: minutes(text) for text in limits} == limits
    for text in ("", "0", "1h", "-5", "1:2:3:4"):
        with pytest.raises(ValueError, match="should be minutes or H:MM:SS"):
            minutes(text)


def test_what_is_missing_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(*args: str) -> None:
        choose("slurm", args, threads=1, slots=None, out=tmp_path)

    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"pip install 'hybridvit\[slurm\]'"):
        chosen()
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="there is no sbatch here"):
        chosen("partition=gpu")
    with pytest.raises(ValueError, match="signal: that option of sbatch is set by hybridvit"):
        chosen("signal=USR1@5")
    with pytest.raises(
        ValueError, match=r"'train\.epochs=3' should be key=value; the study's file"
    ):
        chosen("time=5", "train.epochs=3")
    with pytest.raises(ValueError, match="--jobs 0 should be at least 1"):
        choose("slurm", [], threads=1, slots=0, out=tmp_path)
    with pytest.raises(ValueError, match="are for --executor slurm and ray"):
        choose("local", ["time=5"], threads=1, slots=None, out=tmp_path)


def test_a_task_is_lost_only_when_slurm_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = SimpleNamespace(job_id="7_1", paths=SimpleNamespace(result_pickle=tmp_path / "result"))
    clock, answer = [100.0], subprocess.CompletedProcess[str]([], 0, "7_1 RUNNING\n7_2 PENDING\n")
    monkeypatch.setattr(slurm.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(slurm.subprocess, "run", lambda *args, **options: answer)
    queue = Queue()

    def look(after: float, text: str, code: int = 0) -> int | None:
        nonlocal answer
        answer = subprocess.CompletedProcess([], code, text)
        clock[0] += after
        queue.look([task])
        return queue.result(task)

    assert look(0, "7_1 RUNNING\n7_2 PENDING\n") is None
    assert queue.is_running(task)
    assert look(60, "", code=1) is None  # no controller
    assert queue.is_running(task)
    assert look(60, "7_1 COMPLETED\n") is None  # its result may be on the way
    assert look(10, "7_1 PENDING\n") is None  # requeued
    assert look(60, "7_1 TIMEOUT\n") is None
    assert look(19, "") is None
    assert look(2, "") == DIED
