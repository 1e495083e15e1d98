"""Rates become rows, rows a table, and the README holds the newest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import machine
import pytest
import results
import table
from cases import CASES, Row

RATES = {
    "a": {"rates": [20.0, 30.0, 60.0], "flops_per_image": 5.0},
    "b": {"rates": [10.0, 10.0, 20.0], "flops_per_image": 2.0},
}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("ratio", [2, 3, 3]),
        ("utilisation", [5, 7.5, 7.5]),  # 100 / 20, ...
        ("share", [10, 15, 15]),
        ("rate", [20, 30, 60]),
        ("seconds", [1 / 20, 1 / 30, 1 / 60]),
        ("seconds above", [1 / 20 - 1 / 10, 1 / 30 - 1 / 10, 1 / 60 - 1 / 20]),
    ],
)
def test_a_row_is_of_rounds(kind: Any, expected: list[float]) -> None:
    found = results.of_rounds(Row("", "", kind, "a", "b"), RATES)
    assert found == pytest.approx(expected)


def test_a_row_without_its_contestant() -> None:
    assert results.of_rounds(Row("", "", "ratio", "a", "c"), RATES) is None


def test_spread() -> None:
    assert results.spread([3.0, 1.0, 2.0, 9.0]) == {"median": 2.5, "min": 1.0, "max": 9.0}


def test_goals_are_reached_from_their_side() -> None:
    ratio, seconds = (Row("", "", kind, "a", "b", 2.0) for kind in ("ratio", "seconds"))
    assert results.reached(ratio, 2.0)
    assert not results.reached(ratio, 1.9)
    assert results.reached(seconds, 2.0)
    assert not results.reached(seconds, 2.1)
    assert results.reached(Row("", "", "ratio", "a", "b"), 1.0) is None


def line(case: str, rates: list[float], without: tuple[str, ...] = ()) -> str:
    names = [name for name in CASES[case].contestants if name not in without]
    found = {"rates": rates, "unit": "runs/s", "flops_per_image": 1e9, "memory_bytes": 2**30}
    content = {
        "case": case,
        **machine.describe(),
        "code": {"commit": "0123456789abcdef", "dirty": case == "start-up"},
        "rounds": len(rates),
        "seconds": 10.0,
        "contestants": dict.fromkeys(names, found),
        "skipped": dict.fromkeys(without, "it is not installed"),
    }
    return json.dumps(content) + "\n"


def test_the_table_is_of_the_newest_lines(tmp_path: Path) -> None:
    file = tmp_path / "cpu-9-cores.jsonl"
    file.write_text(
        line("start-up", [10.0, 10.0])
        + line("supervised-32-4", [1.0, 2.0], without=("timm best", "timm fp32"))
        + line("start-up", [4.0, 5.0, 8.0])
    )
    text = table.with_tables(f"before\n{table.BEGIN}old\n{table.END}\nafter\n", [file])
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "### cpu-9-cores" in text
    assert "01234567 and changes |" in next(x for x in text.splitlines() if "hybridvit list" in x)
    assert "01234567 |" in next(x for x in text.splitlines() if "supervised step" in x)
    help_row = next(row for row in text.splitlines() if row.startswith("| hybridvit --help"))
    assert "**0.20 s** [0.12 s, 0.25 s] | 0.30 s | yes | 3 x 10 s" in help_row
    assert "| `start-up` | list | 0.2 [0.125, 0.25] s | 1.00 GiB |  |" in text
    assert text.index("supervised step") < text.index("--help")  # in the cases' order
    assert "| missing | 1.15x |" in text
    assert "Without timm best, timm fp32 in `supervised-32-4`: it is not installed." in text
    assert table.with_tables(text, [file]) == text


def test_the_readme_is_up_to_date() -> None:
    files = sorted((table.FOLDER / "results").glob("*.jsonl"))
    text = (table.FOLDER / "README.md").read_text()
    assert table.with_tables(text, files) == text, "run: python benchmarks/table.py"


def test_a_device_has_a_short_name() -> None:
    cpu = {"gpu": None, "cores": 2, "generation": "family 6 model 143"}
    assert machine.name(cpu) == "cpu-2-cores-family-6-model-143"
    assert machine.name(cpu | {"generation": ""}) == "cpu-2-cores"
    assert machine.name({"gpu": "NVIDIA H200", "cores": 16}) == "h200"
    assert machine.name({"gpu": "NVIDIA A100-SXM4-80GB", "cores": 16}) == "a100-sxm4-80gb"


def test_the_generation_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\nflags\t\t: avx2 amx_tile\n"
    monkeypatch.setattr(machine, "cpuinfo", lambda: text)
    assert machine.generation() == "family 26 model 2"
    assert machine.flags() == ["avx2", "amx_tile"]
    monkeypatch.setattr(machine, "cpuinfo", lambda: "")
    assert (machine.generation(), machine.flags()) == ("", [])
