"""Mixing and leakage as a report shows them: table, pictures, curves, warnings."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from run_directories import leakage_of, write_run

from hybridvit.report import find_runs, text_table, write_report
from hybridvit.report.arms import compare, group
from hybridvit.report.caveats import caveats
from hybridvit.report.leakage import leaked, measured, opacity, pictures, table

SEALED = {"tokens": 0.0, "outputs": 0.0, "gradient": 0.0}
OPEN = {"tokens": 0.25, "outputs": 1.0, "gradient": 0.125}


def page_of(root: Path) -> str:
    return write_report(find_runs([root]), root / "out", title="t").read_text("utf-8")


def plots_of(page: str) -> dict[str, Any]:
    (data,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    return {plot["id"]: plot for plot in json.loads(data)}


def test_the_table_keeps_mixing_and_leakage_apart(tmp_path: Path) -> None:
    write_run(tmp_path, "linear")
    sealed = {"leakage": leakage_of("conv", hidden=SEALED)}
    write_run(tmp_path, "conv", "mae", record=sealed, summary=sealed)
    leaking = {"leakage": leakage_of("resnet", hidden=OPEN)}
    write_run(tmp_path, "resnet", "mae", record=leaking)
    cells = {row[0]: row[1:] for row in table(group(find_runs([tmp_path])))}
    local, mixes = ("1 of 16", "1 of 16", "0", "0"), ("7 of 16", "7 of 16", "25", "25")
    assert cells == {
        "linear / supervised": (*local, "hides nothing"),
        "conv / mae": (*mixes, "0"),
        "resnet / mae": (*mixes, "25 % / 100 %"),
    }


def test_a_run_that_leaks_is_the_gravest_caveat(tmp_path: Path) -> None:
    write_run(tmp_path, "conv", "mae", 0, {"test/knn": 0.5})
    for seed in (0, 1):
        open_run = {"leakage": leakage_of("resnet", hidden=OPEN)}
        write_run(tmp_path, "resnet", "mae", seed, {"test/knn": 0.5}, record=open_run)
    write_run(tmp_path, "linear", "mae", record={"status": "diverged", "error": "loss is nan"})
    arms = group(find_runs([tmp_path]))
    first, *others = caveats(arms, compare(arms))
    assert first.startswith("resnet / mae leaks: pixels that it hides reach 25 % of its tokens")
    assert "100 % of its predictions (12.5 % of their squared gradient)" in first
    assert not any("leaks" in other for other in others)
    assert "Caveat: resnet / mae leaks" in text_table(find_runs([tmp_path]))
    assert "resnet / mae leaks: pixels that it hides reach 25\u00a0% of" in page_of(tmp_path)
    assert "resnet / mae leaks" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("when", ["record", "summary"])
def test_a_leak_of_one_seed_before_or_after_training_is_one(tmp_path: Path, when: str) -> None:
    sealed = {"leakage": leakage_of("conv", hidden=SEALED)}
    for seed in (0, 1):
        hidden = SEALED | {"outputs": 1e-4} if seed else SEALED
        now = {"leakage": leakage_of("conv", hidden=hidden)}
        both = {"record": sealed, "summary": sealed} | {when: now}
        write_run(tmp_path, "conv", "mae", seed, {"test/knn": 0.5}, **both)
    arms = group(find_runs([tmp_path]))
    assert "reach 0 % of its tokens and 0.01 % of its predictions" in caveats(arms, [])[0]


def test_a_leak_that_only_gradients_show_is_one(tmp_path: Path) -> None:
    straight_through = {"leakage": leakage_of("conv", hidden=SEALED | {"gradient": 0.5})}
    write_run(tmp_path, "conv", "mae", record=straight_through)
    arms = group(find_runs([tmp_path]))
    assert "(50 % of their squared gradient)" in caveats(arms, [])[0]


def test_runs_that_hide_and_seal_or_hide_nothing_have_no_such_caveat(tmp_path: Path) -> None:
    write_run(tmp_path, "conv", "mae", record={"leakage": leakage_of("conv", hidden=SEALED)})
    write_run(tmp_path, "conv")
    arms = group(find_runs([tmp_path]))
    assert not any("leak" in text for text in caveats(arms, compare(arms)))
    assert [leaked(arm.first) for arm in arms] == [(0.0, 0.0, 0.0), None]


def test_the_picture_is_the_recorded_grid(tmp_path: Path) -> None:
    write_run(tmp_path, "conv")
    text = page_of(tmp_path)
    drawn = re.findall(r"<svg class=\"heat\".*?</svg>", text, re.DOTALL)
    assert len(drawn) == 2
    for one in drawn:
        svg = ElementTree.fromstring(one)
        cells = [e.attrib for e in svg if "class" not in e.attrib]
        strong = {(int(c["x"]), int(c["y"])) for c in cells if float(c["fill-opacity"]) > 0}
        assert len(cells) == 16
        assert strong == {(x, y) for x in (1, 2, 3) for y in (1, 2, 3)}
        (edited,) = (e.attrib for e in svg if "class" in e.attrib)
        assert (edited["x"], edited["y"]) == ("2", "2")
    assert "12.5 %</title>" in drawn[0]


def test_shades_are_even_in_the_logarithm() -> None:
    assert opacity(0) == 0
    assert opacity(1) == opacity(7) == 1
    assert opacity(1e-9) == opacity(1e-3) == 0.05
    assert opacity(0.1) == pytest.approx(2 / 3, abs=0.01)
    assert opacity(0.01) == pytest.approx(1 / 3, abs=0.01)


def test_curves_by_distance_show_fresh_and_trained(tmp_path: Path) -> None:
    write_run(tmp_path, "linear")
    write_run(tmp_path, "conv")
    plots = plots_of(page_of(tmp_path))
    moved = plots["plot-tokens-moved-by-editing-one-patch"]["data"]
    gradient = plots["plot-squared-gradient-of-a-token"]["data"]
    assert [t["x"] for t in moved] == [[0, 1, 2, 3]] * 4
    by_name = {t["text"][0].split("<br>")[0]: t["y"] for t in moved}
    assert by_name["conv / supervised, fresh"] == [100, 100, 0, 0]
    assert by_name["linear / supervised, trained"] == [100, 0, 0, 0]
    assert [t["y"][1] for t in gradient] == [25.0, 25.0, 0, 0]
    assert [t["line"]["dash"] for t in gradient] == ["dot", "solid"] * 2


def test_runs_from_before_the_meter_are_read_and_have_no_section(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    for name in ("run.json", "summary.json"):
        content = json.loads((path / name).read_text())
        del content["leakage"]
        (path / name).write_text(json.dumps(content))
    text = page_of(tmp_path)
    assert 'id="leakage"' not in text
    assert "Mixing" not in (tmp_path / "out" / "report.md").read_text()
    assert "plot-tokens-moved-by-editing-one-patch" not in plots_of(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"mixing": [1, 2]},
        {"mixing": {"moved": "<b>all</b>", "picture": "x" * 99, "tokens": True}},
        {"mixing": {"moved_by_distance": [1, "2"], "jacobian_by_distance": {"0": 1}}},
        {"mixing": {"picture": [[0.1, 0.2], [0.3]], "moved": math.nan, "tokens": 1e400}},
        {"mixing": {"picture": [[0.1] * 100] * 100, "moved_by_distance": [0.1] * 9999}},
        {"mixing": {"picture": [[-1.0]], "jacobian_by_distance": [-5.0, math.inf]}},
        {"mixing": {"picture": [[]], "jacobian_outside": None}},
        {"hidden": "all", "mixing": None},
        {"hidden": {"tokens": "1", "outputs": [1]}},
    ],
)
def test_unsound_records_are_left_out(tmp_path: Path, changes: dict[str, Any]) -> None:
    leakage = leakage_of("conv")
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(leakage[key], dict):
            leakage[key] |= value
        else:
            leakage[key] = value
    path = write_run(tmp_path, "conv", results={"test/accuracy": 0.5})
    for name in ("run.json", "summary.json"):
        content = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(content | {"leakage": leakage}))
    text = page_of(tmp_path)
    assert "<b>" not in text.split("<script", 1)[0]
    assert len(text) - len(page_of_nothing(tmp_path)) < 30_000
    found = measured(find_runs([tmp_path])[0], "fresh")
    if found is not None:
        numbers = (found.tokens, found.moved, found.outside)
        assert all(x is None or math.isfinite(x) for x in numbers)
        assert all(len(row) <= 32 for row in found.picture)


def page_of_nothing(tmp_path: Path) -> str:
    write_run(tmp_path / "other", "conv", results={"test/accuracy": 0.5}, record={"leakage": {}})
    return page_of(tmp_path / "other")


def test_only_so_many_arms_have_a_picture(tmp_path: Path) -> None:
    for patch in range(30):
        write_run(tmp_path, config={"stem": {"args": {"patch_px": patch}}})
    arms = group(find_runs([tmp_path]))
    assert len(pictures(arms, 24)) == 24
    assert len(table(arms)) == 30


def test_other_normalisation_in_compared_arms_is_told(tmp_path: Path) -> None:
    for stem, mean in (("linear", 0.5), ("conv", 0.48)):
        path = write_run(tmp_path, stem, results={"test/accuracy": 0.5})
        record = json.loads((path / "run.json").read_text())
        record["model"]["normalisation"] = {"mean": [mean] * 3, "std": [0.2] * 3}
        (path / "run.json").write_text(json.dumps(record))
    arms = group(find_runs([tmp_path]))
    text = "\n".join(caveats(arms, compare(arms)))
    assert "conv / supervised and linear / supervised normalise images with other means" in text
    write_run(tmp_path / "old", "linear", results={"test/accuracy": 0.5})
    write_run(tmp_path / "old", "conv", results={"test/accuracy": 0.5})
    arms = group(find_runs([tmp_path / "old"]))
    assert "normalise" not in "\n".join(caveats(arms, compare(arms)))
