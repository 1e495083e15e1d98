"""Jobs of executor tests, importable where they run. None needs torch."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from hybridvit.studies.executors import THREADS


def leave(code: int) -> None:
    """End with an exit code."""
    sys.exit(code)


def die() -> None:
    """As when the kernel ends a process for its memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def stay(folder: Path, name: str, seconds: float) -> None:
    """Write down when it was here and with which GPU and threads."""
    start = time.time()
    time.sleep(seconds)
    seen = [os.environ.get(key, "") for key in ("CUDA_VISIBLE_DEVICES", *THREADS)]
    (folder / name).write_text(" ".join([f"{start} {time.time()}", *seen]))


def count(file: Path, goal: int) -> None:
    """Count tenths of a second; asked to end it saves, and called again it goes on."""
    number = int(file.read_text().split()[0]) if file.exists() else 0
    calls = int(file.read_text().split()[1]) + 1 if file.exists() else 1
    try:
        while number < goal:
            time.sleep(0.1)
            number += 1
            if number % 10 == 0:  # seen from outside, and what a killed one goes on from
                _write(file, number, calls)
    except KeyboardInterrupt:
        _write(file, number, calls)
        time.sleep(0.5)  # saving takes its time
        (file.parent / f"{file.name}.saved").touch()
        sys.exit(1)
    _write(file, number, calls)


def _write(file: Path, number: int, calls: int) -> None:
    temporary = file.parent / f".{file.name}"
    temporary.write_text(f"{number} {calls}")
    temporary.rename(file)
