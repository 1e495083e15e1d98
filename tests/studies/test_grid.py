from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hybridvit.config import resolved
from hybridvit.engine.checkpoint import read_weights
from hybridvit.studies import grid
from hybridvit.studies.cells import run_study, select
from hybridvit.studies.grid import read_study

STUDY = """
title: T
question: Q
config: digits.yaml
axes:
  stem:
    linear: {}
    coarse: {stem: {name: linear, args: {patch: 4}}}
  lr:
    low: {optim: {lr: 1e-4}}
    high: {optim: {lr: 1e-3}}
seeds: [0, 1]
pixels: true
"""
TINY = [
    "encoder.args.dim=8",
    "encoder.args.depth=1",
    "encoder.args.heads=1",
    "train.epochs=1",
    "train.log_every=5",
]


def write(folder: Path, text: str = STUDY) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "study.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("override", ["seed=99", "train.threads=7"])
def test_what_the_study_sets_itself_is_no_override(tmp_path: Path, override: str) -> None:
    text = "{title: T, question: Q, config: digits.yaml, axes: {a: {b: {}}}}"
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(ValueError, match="is the study's own; use"):
        read_study(tmp_path, [override])


@pytest.mark.parametrize(
    "axes",
    [
        "{a: {b: {seed: 5}}}",
        "{a: {b: {train: {threads: 2}}}}",
        "{a: {b: {}}}, stages: {s: {seed: 1}}",
        "{a: {b: {s: {seed: 1}}}}, stages: {s: {}}",
    ],
)
def test_nor_does_an_axis_or_a_stage_set_it(tmp_path: Path, axes: str) -> None:
    (tmp_path / "study.yaml").write_text(
        f"{{title: T, question: Q, config: digits.yaml, axes: {axes}}}"
    )
    with pytest.raises(ValueError, match="is the study's own; use"):
        read_study(tmp_path, [])


def test_cells_are_the_product_of_axes_and_seeds(tmp_path: Path) -> None:
    study = read_study(write(tmp_path / "0009-mine"), TINY)
    assert study.name == "0009-mine"
    assert [c.name.rpartition("-")[0] for c in study.cells] == ["pixels"] + [
        f"{stem}-{lr}-seed{seed}"
        for stem in ("linear", "coarse")
        for lr in ("low", "high")
        for seed in (0, 1)
    ]
    last = study.cells[-1]
    assert last.arm == {"stem": "coarse", "lr": "high"}
    assert (last.config.stem.args["patch"], last.config.optim.lr, last.config.seed) == (4, 1e-3, 1)
    assert {c.config.encoder.args["dim"] for c in study.cells} == {8}
    assert {c.config.train.threads for c in study.cells} == {1}


def test_cells_differ_only_where_the_axes_and_seeds_say(tmp_path: Path) -> None:
    cells = read_study(write(tmp_path), TINY).cells[1:]

    def flat(section: dict[str, object], path: str = "") -> dict[str, object]:
        out: dict[str, object] = {}
        for key, value in section.items():
            out |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
        return out

    first = flat(resolved(cells[0].config))
    allowed = {"seed", "optim.lr", "stem.args.patch"}
    for cell in cells[1:]:
        other = flat(resolved(cell.config))
        assert {k for k in first if first[k] != other[k]} <= allowed


def test_finished_cells_are_skipped_and_a_broken_one_does_not_stop_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = STUDY.replace("seeds: [0, 1]", "seeds: [0]")
    text = text.replace("lr: 1e-4", "lr: 1e30, name: sgd, clip_norm: null, warmup_epochs: 0")
    study = read_study(write(tmp_path / "s", text), TINY)
    out = tmp_path / "out"
    failed = run_study(study, out)
    assert sorted(f.rpartition("-")[0] for f in failed) == ["coarse-low-seed0", "linear-low-seed0"]
    assert "not finite" in capsys.readouterr().err
    status = {
        folder.name.rpartition("-")[0]: json.loads((folder / "run.json").read_text())["status"]
        for folder in out.iterdir()
    }
    assert status == {
        "pixels": "complete",
        "linear-low-seed0": "diverged",
        "coarse-low-seed0": "diverged",
        "linear-high-seed0": "complete",
        "coarse-high-seed0": "complete",
    }
    (folder,) = out.glob("linear-high-seed0-*")
    record = json.loads((folder / "run.json").read_text())
    assert record["arm"] == {"stem": "linear", "lr": "high"}
    assert record["hardware"]["threads"] == 1

    files = list(out.glob("*/run.json"))
    times = {p: p.stat().st_mtime_ns for p in files}
    assert run_study(study, out) == [c.name for c in study.cells if "-low-" in c.name]
    printed = capsys.readouterr().out
    assert "3 of 5 cells are complete" in printed
    assert "2 failed or diverged before; --retry-failed runs them again" in printed
    assert {p: p.stat().st_mtime_ns for p in files} == times
    assert len(run_study(study, out, only="linear-low", retry_failed=True)) == 1
    again = {p for p in files if p.stat().st_mtime_ns != times[p]}
    assert [p.parent.name.rpartition("-")[0] for p in again] == ["linear-low-seed0"]

    # The same cells are a part of another study, under other axes.
    text = text.replace("  stem:", "  token:").replace("    linear: {}", "    fine: {}")
    other = read_study(write(tmp_path / "other", text.replace("pixels: true", "")), TINY)
    assert run_study(other, tmp_path / "more", only="high") == []
    assert "2 of 4 cells are complete, 2 of them from other studies" in capsys.readouterr().out
    (twin,) = (tmp_path / "more").glob("fine-high-seed0-*")
    record = json.loads((twin / "run.json").read_text())
    assert record["arm"] == {"token": "fine", "lr": "high"}
    assert json.loads((folder / "run.json").read_text())["arm"]["stem"] == "linear"
    assert (twin / "summary.json").read_text() == (folder / "summary.json").read_text()
    assert {p.name for p in twin.rglob("weights*")} == {"weights.safetensors"}


def test_a_changed_config_is_another_cell(tmp_path: Path) -> None:
    path = write(tmp_path / "s")
    before = {c.name for c in read_study(path, TINY).cells}
    after = {c.name for c in read_study(path, [*TINY, "train.epochs=2"]).cells}
    assert not before & after


def test_cells_whose_names_run_together_are_kept_apart(tmp_path: Path) -> None:
    axes = "axes: {a: {x: {}, x-y: {train: {ema: null}}}, b: {y-z: {}, z: {optim: {lr: 0.5}}}}"
    text = f"{{title: T, question: Q, config: digits.yaml, {axes}, seeds: [0]}}"
    with pytest.raises(ValueError, match="the same run"):
        read_study(write(tmp_path / "s", text), TINY)
    text = text.replace("train: {ema: null}", "optim: {momentum: 0.5}")
    cells = read_study(write(tmp_path / "t", text), TINY).cells
    assert len({c.name for c in cells}) == 4


STAGES = """
title: T
question: Q
config: digits.yaml
stages:
  pretrain: {objective: {name: masked_patch}}
  probe: {optim: {freeze: [model.stem, model.encoder]}}
axes:
  stem:
    linear: {}
    coarse: {stem: {name: linear, args: {patch: 4}}}
  lr:
    low: {probe: {optim: {lr: 1e-3}}}
    high: {probe: {optim: {lr: 1e-2}}}
seeds: [0]
"""


def test_arms_that_differ_later_share_their_first_stage(tmp_path: Path) -> None:
    cells = {
        c.name.rpartition("-")[0]: c for c in read_study(write(tmp_path / "s", STAGES), TINY).cells
    }
    assert list(cells) == [
        "linear-pretrain-seed0",
        "linear-low-probe-seed0",
        "linear-high-probe-seed0",
        "coarse-pretrain-seed0",
        "coarse-low-probe-seed0",
        "coarse-high-probe-seed0",
    ]
    first, low = cells["coarse-pretrain-seed0"], cells["coarse-low-probe-seed0"]
    assert (first.config.objective.name, low.config.objective.name) == (
        "masked_patch",
        "supervised",
    )
    assert {c.config.stem.args["patch"] for c in (first, low)} == {4}
    assert (low.after, low.config.init, first.after) == (first.name, first.name, None)
    assert (first.config.optim.lr, low.config.optim.lr) == (1e-2, 1e-3)
    # Another pre-training makes another cell of what rests on it.
    longer = STAGES.replace("{name: masked_patch}", "{name: masked_patch, args: {ratio: 0.6}}")
    others = read_study(write(tmp_path / "t", longer), TINY).cells
    assert not {c.name for c in others} & {c.name for c in cells.values()}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("  probe: {optim", "  optim: {optim", "that is no section of a config"),
        ("low: {probe: {optim: {lr: 1e-3}}}", "low: {probe: 3}", "should be a set of overrides"),
        ("  stem:", "  stage:", "no axis may be called 'stage'"),
    ],
)
def test_a_bad_stage_is_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        read_study(write(tmp_path / "s", STAGES.replace(old, new)), TINY)


def test_a_stage_waits_for_its_weights_and_starts_from_them(tmp_path: Path) -> None:
    study = read_study(write(tmp_path / "s", STAGES), TINY)
    out = tmp_path / "out"
    assert run_study(study, out, only="linear-*seed0") == []
    cells = {c.name.rpartition("-")[0]: out / c.name for c in study.cells}
    first = cells["linear-pretrain-seed0"]
    name = "model.encoder.blocks.0.attn.qkv.weight"
    expected = read_weights(next(first.glob("checkpoints/step-*")))[name]
    for lr in ("low", "high"):
        folder = cells[f"linear-{lr}-probe-seed0"]
        record = json.loads((folder / "run.json").read_text())
        assert (record["status"], record["init"]["name"]) == ("complete", first.name)
        assert torch.equal(read_weights(next(folder.glob("checkpoints/step-*")))[name], expected)
    # Without them it does not begin with fresh ones.
    failed = run_study(study, out, only="coarse-low-probe")
    assert [f.rpartition("-")[0] for f in failed] == ["coarse-low-probe-seed0"]
    assert "is no finished run" in (cells["coarse-low-probe-seed0"] / ".error").read_text()


def brute_force(constraints: dict[str, list[dict[str, list[str]]]]) -> set[tuple[str, str]]:
    """(stem, lr) of the arms that constraints leave, pair by pair."""
    left = set()
    for pair in (("linear", "low"), ("linear", "high"), ("coarse", "low"), ("coarse", "high")):
        arm = dict(zip(("stem", "lr"), pair, strict=True))
        hits = {
            kind: [c for c in conditions if all(arm[axis] in values for axis, values in c.items())]
            for kind, conditions in constraints.items()
        }
        if hits.get("include", [1]) and not hits.get("exclude"):
            left.add(pair)
    return left


@pytest.mark.parametrize(
    "constraints",
    [
        {"exclude": [{"stem": ["linear"], "lr": ["low"]}]},
        {"include": [{"stem": ["linear"]}, {"lr": ["high"]}]},
        {"include": [{"lr": ["low", "high"]}], "exclude": [{"stem": ["coarse"]}]},
        {"include": [{"stem": ["linear"], "lr": ["low"]}], "exclude": [{"lr": ["high"]}]},
    ],
)
def test_constraints_leave_the_arms_that_meet_them(
    tmp_path: Path, constraints: dict[str, list[dict[str, list[str]]]]
) -> None:
    study = read_study(write(tmp_path / "s", STUDY + yaml.safe_dump(constraints)), TINY)
    left = [(cells[0].arm["stem"], cells[0].arm["lr"]) for cells in study.arms()]
    assert set(left) == brute_force(constraints)
    assert len(left) == len(set(left)) < 4


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("exclude: [{stm: linear}]", "no axis 'stm', did you mean 'stem'?"),
        ("include: [{stem: [linear, corse]}]", "no value 'corse', did you mean 'coarse'?"),
        ("exclude: [{}]", "leave no arm"),
        ("exclude: {stem: linear}", "should be list"),
        ("match: time", "match='time' should be one of"),
        ("smallest_difference: -1", "should be points above 0"),
        ("baseline: {stm: linear}", "baseline: no axis 'stm', did you mean 'stem'?"),
        ("baseline: {stem: corse}", "no value 'corse', did you mean 'coarse'?"),
        ("baseline: {stem: [linear, coarse]}", "should be one value of the axis"),
        ("baseline: {stem: linear}\nexclude: [{stem: linear}]", "is no arm that"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        read_study(write(tmp_path / "s", f"{STUDY}{line}\n"), TINY)


def test_a_study_is_extended_by_seeds(tmp_path: Path) -> None:
    text = STAGES[: STAGES.index("stages:")] + "axes: {}\nseeds: [7, 1]\n"
    path = write(tmp_path / "s", text)

    def seeds(count: int | None) -> list[int]:
        return [c.config.seed for c in read_study(path, TINY, count).arms()[0]]

    assert seeds(None) == [7, 1]
    assert seeds(5) == [7, 1, 0, 2, 3]
    assert seeds(1) == [7]
    before, after = (read_study(path, TINY, n).cells for n in (None, 5))
    assert {c.name for c in before} < {c.name for c in after}
    with pytest.raises(ValueError, match="--seeds 0"):
        seeds(0)


def test_cells_are_chosen_by_a_part_of_their_name(tmp_path: Path) -> None:
    cells = read_study(write(tmp_path / "s"), TINY).cells

    def chosen(pattern: str) -> list[str]:
        return [c.name.rpartition("-")[0] for c in select(cells, pattern)]

    assert chosen("coarse-*-seed1") == ["coarse-low-seed1", "coarse-high-seed1"]
    assert chosen("pixels") == ["pixels"]
    with pytest.raises(ValueError, match="did you mean 'linear-low-seed0'"):
        chosen("linear-lo-seed0")


def test_a_default_written_out_is_the_same_run(tmp_path: Path) -> None:
    axes = "axes: {a: {x: {}, y: {stem: {args: {bias: true}}}}}"
    text = f"{{title: T, question: Q, config: digits.yaml, {axes}, seeds: [0]}}"
    with pytest.raises(ValueError, match="are the same run"):
        read_study(write(tmp_path / "s", text), TINY)


def test_pixel_baselines_are_what_scikit_learn_says(tmp_path: Path) -> None:
    study = read_study(write(tmp_path / "s"), TINY)
    pixels = type(study)(study.name, "", "", None, 1, study.cells[:1])
    assert run_study(pixels, tmp_path / "out") == []
    summary = json.loads((tmp_path / "out" / study.cells[0].name / "summary.json").read_text())
    # scikit-learn's own documentation has logistic regression near 97 % and k-NN near 98 %.
    assert 0.95 < summary["results"]["test/logistic_regression"] < 0.99
    assert 0.97 < summary["results"]["test/knn"] < 1.0


@pytest.mark.parametrize(("number", "group"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_saves_the_cells_and_leaves_none_behind(
    tmp_path: Path, number: int, group: bool
) -> None:
    study, out = write(tmp_path / "s"), tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "hybridvit.cli",
        "study",
        str(study),
        *TINY,
        "train.epochs=300",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("linear*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    if group:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)  # as a scheduler does
    try:
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "run the same command again to go on" in err
    assert "Traceback" not in err
    assert list(out.glob("linear*/checkpoints/step-*"))
    for record in out.glob("*/run.json"):
        assert json.loads(record.read_text())["status"] in ("stopped", "complete")


def test_a_seed_more_costs_one_layer_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laying configs over each other is most of what reading a study takes."""
    layers: list[int] = []
    overlay = grid.overlay

    def counted(base: Any, top: Any) -> Any:
        layers.append(1)
        return overlay(base, top)

    monkeypatch.setattr(grid, "overlay", counted)
    counts = []
    for seeds in (1, 4):
        layers.clear()
        study = read_study(write(tmp_path), ["optim.clip_norm=2"], seeds)
        counts.append(len(layers) - len([c for c in study.cells if c.kind == "train"]))
    assert counts[0] == counts[1] > 0
