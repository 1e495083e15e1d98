"""SIGINT and SIGTERM ask for an end that saves."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from hybridvit.engine.ranks import lost

ASKING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_signals() -> Iterator[list[str]]:
    """A list that receives the name of a SIGINT or SIGTERM; a second one ends the process."""
    received: list[str] = []

    def note(number: int, _frame: object) -> None:
        received.append(signal.Signals(number).name)
        signal.signal(number, signal.default_int_handler)

    before = {s: signal.signal(s, note) for s in ASKING}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def blamed(signals: list[str]) -> Iterator[None]:
    """What fails inside once a signal has come is that signal's doing: a terminal's Ctrl-C also
    ends the compilers that torch has started, and who ends a job its decode workers, too; torch
    then raises an error of theirs. Not so where another rank has ended, for which torchrun ends
    this one."""
    try:
        yield
    except Exception as error:  # raised again, as an error or as the signal's doing
        if signals and not lost(error):
            raise KeyboardInterrupt from error
        raise


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM as Ctrl-C, so that no record stays open and no job is left behind; and Ctrl-C
    itself, which a process that was started in the background ignores otherwise."""
    before = {s: signal.signal(s, signal.default_int_handler) for s in ASKING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
