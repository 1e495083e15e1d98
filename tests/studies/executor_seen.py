"""What tests of executors share."""

from __future__ import annotations

import time
from collections.abc import Callable


class Seen:
    """What an executor has reported."""

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}
        self.running: set[str] = set()

    def watch(self, names: list[str]) -> None:
        self.running |= set(names)

    def ended(self, name: str, code: int) -> None:
        assert name not in self.codes
        self.codes[name] = code


def wait_for(happens: Callable[[], bool], seconds: float = 60.0) -> None:
    """Until it happens."""
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.1)
