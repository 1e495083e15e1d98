"""The report as Markdown, CSV and LaTeX, escaped for each."""

from __future__ import annotations

import csv
import io
import re

from hybridvit.report.page import Report, Table, without_empty_columns
from hybridvit.report.tables import HEADINGS

TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}
# Of a run, in results.csv.
COSTS = ("parameters", "flops", "training_flops", "train_seconds", "images")
MARKDOWN = re.compile(r"([\\`*_\[\]#|~<>&])")


def markdown(report: Report) -> str:
    """Answer, table, caveats and runs."""
    lines = [f"# {_md(report.title)}", ""]
    if report.question:
        lines += [_md(report.question), ""]
    facts = [report.facts, *([report.matched] if report.matched else [])]
    lines += [f"{_md('. '.join(facts))}.", "", "## Answer", ""]
    lines += [_md(sentence) + "\n" for sentence in report.headline]
    lines += [f"- {_md(subject)}: **{_md(words)}**" for subject, words in report.verdicts]
    if report.hint:
        lines += ["", f"{_md(report.hint)} {_md(report.longer or '')}"]
    results = [HEADINGS, *(row.cells() for row in report.rows)]
    lines += ["", "## Results", "", *_table(results)]
    if report.comparisons:
        lines += ["", "## Comparisons", "", *map(_md, report.comparison_notes), ""]
        lines += _table(without_empty_columns(report.comparisons))
    if report.disagreement:
        lines += ["", "## Where they disagree", "", *map(_md, report.disagreement_notes), ""]
        lines += _table(report.disagreement)
    for plot in report.plots:
        if plot.get("lines"):
            lines += ["", f"## {_md(plot['title'])}", "", *(f"- {_md(x)}" for x in plot["lines"])]
    if report.leakage:
        lines += ["", "## Mixing and leakage", "", *_table(report.leakage)]
    if report.tuning:
        lines += ["", "## Tuning", "", _md(report.tuning_note), "", *_table(report.tuning)]
    if report.caveats:
        lines += ["", "## What to doubt", "", *(f"- {_md(c)}" for c in report.caveats)]
    runs: Table = [
        ("run", "arm", "seed", "status", "hash"),
        *(
            (report.relative(run.path), label, str(run.seed), run.status, run.hash)
            for label, run in report.labelled_runs
        ),
    ]
    lines += ["", "## Runs", "", *_table(runs)]
    return "\n".join(lines) + "\n"


def results_csv(report: Report) -> str:
    """A line for each run and result, fractions in full precision, with what the run cost; an empty
    result where there is none. `flops` are those of one image, forward."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("run", "hash", "seed", "arm", "status", "metric", "value", *COSTS))
    for label, run in report.labelled_runs:
        known = [report.relative(run.path), run.hash, run.seed, label, run.status]
        costs = [getattr(run, name) for name in COSTS]
        for metric, value in run.results.items() or (("", None),):
            cells = [*known, metric, value, *costs]
            writer.writerow(_cell(c) if isinstance(c, str) else c for c in cells)
    return file.getvalue()


def latex(report: Report) -> str:
    """The main table as a `tabular` without packages."""
    lines = [r"\begin{tabular}{ll" + "r" * (len(HEADINGS) - 2) + "}", r"\hline"]
    lines += [" & ".join(map(_tex, HEADINGS)) + r" \\", r"\hline"]
    lines += [" & ".join(_tex(c) or "--" for c in row.cells()) + r" \\" for row in report.rows]
    return "\n".join([*lines, r"\hline", r"\end{tabular}"]) + "\n"


def _md(text: str) -> str:
    return MARKDOWN.sub(r"\\\1", text)


def _table(table: Table) -> list[str]:
    heading, *lines = ("| " + " | ".join(map(_md, cells)) + " |" for cells in table)
    return [heading, "|" + " --- |" * len(table[0]), *lines]


def _cell(text: str) -> str:
    # A spreadsheet takes a text that starts like this for a formula and runs it.
    return "'" + text if text.startswith(("=", "+", "-", "@")) else text


def _tex(text: str) -> str:
    return "".join(TEX.get(c, c) for c in text)
