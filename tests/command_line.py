"""Commands that are run within a test."""

from __future__ import annotations

import pytest

from hybridvit.cli import main

TINY = ["encoder.args.dim=16", "encoder.args.depth=1", "encoder.args.heads=2", "train.epochs=1"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that must end with exit code 2."""
    try:
        code = main(list(arguments))
    except SystemExit as end:
        code = int(end.code or 0)
    printed = capsys.readouterr()
    assert code == 2, printed
    lines = printed.err.splitlines()
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("hybridvit: ")
    assert printed.out == ""
    return lines[0]
