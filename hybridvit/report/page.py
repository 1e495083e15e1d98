"""What all files of a report are made from, and the offline HTML page."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hybridvit.report import comparisons, examples, leakage, provenance, tables, tuning
from hybridvit.report.arms import Arm, Comparison, compare, group
from hybridvit.report.caveats import caveats
from hybridvit.report.cost import matched
from hybridvit.report.plots import key, plots
from hybridvit.report.runs import Run, read_picture
from hybridvit.report.study import Plan, read_plan
from hybridvit.studies.status import clean

TEMPLATES = Path(__file__).parent / "templates"
MAX_PICTURES = 24
MAX_VERDICTS = 8  # in the answer; of more, the claims, and the others behind a fold
SECTIONS = (
    ("answer", "Answer"),
    ("results", "Results"),
    ("comparisons", "Comparisons"),
    ("disagreement", "Disagreement"),
    ("plots", "Plots"),
    ("reconstructions", "Reconstructions"),
    ("leakage", "Mixing and leakage"),
    ("tuning", "Tuning"),
    ("caveats", "What to doubt"),
    ("configs", "What differs"),
    ("provenance", "Provenance"),
)

Table = list[tuple[str, ...]]  # its first line holds the headings


@dataclass(frozen=True, eq=False)
class Report:
    """What all the files of a report are made from."""

    runs: Sequence[Run]
    out: Path  # folder that the files go to; run paths are shown relative to it
    title: str = ""
    question: str | None = None
    longer: str | None = None

    @cached_property
    def arms(self) -> list[Arm]:
        return group(self.runs)

    @cached_property
    def rows(self) -> list[tables.Row]:
        return tables.rows(self.arms)

    @cached_property
    def headline(self) -> list[str]:
        return tables.headline(self._comparisons)

    @cached_property
    def verdicts(self) -> list[tuple[str, str]]:
        return [(tables.subject(c), tables.in_words(c)) for c in self._comparisons]

    @cached_property
    def claims(self) -> list[tuple[str, str]]:
        """The verdicts that say that something is better or worse; all, where they are few."""
        if len(self.verdicts) <= MAX_VERDICTS:
            return self.verdicts
        pairs = zip(self.verdicts, self._comparisons, strict=True)
        return [v for v, c in pairs if c.difference and c.difference.verdict in ("better", "worse")]

    @cached_property
    def caveats(self) -> list[str]:
        return caveats(self.arms, self._comparisons, self.plan)

    @property
    def seeds(self) -> int | None:
        """The fewest of those that a comparison with an interval has; none where there is none."""
        found = [c.alone for c in self._comparisons if c.alone and c.alone.low is not None]
        return min((d.n for d in found), default=None)

    @cached_property
    def plan(self) -> Plan:
        return read_plan(self.runs)

    @cached_property
    def comparisons(self) -> Table:
        """Nothing where there are no comparisons."""
        smallest = self.plan.smallest_difference
        lines = comparisons.table(self._comparisons, self._pairs, smallest)
        return [comparisons.headings(smallest), *lines] if lines else []

    @cached_property
    def comparison_notes(self) -> list[str]:
        return comparisons.notes(self.comparisons[1:], self.plan.smallest_difference)

    @cached_property
    def disagreement(self) -> Table:
        """Where the sides of a comparison differ on single test images and in classes."""
        return examples.table(self._comparisons, self._pairs)

    @cached_property
    def disagreement_notes(self) -> list[str]:
        return examples.notes(self.disagreement)

    @cached_property
    def plots(self) -> list[dict[str, Any]]:
        return plots(self.arms, self.rows, self._comparisons, tuning.keys(self.plan.tuning))

    @cached_property
    def matched(self) -> str | None:
        """How equal the costs that the study matches came out."""
        return matched(self.arms, self.plan.match)

    @cached_property
    def leakage(self) -> Table:
        lines = leakage.table(self.arms)
        return [leakage.HEADINGS, *lines] if lines else []

    @cached_property
    def tuning(self) -> Table:
        """What each arm tried on validation, under headings; nothing where none did."""
        choices = self.plan.tuning
        return [tuning.HEADINGS, *tuning.table(choices)] if choices else []

    @cached_property
    def tuning_note(self) -> str:
        return tuning.note(self.plan.tuning)

    @cached_property
    def hint(self) -> str | None:
        return tables.longer_hint(self._comparisons, self.longer)

    @cached_property
    def facts(self) -> str:
        """How many runs of what on which data, in one line."""
        models = sum(1 for arm in self.arms if not arm.is_pixels)
        complete = sum(1 for run in self.runs if run.is_complete)
        names = dict.fromkeys(str(run.section("data").get("name", "?")) for run in self.runs)
        return (
            f"{len(self.runs)} runs ({complete} complete), {models} arms, data: {', '.join(names)}"
        )

    @property
    def labelled_runs(self) -> list[tuple[str, Run]]:
        return [(arm.label, run) for arm in self.arms for run in (*arm.runs, *arm.spare)]

    def text(self) -> str:
        """The plain-text table with verdicts and caveats."""
        command = f"{self.hint} {self.longer}" if self.hint else None
        return tables.plain_text(self.rows, self._comparisons, self.caveats, command)

    def relative(self, path: Path) -> str:
        """A path as seen from the report's folder."""
        try:
            return clean(os.path.relpath(path, self.out))
        except ValueError:  # another drive
            return clean(str(path))

    @cached_property
    def _comparisons(self) -> list[Comparison]:
        return compare(self.arms, tuning.keys(self.plan.tuning), self.plan.baseline)

    @cached_property
    def _pairs(self) -> list[examples.Paired | None]:
        return examples.all_paired(self._comparisons)


def render(report: Report) -> str:
    """The HTML page, with a policy under which nothing but its own two scripts runs."""
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    scripts = {"plotly": get_plotlyjs(), "script": _template("tables.js") + _template("plots.js")}
    sources = " ".join(f"'{_sha256(script)}'" for script in scripts.values())
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(TEMPLATES),
    )
    environment.filters["unbroken"] = _unbroken
    context = _context(report)
    return environment.get_template("report.html").render(
        policy=f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'",
        css=Markup(_template("report.css")),
        data=Markup(json_block([_drawn(plot) for plot in context["plots"]])),
        sections=[(id, name) for id, name in SECTIONS if context.get(id, True)],
        report=report,
        **context,
        **{name: Markup(script) for name, script in scripts.items()},
    )


def without_empty_columns(table: Table) -> Table:
    """The columns that have a text in any line."""
    kept = [i for i in range(len(table[0])) if any(line[i] for line in table[1:])] if table else []
    return [tuple(line[i] for i in kept) for line in table]


def _context(report: Report) -> dict[str, Any]:
    """What the template shows besides the report's own; sections by their ids."""
    models = [arm for arm in report.arms if not arm.is_pixels]
    pictures, left_out = _pictures(report)
    runs = report.labelled_runs
    return {
        "results": [tables.HEADINGS, *(row.cells() for row in report.rows)],
        "comparisons": without_empty_columns(report.comparisons),
        "disagreement": report.disagreement,
        "plots": report.plots,
        "key": key(report.arms),
        "reconstructions": pictures,
        "pictures_left_out": left_out,
        "leakage": report.leakage,
        "tuning": report.tuning,
        "mixing": leakage.pictures(models, MAX_PICTURES),
        "shades": [(f"{100 * c:g} %", leakage.opacity(c)) for c in (0.001, 0.01, 0.1, 1)],
        "caveats": report.caveats,
        "configs": provenance.differing(models),
        "same_configs": provenance.same(models),
        "runs": [provenance.RUN_HEADINGS, *provenance.run_table(runs, report.relative)],
        "made_with": provenance.made_with(report.runs),
        "protocols": provenance.protocols(report.runs),
        "commands": provenance.commands(runs, report.relative),
        "command_notes": provenance.command_notes(report.runs),
    }


def _drawn(plot: dict[str, Any]) -> dict[str, Any]:
    """What the script needs of a plot."""
    return {k: plot[k] for k in plot if k not in ("title", "note", "lines")}


def json_block(value: Any) -> str:
    """JSON that is safe inside a script element: no character in it can end or open a tag."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for c in "<>&\u2028\u2029":  # only ever inside of JSON strings
        text = text.replace(c, f"\\u{ord(c):04x}")
    return text


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _sha256(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()


def _pictures(report: Report) -> tuple[list[dict[str, Any]], int]:
    """The latest reconstructions of each arm's first run that has some; how many are left out."""
    found: list[dict[str, Any]] = []
    left_out = 0
    for arm in report.arms:
        for run in arm.runs:
            picture = read_picture(run)
            if picture is None:
                continue
            if len(found) == MAX_PICTURES:
                left_out += 1
                break
            path, content, rows = picture
            source = "data:image/png;base64," + base64.b64encode(content).decode("ascii")
            found.append(
                {
                    "label": arm.label,
                    "seed": run.seed,
                    "path": report.relative(path),
                    "rows": rows,
                    "source": source,
                }
            )
            break
    return found, left_out


def _unbroken(text: str) -> str:
    """A text whose numbers stay on a line with their signs and units."""
    return text.replace(" = ", "\u00a0=\u00a0").replace(" %", "\u00a0%")
