"""Contestants in processes of their own: turns in order, nothing beside them, and what is kept."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import run
from cases import CASES, PEAK
from contestant import Process, session_seconds


class Fake:
    """A contestant without a process."""

    log: list[str]

    def __init__(self, case: str, name: str, contestant: object, folder: Path) -> None:
        self.name = name

    def ask(self, *, do: str, **request: Any) -> dict[str, Any]:
        self.log.append(f"{do} {self.name}")
        if self.name == "timm fp32":
            return {"skipped": "timm is not installed"}
        answers = {"build": {}, "turn": {"rate": 10.0 + len(self.log)}}
        return answers.get(do, {"memory_bytes": 1, "flops_per_image": 100.0})

    def cpu_seconds(self) -> float:
        return 0.0

    def close(self) -> None:
        self.log.append(f"close {self.name}")

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    Fake.log = []
    monkeypatch.setattr(run, "Process", Fake)
    monkeypatch.setattr(run, "bf16_slowdown", lambda: None)
    return Fake.log


def test_contestants_take_turns(log: list[str]) -> None:
    found = run.measure("supervised-32-4", 2, 0.1, beside_load=True)
    names = [name for name in CASES["supervised-32-4"].contestants if name != "timm fp32"]
    assert [entry for entry in log if entry.startswith("turn")] == [f"turn {n}" for n in names] * 2
    assert found["skipped"] == {"timm fp32": "timm is not installed"}
    assert set(found["contestants"]) == set(names)
    whats = [row["against"] for row in found["rows"]]
    assert not any("fp32" in what for what in whats)  # its row has nothing to say
    assert "close ours" in log


def test_a_machine_without_bf16_measures_the_rest(
    log: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step would take minutes there, and say nothing."""
    monkeypatch.setattr(run, "bf16_slowdown", lambda: 100.0)
    monkeypatch.setattr(Fake, "ask", lambda self, **request: {"rate": 1.0})
    found = run.measure("supervised-32-4", 1, 0.1, beside_load=True)
    assert set(found["contestants"]) == {"timm fp32", "ours fp32"}
    assert found["skipped"] == dict.fromkeys(
        ("ours", "timm", "timm best", "our products", "matrix product"),
        "this CPU is far slower in bf16 than in float32",
    )
    assert [row["what"] for row in found["rows"]] == ["supervised step, 32/4, fp32"]
    assert set(run.measure("input-flip", 1, 0.1, beside_load=True)["skipped"]) == set()
    assert run.main(["--case", "mae-32-4", "--beside-load"]) == 2
    told = capsys.readouterr().err
    assert "mae-32-4: no contestant can be measured: this CPU is far slower in bf16" in told


def test_a_line_is_appended(log: list[str], tmp_path: Path) -> None:
    out = tmp_path / "new" / "results.jsonl"
    arguments = ["--case", "mae-utilisation-32-4", "--rounds", "3", "--beside-load"]
    for _ in range(2):
        assert run.main([*arguments, "--out", str(out)]) == 0
    first, second = map(json.loads, out.read_text().splitlines())
    assert first["case"] == second["case"] == "mae-utilisation-32-4"
    assert len(second["contestants"]["ours"]["rates"]) == 3
    assert {"date", "machine", "code", "packages", "rows", "skipped"} <= set(second)
    assert run.main(["--case", "supervised-32-4", "--beside-load", "--out", str(out)]) == 1


def test_a_disturbed_turn_is_taken_again(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    busy = iter([0.0, 100.0, 200.0, 200.0])  # CPU seconds of all, before and after a turn
    monkeypatch.setattr(run, "busy_seconds", lambda: next(busy))
    monkeypatch.setattr(run, "settle", lambda: None)
    process: Any = Fake("supervised-32-4", "ours", None, Path())
    rate, others = run.turn(process, 0.1, beside_load=False)
    assert rate == 12.0  # of the second
    assert others <= 0.15


def test_lasting_load_is_refused(
    log: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "settle", lambda: None)
    monkeypatch.setattr(run, "check_unused", lambda: None)
    monkeypatch.setattr(run, "busy_seconds", lambda: 1000 * time.perf_counter())
    assert run.main(["--case", "supervised-32-4", "--case", "mae-32-4"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2  # one case's mistake does not stop the next
    assert "other processes use" in lines[0]


def test_a_worker_waits_without_working(tmp_path: Path) -> None:
    """The real thing: a process that builds, takes a turn, and sleeps until the next."""
    contestant = CASES["start-up"].contestants["help"]
    with closing(Process("start-up", "help", contestant, tmp_path)) as process:
        assert process.ask(do="build") == {}
        assert 0.01 < process.ask(do="turn", seconds=0)["rate"] < 1000
        took = process.cpu_seconds()
        assert took > 0.1
        time.sleep(0.5)
        assert process.cpu_seconds() - took <= 0.05
        assert process.ask(do="report")["memory_bytes"] > 1e7
    assert process.process.returncode == 0


def test_a_worker_that_dies_is_skipped(tmp_path: Path) -> None:
    with closing(Process("supervised-32-4", "nobody", PEAK, tmp_path)) as process:
        assert "KeyError" in process.ask(do="build")["skipped"]
        process.process.kill()
        assert "ended" in process.ask(do="build")["skipped"]


def test_cpu_time_of_a_session_counts_children() -> None:
    burn = "import time\nwhile time.process_time() < 0.2: pass"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}]); input()"
    with subprocess.Popen(
        ["python3", "-c", script], stdin=subprocess.PIPE, start_new_session=True
    ) as parent:
        deadline = time.monotonic() + 20
        while session_seconds(parent.pid) < 0.19 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert session_seconds(parent.pid) >= 0.19
        parent.communicate(b"\n")


def test_a_turn_begins_when_the_last_has_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A contestant is this process's child, and its work counts, for the next one's turn comes."""
    burn = "import time\nwhile time.process_time() < 1.5: pass"
    with subprocess.Popen([sys.executable, "-c", burn], start_new_session=True) as contestant:

        def busy_seconds() -> float:  # of a machine on which nothing else runs
            return session_seconds(contestant.pid) + time.process_time()

        monkeypatch.setattr(run, "busy_seconds", busy_seconds)
        with monkeypatch.context() as patch:
            patch.setattr(run, "SETTLING", 0)
            with pytest.raises(ValueError, match="% of a core"):
                run.settle()
        run.settle()
        assert session_seconds(contestant.pid) >= 1.5 or contestant.poll() == 0
