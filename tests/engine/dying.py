"""Processes that end without a word; without torch, so that they start at once."""

import os
import signal
import sys


def killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stopped(*_: object) -> None:
    sys.exit(3)
