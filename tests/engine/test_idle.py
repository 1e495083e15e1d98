from __future__ import annotations

import multiprocessing
import time
from multiprocessing.synchronize import Event

import pytest
import torch

from hybridvit.engine import idle as module
from hybridvit.engine.idle import alone, busy_seconds, check_idle, own_seconds


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """CPU seconds that all processes have taken: the last of a list."""
    seconds = [100.0]
    monkeypatch.setattr(module, "busy_seconds", lambda: seconds[-1])
    monkeypatch.setattr(module, "own_seconds", lambda: 0.0)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return seconds


def test_a_busy_machine_is_refused(monkeypatch: pytest.MonkeyPatch, load: list[float]) -> None:
    check_idle()
    clock = iter([100.0, 100.4])
    monkeypatch.setattr(module, "busy_seconds", lambda: next(clock))
    with pytest.raises(ValueError, match=r"other processes use 80 % of a core"):
        check_idle(0.5)


def test_load_before_or_meanwhile_is_refused(load: list[float]) -> None:
    with alone(beside_load=False):
        pass
    with pytest.raises(ValueError, match="other processes use"), alone(beside_load=False):
        load.append(101.0)
    with alone(beside_load=True):
        load.append(200.0)


def test_a_tick_in_a_short_time_is_no_load(load: list[float]) -> None:
    with alone(beside_load=False):
        load.append(100.02)


def test_what_this_process_takes_is_not_of_others() -> None:
    before, mine = busy_seconds(), own_seconds()
    if before == 0:
        pytest.skip("no /proc/stat here")
    x = torch.randn(400, 400)
    while own_seconds() - mine < 0.1:
        x = (x @ x).tanh()
    assert busy_seconds() - before > 0.08


def _burn(done: Event, end: Event) -> None:
    while time.process_time() < 0.3:
        pass
    done.set()
    end.wait(60)


def test_workers_are_not_others_alive_or_ended() -> None:
    context = multiprocessing.get_context("fork")
    done, end = context.Event(), context.Event()
    before = own_seconds()
    process = context.Process(target=_burn, args=(done, end))
    process.start()
    assert done.wait(60)
    assert own_seconds() - before > 0.25
    end.set()
    process.join()
    assert own_seconds() - before > 0.25
