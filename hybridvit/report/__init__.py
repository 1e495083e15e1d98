"""Reports on run directories. Reads no checkpoint and imports no torch, so that a report opens fast
and runs of old versions stay readable."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hybridvit.report.page import Report, render
from hybridvit.report.runs import Run, find_runs, read_run
from hybridvit.report.study import find_study

__all__ = ["Run", "find_runs", "find_study", "read_run", "text_table", "write_report"]


def write_report(
    runs: Sequence[Run],
    out: Path,
    *,
    title: str,
    question: str | None = None,
    longer: str | None = None,
) -> Path:
    """Write report.html, report.md, results.csv and table.tex to the folder `out`.

    `longer` is a command to suggest where training is not shown to beat the untrained encoder.
    Returns the path of the HTML page.

    Raises:
        ValueError: there are no runs, or `out` is a file.
    """
    from hybridvit.report.files import latex, markdown, results_csv

    if not runs:
        raise ValueError("no runs to report on; give run directories or folders of them")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder for the report's files")
    report = Report(runs, out, title, question, longer)
    files = {
        "report.md": markdown(report),
        "results.csv": results_csv(report),
        "table.tex": latex(report),
        "report.html": render(report),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        # Titles may hold half a surrogate pair, which UTF-8 cannot write.
        (out / name).write_bytes(text.encode("utf-8", "replace"))
    return out / "report.html"


def text_table(runs: Sequence[Run], longer: str | None = None) -> str:
    """The results for a terminal, at most 120 columns: table, verdicts, caveats.

    Raises:
        ValueError: there are no runs.
    """
    if not runs:
        raise ValueError("no runs to report on; give run directories or folders of them")
    return Report(runs, Path(), longer=longer).text()
