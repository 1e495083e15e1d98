"""The runner's end of a worker process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from cases import Contestant
from settings import environment

WORKER = Path(__file__).with_name("worker.py")
CLOSING = 5  # seconds to end by itself


class Process:
    """A contestant in a process and session of its own; its errors go to a file in `folder`."""

    def __init__(self, case: str, name: str, contestant: Contestant, folder: Path) -> None:
        self.name = name
        self.errors = folder / f"{name}.err"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(WORKER), case, name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment(),
                text=True,
                start_new_session=True,
            )

    def ask(self, **request: Any) -> dict[str, Any]:
        """A request and its answer: why not, as `skipped`, where the process cannot or is gone."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            lines = self.errors.read_text(errors="replace").strip().splitlines()
            return {"skipped": f"ended: {lines[-1] if lines else 'without a word'}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def cpu_seconds(self) -> float:
        """CPU time that the processes of its session have taken, with those that have ended."""
        return session_seconds(self.process.pid)

    def close(self) -> None:
        """End the process and all that it started."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it may have ended before
            self.process.stdin.close()
        try:
            self.process.wait(CLOSING)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def session_seconds(session: int) -> float:
    """CPU time of the living processes of a session and of their children that have ended."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in parentheses may hold spaces.
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[3]) == session:
            ticks += sum(map(int, fields[11:15]))  # user, system, and both of its children
    return ticks / os.sysconf("SC_CLK_TCK")
