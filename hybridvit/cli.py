"""The command line: parses, calls a command, and tells of mistakes in one line."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import gc
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import NoReturn

from hybridvit.commands.parts import add_parts
from hybridvit.commands.studies import add_studies
from hybridvit.commands.training import EXIT_CODES, add_training
from hybridvit.launcher import check_launcher, tells
from hybridvit.version import __version__

USER_ERROR = 2
# Seconds in which rank 0 tells of a mistake: once one rank has ended, torchrun ends the others.
SILENCE = 5


def program() -> NoReturn:
    """`main` as a program. It leaves Python without taking it apart, which lasts a second or two
    where torch was imported."""
    # What torch's C++ warns of passes by Python's filters; it reads this when it is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Imports make half a million objects that stay. Looking through all of them for garbage, time
    # and again, takes a sixth of a start; what is young is looked through as ever.
    gc.set_threshold(*gc.get_threshold()[:2], 1000)
    code = main()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # of a full disk or a closed pipe `main` has told
            stream.flush()
    os._exit(code)


def main(argv: list[str] | None = None) -> int:
    """Run a command; user mistakes end in one line and exit code 2."""
    arguments = parse(argv)
    # What libraries warn of is not for the user of a command; tests see every warning.
    warnings.filterwarnings("ignore", module=r"(torch|lightning|timm|sklearn|PIL)")
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        check_launcher()
        code = run(arguments)
        sys.stdout.flush()
        return code
    except ValueError as error:
        if tells():
            print(f"hybridvit: {' '.join(str(error).split())}", file=sys.stderr)
        else:
            time.sleep(SILENCE)
        return USER_ERROR
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        text = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        if error.errno == errno.ENOSPC:
            text = text.removeprefix(f"[Errno {errno.ENOSPC}] ")
            text += "; free some space and run the same command again"
        print(f"hybridvit: {text}", file=sys.stderr)
        return USER_ERROR
    except (RuntimeError, MemoryError) as error:
        if not _told_out_of_memory(error):
            raise
        return USER_ERROR
    except KeyboardInterrupt:
        print("hybridvit: stopped", file=sys.stderr)
        return EXIT_CODES["stopped"]


def _told_out_of_memory(error: Exception) -> bool:
    from hybridvit.engine.device import out_of_memory

    if not out_of_memory(error):
        return False
    print(
        "hybridvit: out of memory; set train.accumulate higher, train.grad_checkpointing=true or "
        "train.batch_size lower (hybridvit bench CONFIG --find-batch-size tells what fits)",
        file=sys.stderr,
    )
    return True


class _Parser(argparse.ArgumentParser):
    """Argument errors in one line, as all others."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"hybridvit: {message}; see {self.prog} --help\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments of a command; overrides may also stand behind options, where argparse alone does
    not take them."""
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(r.startswith("-") for r in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def parser() -> argparse.ArgumentParser:
    """All commands."""
    top: argparse.ArgumentParser = _Parser(
        prog="hybridvit",
        description="Pure and hybrid vision transformers: swap the stem, swap the objective, "
        "compare honestly.",
    )
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for add_group in (add_training, add_studies, add_parts):
        add_group(commands)
    return top


if __name__ == "__main__":
    program()
