"""What a launcher of several processes, such as torchrun, says of this one; known without torch."""

from __future__ import annotations

import os
import sys

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def check_launcher() -> None:
    """See whether what a launcher of several processes sets is what it sets.

    Raises:
        ValueError: one of its variables is no number.
    """
    for name in VARIABLES:
        said = os.environ.get(name, "0")
        if not (said.isascii() and said.isdecimal()):
            raise ValueError(
                f"the environment variable {name}={said!r} should be a whole number, which "
                "torchrun sets; unset it"
            )


def wanted() -> int:
    """How many processes a launcher has started for this command.

    Raises:
        ValueError: its variable is no such number.
    """
    said = os.environ.get("WORLD_SIZE", "1")
    if not (said.isascii() and said.isdecimal() and int(said)):
        raise ValueError(
            f"the environment variable WORLD_SIZE={said!r} should be the number of processes that "
            "a launcher has started, 1 or more; start them by torchrun, or unset it"
        )
    return int(said)


def check_alone() -> None:
    """See whether what takes one process was started as one.

    Raises:
        ValueError: a launcher has started several.
    """
    if wanted() > 1:
        raise ValueError(
            f"WORLD_SIZE={wanted()} asks for several processes, and only `hybridvit train` takes "
            "more than one; start this without torchrun (the cells of a study run side by side on "
            "several GPUs)"
        )


def tells() -> bool:
    """Whether this process tells of mistakes. Until ranks have joined, all make the same ones."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if alone or os.environ.get("RANK", "0") == "0":
        return True
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()
