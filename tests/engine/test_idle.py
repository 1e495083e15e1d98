from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hybridvit.engine import idle as module
from hybridvit.engine.idle import (
    Busy,
    alone,
    busy_seconds,
    check_idle,
    check_unused,
    own_seconds,
)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """CPU seconds that all processes have taken, then that this one has."""
    seconds = [100.0, 0.0]
    monkeypatch.setattr(module, "busy_seconds", lambda: seconds[0])
    monkeypatch.setattr(module, "own_seconds", lambda: seconds[1])
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return seconds


def test_a_busy_machine_is_refused(monkeypatch: pytest.MonkeyPatch, load: list[float]) -> None:
    check_idle()
    clock = iter([100.0, 100.4])
    monkeypatch.setattr(module, "busy_seconds", lambda: next(clock))
    with pytest.raises(Busy, match=r"other processes use 80 % of a core"):
        check_idle(0.5)


@pytest.fixture
def smi(
    tmp_path: Path, load: list[float], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Path]:
    """A stand-in for nvidia-smi that says something, and notes what it was asked."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def saying(text: str) -> Path:
        script, asked = tmp_path / "nvidia-smi", tmp_path / "asked"
        script.write_text(f"#!/bin/sh\necho $* >> {asked}\necho '{text}'\n")
        script.chmod(0o755)
        return asked

    return saying


def test_a_busy_gpu_is_refused(smi: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = smi("73")
    with pytest.raises(Busy, match=r"other processes use the GPU 73 % of the time"):
        check_unused()
    assert asked.read_text().splitlines()[0].split()[:2] == [
        "--id=0",
        "--query-gpu=utilization.gpu",
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # runs use the CPU
    check_unused()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    smi("4")
    check_unused()
    assert asked.read_text().splitlines()[-1].startswith("--id=3 ")


def test_a_gpu_that_has_just_been_used_is_waited_for(smi: Callable[[str], Path]) -> None:
    asked = smi("73")
    script = asked.with_name("nvidia-smi")
    script.write_text(
        f"#!/bin/sh\necho >> {asked}\nwc -l < {asked} | grep -q 1 && echo 90 || echo 0\n"
    )
    check_unused()
    assert len(asked.read_text().splitlines()) == 2


@pytest.mark.parametrize("said", ["[N/A]", "", "No devices were found"])
def test_a_gpu_of_which_nothing_is_known_is_not(said: str, smi: Callable[[str], Path]) -> None:
    smi(said)
    check_unused()


def adding(load: list[float], *others: float, own: float = 0.0) -> Callable[[], int]:
    """A measurement beside which others take so many CPU seconds, the first time, the second..."""
    calls: Iterator[tuple[int, float]] = iter(enumerate(others))

    def measure() -> int:
        number, seconds = next(calls)
        load[0] += own + seconds
        load[1] += own
        return number

    return measure


def test_what_is_disturbed_is_measured_again(load: list[float]) -> None:
    assert alone(adding(load, 0.0), beside_load=False) == 0
    assert alone(adding(load, 1.0, 2.0, 0.0), beside_load=False) == 2
    assert alone(adding(load, 9.0), beside_load=True) == 0
    with pytest.raises(Busy, match="other processes use 400 %"):
        alone(adding(load, 1.0, 1.0, 2.0), beside_load=False)


def test_a_tick_in_a_short_time_is_no_load(load: list[float]) -> None:
    assert alone(adding(load, 0.02), beside_load=False) == 0


def test_how_a_process_that_takes_all_cores_is_counted_is_no_load(load: list[float]) -> None:
    assert alone(adding(load, 0.5, own=60.0), beside_load=False) == 0


def test_a_mistake_is_not_tried_again(load: list[float]) -> None:
    calls = []

    def measure() -> None:
        calls.append(1)
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        alone(measure, beside_load=False)
    assert len(calls) == 1


@pytest.fixture
def on_linux() -> None:
    if busy_seconds() == 0:
        pytest.skip("no /proc/stat here")


@pytest.mark.usefixtures("on_linux")
def test_both_counts_have_what_this_process_takes() -> None:
    busy, mine, took = busy_seconds(), own_seconds(), time.process_time()
    x = torch.randn(400, 400)
    while time.process_time() - took < 0.3:
        x = (x @ x).tanh()
    took = time.process_time() - took
    assert own_seconds() - mine == pytest.approx(took, abs=0.1)
    assert busy_seconds() - busy > took - 0.1


@pytest.mark.usefixtures("on_linux")
def test_what_this_process_started_is_not_of_others() -> None:
    """Of a child, as of its own children; while they live, and when they have ended."""
    burn = "import time\nwhile time.process_time() < 0.2: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])\n{burn}"
    script = f"{parent}\nprint(flush=True); input()"
    before = own_seconds()
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert own_seconds() - before > 0.35
        child.communicate(b"\n")
    assert own_seconds() - before > 0.35
