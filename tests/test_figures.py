"""The figures of studies' READMEs."""

from __future__ import annotations

import csv
import importlib.util
import shutil
from pathlib import Path

import pytest
from PIL import Image

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SPEC = importlib.util.spec_from_file_location("figures", EXPERIMENTS / "figures.py")
assert SPEC is not None
assert SPEC.loader is not None
figures = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(figures)


def rows_of(study: str) -> list[dict[str, str]]:
    with (EXPERIMENTS / study / "results.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["metric"] == "test/accuracy"]


@pytest.mark.parametrize("study", figures.FIGURES)
def test_every_run_is_a_point(study: str) -> None:
    rows = rows_of(study)
    figure = figures.FIGURES[study][1](rows)
    points = [y for trace in figure.data if "markers" in trace.mode for y in trace.y]
    assert sorted(points) == pytest.approx(sorted(100 * float(row["value"]) for row in rows))
    name = figures.FIGURES[study][0]
    assert f"(figures/{name}.png)" in (EXPERIMENTS / study / "README.md").read_text()


def test_lines_go_through_the_means() -> None:
    values = {"token / 0.1": (0.5, 0.7), "mean / 0.1": (0.2, 0.2), "token / 0.01": (0.1, 0.3)}
    rows = [{"arm": arm, "value": str(v)} for arm, both in values.items() for v in both]
    figure = figures.lines(rows, series=0, title="rate")
    drawn = {t.name: dict(zip(t.x, t.y, strict=True)) for t in figure.data if t.mode == "lines"}
    assert drawn["token"] == pytest.approx({0.01: 20.0, 0.1: 60.0})
    assert drawn["mean"] == pytest.approx({0.1: 20.0})


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to draw it")
def test_a_picture_is_drawn(tmp_path: Path) -> None:
    folder = tmp_path / "0006-shape"
    (folder / "figures").mkdir(parents=True)
    shutil.copy(EXPERIMENTS / folder.name / "results.csv", folder)
    with Image.open(figures.draw(folder)) as image:
        colours = image.convert("RGB").getcolors(1 << 20)
    assert colours is not None
    for code in figures.COLOURS:
        wanted = tuple(bytes.fromhex(code[1:]))
        assert any(count > 20 and colour == wanted for count, colour in colours)
