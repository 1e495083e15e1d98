"""The report's files: one offline HTML page, and the same as Markdown, CSV and LaTeX."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hybridvit.report import comparisons, examples, leakage, tables, tuning
from hybridvit.report.arms import Arm, Comparison, compare, group, varying
from hybridvit.report.caveats import caveats, environment
from hybridvit.report.cost import matched
from hybridvit.report.plots import key, plots
from hybridvit.report.runs import Plan, Run, clean, read_picture, read_plan

TEMPLATES = Path(__file__).parent / "templates"
MAX_PICTURES = 24
NOTHING = "\u2013"  # in an empty cell
SECTIONS = (
    ("answer", "Answer"),
    ("results", "Results"),
    ("comparisons", "Comparisons"),
    ("plots", "Plots"),
    ("reconstructions", "Reconstructions"),
    ("leakage", "Mixing and leakage"),
    ("tuning", "Tuning"),
    ("caveats", "What to doubt"),
    ("configs", "What differs"),
    ("provenance", "Provenance"),
)


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
    def caveats(self) -> list[str]:
        return caveats(self.arms, self._comparisons, self.plan.tuning)

    @cached_property
    def plan(self) -> Plan:
        return read_plan(self.runs)

    @cached_property
    def comparisons(self) -> list[tuple[str, ...]]:
        """Headings and lines of the table of comparisons; nothing where there are none."""
        smallest = self.plan.smallest_difference
        lines = comparisons.table(self._comparisons, smallest)
        return [comparisons.headings(smallest), *lines] if lines else []

    @cached_property
    def comparison_notes(self) -> list[str]:
        return comparisons.notes(self.comparisons[1:], self.plan.smallest_difference)

    @cached_property
    def disagreements(self) -> list[str]:
        """Where the sides of a comparison differ on single test images."""
        found = (examples.disagreement(c) for c in self._comparisons)
        return [sentence for sentence in found if sentence is not None]

    @cached_property
    def plots(self) -> list[dict[str, Any]]:
        return plots(self.arms, self.rows, self._comparisons)

    @cached_property
    def matched(self) -> str | None:
        """How equal the costs that the study matches came out."""
        return matched(self.arms, self.plan.match)

    @cached_property
    def leakage(self) -> list[tuple[str, ...]]:
        return leakage.table(self.arms)

    @cached_property
    def tuning(self) -> list[tuple[str, ...]]:
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
        return compare(self.arms, tuning.keys(self.plan.tuning))


def render(report: Report) -> str:
    """The HTML page, with a policy under which nothing but its own two scripts runs."""
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    made = report.plots
    pictures, left_out = _pictures(report)
    scripts = {"plotly": get_plotlyjs(), "script": _template("report.js")}
    sources = " ".join(f"'{_sha256(script)}'" for script in scripts.values())
    models = [arm for arm in report.arms if not arm.is_pixels]
    page = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    ).from_string(_template("report.html"))
    context: dict[str, Any] = {
        "policy": f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'",
        "title": report.title,
        "question": report.question,
        "facts": report.facts,
        "matched": report.matched,
        "headline": report.headline,
        "verdicts": [(who, _unbroken(words)) for who, words in report.verdicts],
        "hint": report.hint,
        "longer": report.longer,
        "caveats": [_unbroken(caveat) for caveat in report.caveats],
        "headings": tables.HEADINGS,
        "rows": report.rows,
        "comparisons": report.comparisons,
        "comparison_notes": report.comparison_notes,
        "disagreements": report.disagreements,
        "plots": made,
        "key": key(report.arms),
        "pictures": pictures,
        "pictures_left_out": left_out,
        "leakage_headings": leakage.HEADINGS,
        "leakage": report.leakage,
        "tuning": report.tuning,
        "tuning_note": report.tuning_note,
        "mixing": leakage.pictures(models, MAX_PICTURES),
        "shades": [(f"{100 * c:g} %", leakage.opacity(c)) for c in (0.001, 0.01, 0.1, 1)],
        "differing": _differing(models),
        "model_labels": [arm.label for arm in models],
        "provenance": _provenance(report),
        "made_with": _made_with(report.runs),
        "protocols": _protocols(report.runs),
        "commands": _commands(report),
        "css": Markup(_template("report.css")),
        "data": Markup(json_block([{k: plot[k] for k in plot if k != "lines"} for plot in made])),
        **{name: Markup(script) for name, script in scripts.items()},
    }
    shown = {
        "plots": made,
        "reconstructions": pictures or left_out,
        "comparisons": report.comparisons,
        "leakage": report.leakage,
        "tuning": report.tuning,
        "caveats": report.caveats,
        "configs": context["differing"],
    }
    context["sections"] = [(id, name) for id, name in SECTIONS if shown.get(id, True)]
    return page.render(context)


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
            path, content = picture
            source = "data:image/png;base64," + base64.b64encode(content).decode("ascii")
            found.append(
                {
                    "label": arm.label,
                    "seed": run.seed,
                    "path": report.relative(path),
                    "source": source,
                }
            )
            break
    return found, left_out


def _differing(arms: Sequence[Arm]) -> dict[str, list[str]]:
    values = varying([arm.first for arm in arms])
    return {k: [NOTHING if v is None else _value(v) for v in row] for k, row in values.items()}


def _unbroken(text: str) -> str:
    """A text whose numbers stay on a line with their signs and units."""
    return text.replace(" = ", "\u00a0=\u00a0").replace(" %", "\u00a0%")


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _provenance(report: Report) -> list[dict[str, Any]]:
    lines = []
    for label, run in report.labelled_runs:
        code = run.section("code")
        results = [_unbroken(f"{k}: {100 * v:.1f} %") for k, v in run.results.items()]
        lines.append(
            {
                "path": report.relative(run.path),
                "label": label,
                "seed": run.seed,
                "status": run.status,
                "results": results or [NOTHING],
                "hash": run.hash,
                "commit": str(code.get("commit") or "none")[:12],
                "dirty": code.get("dirty") is True,
                "started": str(run.record.get("started", NOTHING))[:10],
            }
        )
    return lines


def _made_with(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Each item of the environment, with the number of runs where they differ."""
    made_with = [environment(run) for run in runs]
    lines = []
    for name in dict.fromkeys(k for env in made_with for k in env if k != "commit"):
        values = Counter(env.get(name, "none") for env in made_with)
        several = len(values) > 1
        texts = (f"{v} ({n} runs)" if several else v for v, n in values.most_common())
        lines.append((name, "; ".join(texts)))
    return lines


def _protocols(runs: Sequence[Run]) -> list[tuple[str, str]]:
    found: dict[tuple[str, str], None] = {}
    for run in runs:
        protocol = run.summary.get("protocol")
        if isinstance(protocol, dict):
            found.update({(k, _value(v)): None for k, v in protocol.items()})
    return sorted(found)


def _commands(report: Report) -> str:
    configs = (
        report.relative(run.path / "config.yaml")
        for _, run in report.labelled_runs
        if run.kind == "train"
    )
    return "\n".join(f"hybridvit train {shlex.quote(config)}" for config in configs)
