from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridvit.config import resolved
from hybridvit.studies.grid import read_study, run_study

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

    times = {p: p.stat().st_mtime_ns for p in out.glob("*-high-*/summary.json")}
    run_study(study, out)
    assert "3 of 5 cells are complete" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in out.glob("*-high-*/summary.json")} == times


def test_a_changed_config_is_another_cell(tmp_path: Path) -> None:
    path = write(tmp_path / "s")
    before = {c.name for c in read_study(path, TINY).cells}
    after = {c.name for c in read_study(path, [*TINY, "train.epochs=2"]).cells}
    assert not before & after


def test_cells_whose_names_run_together_are_kept_apart(tmp_path: Path) -> None:
    axes = "axes: {a: {x: {}, x-y: {seed: 5}}, b: {y-z: {}, z: {optim: {lr: 0.5}}}}"
    text = f"{{title: T, question: Q, config: digits.yaml, {axes}, seeds: [0]}}"
    with pytest.raises(ValueError, match="the same run"):
        read_study(write(tmp_path / "s", text), TINY)  # the seeds of an axis are overridden
    text = text.replace("seed: 5", "optim: {momentum: 0.5}")
    cells = read_study(write(tmp_path / "t", text), TINY).cells
    assert len({c.name for c in cells}) == 4


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
