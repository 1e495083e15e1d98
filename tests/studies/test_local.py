from __future__ import annotations

import dataclasses
import itertools
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
import torch
from executor_jobs import die, leave, stay
from executor_seen import Seen, wait_for

from hybridvit.engine.runlog import cores
from hybridvit.studies.executors import Job, local
from hybridvit.studies.executors.local import Local, Running, place
from hybridvit.studies.facts import known
from hybridvit.studies.grid import read_study
from hybridvit.studies.needs import GPU_BYTES, GPU_FACTOR, needs
from hybridvit.studies.tuning import tuning_cells

HERE = Path(__file__).parent


def job(name: str, memory: int | None = None, cores: int | None = None) -> Job:
    return Job(name, leave, (0,), cores=cores, memory=memory)


def running(*given: tuple[int | None, int]) -> list[Running]:
    """Jobs of a memory on a GPU."""
    return [Running(job(str(i), m), cast("local.ForkServerProcess", None), gpu)
            for i, (m, gpu) in enumerate(given)]  # fmt: skip


def test_jobs_go_where_most_memory_is_left() -> None:
    free = [10, 16]
    assert place(job("a", 5), [], free, in_turn=False) == 1
    assert place(job("a", 5), running((8, 1)), free, in_turn=False) == 0
    assert place(job("a", 5), running((8, 1), (6, 0)), free, in_turn=False) == 1
    assert place(job("a", 9), running((8, 1), (6, 0)), free, in_turn=False) is None
    # One of unknown memory has its GPU for itself, and so has one that is too large for any.
    for lonely in (None, 99):
        assert place(job("a", lonely), [], free, in_turn=False) in (0, 1)
        assert place(job("a", lonely), running((1, 0)), free, in_turn=False) == 1
        assert place(job("a", lonely), running((1, 0), (1, 1)), free, in_turn=False) is None
        assert place(job("a", 1), running((lonely, 0)), free, in_turn=False) == 1
        beside = place(job("a", 1), running((lonely, 0), (lonely, 1)), free, in_turn=False)
        assert beside is None
    # With --jobs, memory does not matter.
    assert place(job("a", 99), running((1, 0), (1, 1), (1, 0)), free, in_turn=True) == 1


def test_no_gpu_ever_holds_more_than_fits() -> None:
    draw = random.Random(0)
    for _ in range(300):
        free = [draw.randint(0, 20) for _ in range(draw.randint(1, 3))]
        at_work: list[Running] = []
        for i in range(20):
            if at_work and draw.random() < 0.4:
                at_work.pop(draw.randrange(len(at_work)))
            new = job(str(i), draw.choice([None, *range(25)]))
            gpu = place(new, at_work, free, in_turn=False)
            there = {g: [r.job.memory for r in at_work if r.gpu == g] for g in range(len(free))}
            fitting = [
                g for g, taken in there.items()
                if not taken or (new.memory is not None and None not in taken
                                 and sum(map(int, [*taken, new.memory])) <= free[g])
            ]  # fmt: skip
            if gpu is None:
                # A job of no memory may also stand beside one of unknown memory.
                assert not fitting
            else:
                assert gpu in fitting or new.memory == 0
                at_work += [dataclasses.replace(running((0, gpu))[0], job=new)]


def overlap(a: Path, b: Path) -> bool:
    (start, end), (other, last) = (map(float, p.read_text().split()[:2]) for p in (a, b))
    return start < last and other < end


def test_jobs_share_gpus_and_cores_as_they_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    executor = Local(threads=1)
    executor.gpus, executor.cores = 2, 5
    monkeypatch.setattr(executor, "_free", lambda jobs: [10, 10])
    # Two fit side by side, one has the other GPU for itself, the next waits for one of them, and
    # so does what needs four cores.
    wanted = [("a", 5, 1), ("b", None, 1), ("c", 5, 1), ("d", 6, 1), ("e", 0, 4)]
    jobs = [
        Job(name, stay, (tmp_path, name, 1.0), memory=memory, cores=cores)
        for name, memory, cores in wanted
    ]
    executor.run(jobs, watch=lambda names: None, ended=lambda name, code: None)
    seen = {name: tmp_path / name for name, *_ in wanted}
    gpus = {name: path.read_text().split()[2] for name, path in seen.items()}
    assert gpus["a"] == gpus["c"] != gpus["b"]
    assert set(gpus.values()) == {"3", "7"}
    assert all(overlap(seen[x], seen[y]) for x, y in itertools.combinations("abc", 2))
    assert not overlap(seen["d"], seen["a"]) or not overlap(seen["d"], seen["b"])
    assert sum(overlap(seen["e"], seen[name]) for name in "abc") < 2
    threads = [path.read_text().split()[3:] for path in seen.values()]
    assert threads == [["1", "1"]] * len(seen)  # of libraries, and of torch.compile


def test_jobs_end_with_their_codes_and_in_their_order(tmp_path: Path) -> None:
    jobs = [
        Job("fails", leave, (3,)),
        Job("dies", die, ()),
        Job("last", stay, (tmp_path, "last", 0.1), after="long"),
        Job("long", stay, (tmp_path, "long", 1.0)),
    ]
    seen = Seen()
    Local(threads=1).run(jobs, watch=seen.watch, ended=seen.ended)
    assert seen.codes == {"fails": 3, "dies": -signal.SIGKILL, "long": 0, "last": 0}
    assert not overlap(tmp_path / "long", tmp_path / "last")


def test_ctrl_c_lets_jobs_save_and_leaves_none_behind(tmp_path: Path) -> None:
    driver = [sys.executable, str(HERE / "executor_driver.py"), "local", str(tmp_path)]
    with subprocess.Popen(driver) as process:
        wait_for(lambda: len(list(tmp_path.glob("[0-9]"))) >= 1)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    running = {path.name for path in tmp_path.glob("[0-9]")}
    assert {path.stem for path in tmp_path.glob("*.saved")} == running


def test_a_broken_cell_is_left_to_say_so_itself(tmp_path: Path) -> None:
    axes = "axes: {data: {there: {}, absent: {data: {name: cifar10, args: {root: nowhere}}}}}"
    text = f"{{title: T, question: Q, config: digits.yaml, {axes}, seeds: [0]}}"
    (tmp_path / "study.yaml").write_text(text)
    study = read_study(tmp_path, [])
    found = needs(study, tmp_path / "out", gpu=True)
    assert [found[c.name].cores for c in study.cells] == [1, 1]


def test_large_resident_sets_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridvit.studies.needs.stored_bytes", lambda split: 5 << 30)
    axes = "axes: {data: {kept: {data: {resident: true}}, read: {data: {resident: false}}}}"
    text = f"{{title: T, question: Q, config: digits.yaml, {axes}, seeds: [0]}}"
    (tmp_path / "study.yaml").write_text(text)
    kept, read = needs(read_study(tmp_path, []), tmp_path / "out", gpu=True).values()
    assert (kept.memory or 0) - (read.memory or 0) == 4 << 30


def test_tuning_runs_take_the_memory_of_their_arm(tmp_path: Path) -> None:
    axes = "axes: {width: {narrow: {}, wide: {encoder: {args: {dim: 384}}}}}"
    text = f"{{title: T, question: Q, config: digits.yaml, {axes}, seeds: [0], "
    (tmp_path / "study.yaml").write_text(text + "tune: {optim.lr: [0.001, 0.01]}}")
    study = read_study(tmp_path, [])
    trials = dataclasses.replace(study, cells=[c for arm in tuning_cells(study) for c in arm])
    of_seeds = [n.memory for n in needs(study, tmp_path / "out", gpu=True).values()]
    of_trials = [n.memory for n in needs(trials, tmp_path / "out", gpu=True).values()]
    assert of_trials == [of_seeds[0], of_seeds[0], of_seeds[1], of_seeds[1]]
    assert GPU_BYTES < (of_seeds[0] or 0) < (of_seeds[1] or 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.skipif(cores() < 2, reason="one core")
def test_two_jobs_share_this_gpu(tmp_path: Path) -> None:
    executor = Local(threads=1)
    jobs = [Job(name, stay, (tmp_path, name, 3.0), memory=1 << 30) for name in "ab"]
    assert all(free > 0 for free in executor._free(jobs))
    executor.gpus = 1
    executor.run(jobs, watch=lambda names: None, ended=lambda name, code: None)
    assert overlap(tmp_path / "a", tmp_path / "b")


def test_cells_need_their_threads_and_their_decoders(tmp_path: Path) -> None:
    axes = "axes: {data: {fits: {}, streams: {data: {resident: false, workers: 3}}}}"
    text = f"{{title: T, question: Q, config: digits.yaml, {axes}, seeds: [0], pixels: true}}"
    (tmp_path / "study.yaml").write_text(text.replace("seeds", "threads: 2, seeds"))
    study = read_study(tmp_path, [])
    found = needs(study, tmp_path / "out", gpu=True)
    assert [found[c.name].cores for c in study.cells] == [2, 2, 5]
    pixels, *trained = (found[c.name].memory for c in study.cells)
    assert pixels == 0
    facts = known(study.arms(), {})
    assert trained == [int(GPU_FACTOR * (f.memory or 0)) + GPU_BYTES for f in facts]
    assert {n.memory for n in needs(study, tmp_path / "out", gpu=False).values()} == {None, 0}


SERVER = """
import signal
from multiprocessing.forkserver import _forkserver
from hybridvit.studies.executors.local import start_server
start_server()
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
print(open(f"/proc/{_forkserver._forkserver_pid}/status").read())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_the_server_of_cells_does_not_heed_ctrl_c_as_it_starts() -> None:
    done = subprocess.run([sys.executable, "-c", SERVER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ignored = int(done.stdout.partition("SigIgn:")[2].split()[0], 16)
    assert ignored & 1 << (signal.SIGINT - 1)
