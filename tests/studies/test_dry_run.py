from __future__ import annotations

from pathlib import Path

import pytest
from two_stems import STUDY, TINY, read

from hybridvit.studies.dry_run import dry_run
from hybridvit.studies.grid import read_study
from hybridvit.studies.planner import plan


def test_a_dry_run_shows_each_arm_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = STUDY.replace("linear: {}", "linear: {stem: {args: {patch: 4}}}")
    text = text.replace("digits.yaml", "long.yaml")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "long.yaml").write_text("extends: [digits.yaml]\ntrain: {epochs: 80}\n")
    (tmp_path / "s" / "study.yaml").write_text(f"{text}match: flops\n")
    study = read_study(tmp_path / "s", [t for t in TINY if "train.epochs" not in t])
    lines = dry_run(study, out).splitlines()
    assert not out.exists()
    table = {line.split()[0]: line.split() for line in lines[1:] if line}
    assert table["linear"][:5] == ["linear", "1", "4", "4", "px"]
    assert table["resnet"][:5] == ["resnet", "1", "16", "2", "px"]
    planned = plan(study, out)
    assert f"{planned.cells[1].config.train.epochs:g}" in table["resnet"]
    printed = "\n".join(lines)
    for words in ("differ in token counts", "4 in linear; 16 in resnet", "differ in strides"):
        assert words in printed
    assert "differ in data" not in printed
    assert max(map(len, lines[:5])) <= 120


def test_jobs_at_once_are_those_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, out = read(tmp_path / "s", "epochs"), tmp_path / "out"
    monkeypatch.setattr("hybridvit.studies.executors.local.cores", lambda: 8)
    assert "8 at once here" in dry_run(study, out)
    assert "3 at once here" in dry_run(study, out, slots=3)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert "2 or more at once here" in dry_run(study, out)
    assert "3 at once here" in dry_run(study, out, slots=3)


def test_data_that_are_not_here_are_planned_for_but_not_matched(tmp_path: Path) -> None:
    data = [f"data={{name: cifar10, args: {{root: {tmp_path}, image_size: 32}}}}"]
    (tmp_path / "s").mkdir()
    path = tmp_path / "s" / "study.yaml"
    path.write_text(f"{STUDY}match: flops\n")
    study = read_study(path, [*TINY, *data])
    printed = dry_run(study, tmp_path / "out")
    assert "cifar10 at 32 x 32 px is not here" in printed
    with pytest.raises(ValueError, match="cifar10 at 32 x 32 px is not here"):
        plan(study, tmp_path / "out")


def test_arms_are_compared_within_their_stage(tmp_path: Path) -> None:
    stages = "stages: {small: {}, large: {data: {args: {image_size: 16}}}}\n"
    printed = dry_run(read(tmp_path / "s", "flops", STUDY + stages), tmp_path / "out")
    table = {line.rpartition("px")[0].split("  ")[0]: line.split() for line in printed.splitlines()}
    tokens = {name: line[4] for name, line in table.items() if name.startswith(("linear", "res"))}
    assert tokens == {
        "linear / small": "16",
        "linear / large": "64",
        "resnet / small": "16",
        "resnet / large": "64",
    }
    assert "differ in token counts" not in printed
    (equal,) = [line for line in printed.splitlines() if line.startswith("match: flops")]
    assert equal.count("all arms within") == 2
    assert "small: " in equal
    assert "; large: " in equal


def test_probing_shows_the_time_and_memory_of_each_arm(tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = dry_run(read(tmp_path / "s", "epochs", seeds=3), out, probe=True)
    rows = {line.split()[0]: line for line in printed.splitlines() if " px " in line}
    assert set(rows) == {"linear", "resnet"}
    for row in rows.values():
        assert "?" not in row
        memory = float(row.split()[-2])
        assert row.endswith(" GiB")
        assert memory > 0.1  # of the whole process, not the estimate of some kilobytes
    assert " of training" in printed
    assert "time not known" not in printed
    assert not out.exists()
