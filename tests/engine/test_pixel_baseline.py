from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from hybridvit.config import load
from hybridvit.engine.pixels import pixel_baseline
from hybridvit.evaluation import probes


def test_a_signal_closes_the_record_and_the_same_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)  # the handler runs before it is over

    out = tmp_path / "pixels"
    out.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(probes, "logistic_regression", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pixel_baseline(load("digits.yaml"), out)
    assert json.loads((out / "run.json").read_text())["status"] == "stopped"
    assert not (out / "summary.json").exists()
    assert pixel_baseline(load("digits.yaml"), out).status == "complete"


def test_an_error_is_in_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(probes, "logistic_regression", fail)
    out = tmp_path / "pixels"
    out.mkdir()
    with pytest.raises(MemoryError):
        pixel_baseline(load("digits.yaml"), out)
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "failed"
    assert record["error"] == "MemoryError: no room"
