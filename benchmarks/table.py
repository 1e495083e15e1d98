"""Write the table of the README from the newest line of each case: python benchmarks/table.py"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import results
from cases import CASES, Row

FOLDER = Path(__file__).parent
BEGIN = "<!-- made by table.py from results/; do not edit below -->\n"
END = "<!-- end of what table.py made -->"


def main() -> int:
    """Rewrite the machine-made part of the README."""
    readme = FOLDER / "README.md"
    readme.write_text(with_tables(readme.read_text(), sorted((FOLDER / "results").glob("*.jsonl"))))
    return 0


def with_tables(text: str, files: list[Path]) -> str:
    """The README's text with the tables of these files of results."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    tables = "\n".join(device_table(file.stem, newest(file)) for file in files)
    return f"{before}{BEGIN}\n{tables or 'Nothing has been measured.' + chr(10)}\n{END}{after}"


def newest(file: Path) -> dict[str, dict[str, Any]]:
    """The last line of each case, in the cases' order."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    last = {line["case"]: line for line in lines}
    return {case: last[case] for case in CASES if case in last}


def device_table(device: str, lines: dict[str, dict[str, Any]]) -> str:
    """A heading, the machine, the rows and the rates of one device."""
    head = [f"### {device}", ""]
    machines = {words(line) for line in lines.values()}
    head += [*(f"{text}." for text in sorted(machines)), ""]
    head += ["| what | against | measured | goal | reached | rounds | date, commit |"]
    head += ["|---|---|---|---|---|---|---|"]
    body = [cells(row, line) for case, line in lines.items() for row in CASES[case].rows]
    missing = [text for case, line in lines.items() for text in without(case, line["skipped"])]
    return "\n".join([*head, *body, "", *missing, *([""] if missing else []), *rates(lines), ""])


def without(case: str, skipped: dict[str, str]) -> list[str]:
    """A sentence for each reason why contestants are missing."""
    names: dict[str, list[str]] = {}
    for name, why in skipped.items():
        names.setdefault(why, []).append(name)
    return [f"Without {', '.join(those)} in `{case}`: {why}." for why, those in names.items()]


def cells(row: Row, line: dict[str, Any]) -> str:
    """A row of the table."""
    values = results.of_rounds(row, line["contestants"])
    goal = "" if row.goal is None else f"{number(row, row.goal)}"
    commit = f"{line['date'][:10]}, {(line['code']['commit'] or 'no checkout')[:8]}"
    commit += " and changes" if line["code"]["dirty"] else ""
    measured, reached = "missing", ""
    if values is not None:
        found = results.spread(values)
        texts = {key: number(row, found[key]) for key in ("median", "min", "max")}
        measured = f"**{texts['median']}** [{texts['min']}, {texts['max']}]"
        reached = {True: "yes", False: "no", None: ""}[results.reached(row, found["median"])]
    rounds = f"{line['rounds']} x {line['seconds']:g} s"
    return f"| {row.what} | {row.against} | {measured} | {goal} | {reached} | {rounds} | {commit} |"


def rates(lines: dict[str, dict[str, Any]]) -> list[str]:
    """What each contestant reached by itself."""
    head = ["| case | contestant | median [least, most] | memory | |", "|---|---|---|---|---|"]
    return head + [
        f"| `{case}` | {name} | {rate(found)} | {found['memory_bytes'] / 2**30:.2f} GiB | "
        f"{accuracy(found)} |"
        for case, line in lines.items()
        for name, found in line["contestants"].items()
    ]


def rate(found: dict[str, Any]) -> str:
    """A rate and its spread; seconds of a process."""
    values = sorted(found["rates"])
    factor, unit = {"images/s": (1.0, "images/s"), "FLOP/s": (1e-9, "GFLOP/s")}.get(
        found["unit"], (1.0, "s")
    )
    if unit == "s":
        values = sorted(1 / value for value in values)
    low, high = (f"{factor * values[end]:,.4g}" for end in (0, -1))
    return f"{factor * median(values):,.4g} [{low}, {high}] {unit}"


def accuracy(found: dict[str, Any]) -> str:
    """How often a whole training was right on the test images, where it is one."""
    return f"test accuracy {median(found['accuracy']):.1%}" if "accuracy" in found else ""


def number(row: Row, value: float) -> str:
    """A value with its unit."""
    if row.kind == "ratio":
        return f"{value:.2f}x"
    if row.kind in ("utilisation", "share"):
        return f"{value:.1%}"
    if row.kind == "rate":
        return f"{value:,.0f} images/s"
    return f"{value:.2f} s" + (" above" if row.kind == "seconds above" else "")


def words(line: dict[str, Any]) -> str:
    """Machine and versions in words."""
    machine, packages = line["machine"], line["packages"]
    parts = [
        *([machine["gpu"]] if machine["gpu"] else []),
        f"{machine['cpu']} {machine.get('generation', '')}".strip(),
        f"{machine['cores']} cores ({', '.join(machine['flags'])})",
        f"{machine['memory_gb']:g} GB",
        f"Python {line['python']}",
        *(f"{name} {packages[name]}" for name in ("torch", "timm", "lightly", "transformers")),
    ]
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
