"""The commands: the arguments of each, and beside them what it does and prints.

A command imports what it needs as it runs, so that `--help` is immediate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from hybridvit.launcher import tells

if TYPE_CHECKING:
    from hybridvit.config import RunConfig

# argparse has no public name for it.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run = Callable[[argparse.Namespace], int]  # to the exit code


def add(commands: Commands, run: Run) -> argparse.ArgumentParser:
    """A new command, of its function's name and docstring."""
    name, text = run.__name__.removeprefix("_"), run.__doc__
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def takes_config(command: argparse.ArgumentParser) -> None:
    """A config and overrides of its values."""
    command.add_argument("config", help="a YAML file, or the name of a shipped one")
    takes_overrides(command, "key.path=value")


def takes_overrides(command: argparse.ArgumentParser, metavar: str) -> None:
    """Values at the end of the command line."""
    command.add_argument("overrides", nargs="*", default=[], metavar=metavar)


def warn_of_precision(*configs: RunConfig) -> None:
    """Tell of configs in a precision that this machine is slow in."""
    from hybridvit.engine.device import bf16_slowdown

    found = sorted({c.train.precision for c in configs} - {"fp32"})
    slowdown = bf16_slowdown() if found and tells() else None
    if slowdown is not None:
        print(
            f"warning: train.precision={' and '.join(found)}: this CPU takes {slowdown:.0f} times "
            "as long for matrix products in bf16 as in float32; set train.precision=fp32",
            file=sys.stderr,
        )
