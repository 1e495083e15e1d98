from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from hybridvit.cli import main
from hybridvit.config import config_hash, resolved
from hybridvit.studies.dry_run import dry_run
from hybridvit.studies.executors import Job
from hybridvit.studies.grid import TUNING_SEED, Cell, Study, read_study
from hybridvit.studies.planner import plan
from hybridvit.studies.status import study_status
from hybridvit.studies.tuning import run_tuned, tuning_cells

STUDY = """
title: T
question: Q
config: digits.yaml
axes:
  stem:
    linear: {}
    coarse: {stem: {args: {patch: 4}}}
tune:
  optim.lr: [1e-6, 1e-2, 3e-2]
seeds: [0, 1]
"""
TINY = ["encoder.args.dim=8", "encoder.args.depth=1", "encoder.args.heads=1", "train.epochs=2"]


def read(
    folder: Path, text: str = STUDY, seeds: int | None = None, over: Sequence[str] = ()
) -> Study:
    folder.mkdir(exist_ok=True)
    path = folder / "study.yaml"
    path.write_text(text)
    return read_study(path, [*TINY, *over], seeds)


class Pretend:
    """An executor whose cells end at once, with the result on validation that it is given."""

    slots = 1

    def __init__(self, result: Callable[[Cell], float | str]) -> None:
        self.result = result
        self.ran: list[Cell] = []

    def run(
        self,
        jobs: Sequence[Job],
        *,
        watch: Callable[[list[str]], None],
        ended: Callable[[str, int], None],
    ) -> None:
        for job in jobs:
            cell, out = job.args
            self.ran.append(cell)
            found = self.result(cell) if cell.kind == "tune" else 0.5
            status = found if isinstance(found, str) else "complete"
            # On the test split the worst candidate is the best.
            content = {"val/accuracy": found, "test/accuracy": 1 - cell.config.optim.lr}
            record = {
                "schema": 1,
                "status": status,
                "kind": cell.kind,
                "hash": config_hash(cell.config),
            }
            (out / cell.name).mkdir(parents=True, exist_ok=True)
            (out / cell.name / "run.json").write_text(json.dumps(record))
            if status == "complete":
                (out / cell.name / "summary.json").write_text(json.dumps({"results": content}))
            ended(job.name, 0 if status == "complete" else 1)

    def names(self) -> list[str]:
        return [cell.name.rpartition("-")[0] for cell in self.ran]


def rates(study: Study) -> dict[str, float]:
    """The learning rate of each cell, by its name without the hash."""
    return {c.name.rpartition("-")[0]: c.config.optim.lr for c in study.cells}


def run(study: Study, out: Path, result: Any, **how: Any) -> tuple[Study, list[str], Pretend]:
    executor = Pretend(result)
    study, failed = run_tuned(plan(study, out), out, executor=executor, **how)
    return study, failed, executor


def test_a_terrible_rate_loses_on_validation_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = STUDY.replace("1e-2, 3e-2]", "1e-2]").replace("[0, 1]", "[0]\ninclude: [{stem: linear}]")
    longer = ["encoder.args.dim=16", "train.epochs=8", "optim.warmup_epochs=1"]

    def planned() -> Study:
        return plan(read(tmp_path / "s", text, over=longer), out)

    study, failed = run_tuned(planned(), out)
    assert failed == []
    assert rates(study) == {"linear-seed0": 1e-2}
    folders = {p.name.rpartition("-")[0]: p for p in out.iterdir() if p.is_dir()}
    assert set(folders) == {
        "linear-seed0",
        "linear-tune-lr1e-06",
        "linear-tune-lr0.01",
    }
    for name, folder in folders.items():
        record = json.loads((folder / "run.json").read_text())
        results = json.loads((folder / "summary.json").read_text())["results"]
        tunes = "-tune-" in name
        assert record["kind"] == ("tune" if tunes else "train")
        assert record["seed"] == (TUNING_SEED if tunes else 0)
        assert {key.split("/")[0] for key in results} == ({"val"} if tunes else {"val", "test"})
        assert (folder / "predictions.json").exists() is not tunes
    (entry,) = json.loads((out / "plan.json").read_text())["tuning"]
    assert (entry["metric"], entry["chosen"]) == ("val/accuracy", {"optim.lr": 1e-2})
    worst, best = (trial["result"] for trial in entry["trials"])
    assert worst + 0.15 < best
    assert "3 of 3 cells complete" in study_status(out)
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/run.json")}
    assert run_tuned(planned(), out) == (study, [])
    assert {p: p.stat().st_mtime_ns for p in out.glob("*/run.json")} == before


def test_each_arm_takes_its_best_whatever_the_test_split_says(tmp_path: Path) -> None:
    for i, scores in enumerate(itertools.permutations([0.2, 0.5, 0.7])):
        study = read(tmp_path / f"s{i}")
        candidates = [1e-6, 1e-2, 3e-2]
        by_rate = dict(zip(candidates, scores, strict=True))

        def result(cell: Cell, by_rate: dict[float, float] = by_rate) -> float:
            value = by_rate[cell.config.optim.lr]
            return 1 - value if cell.arm["stem"] == "coarse" else value

        study, failed, _ = run(study, tmp_path / f"{i}" / "out", result)
        assert failed == []
        best, worst = candidates[scores.index(0.7)], candidates[scores.index(0.2)]
        assert rates(study) == {
            "linear-seed0": best,
            "linear-seed1": best,
            "coarse-seed0": worst,
            "coarse-seed1": worst,
        }


def test_of_equal_results_the_first_listed_is_taken(tmp_path: Path) -> None:
    study, _, _ = run(read(tmp_path / "s"), tmp_path / "out", lambda cell: 0.5)
    assert set(rates(study).values()) == {1e-6}


def test_every_arm_has_the_same_candidates_and_the_budget_of_its_seeds(tmp_path: Path) -> None:
    text = STUDY.replace("lr: [1e-6, 1e-2, 3e-2]", "lr: [1e-3, 1e-2]\n  optim.weight_decay: [0, 1]")
    study = plan(read(tmp_path / "s", f"{text}match: flops\n"), tmp_path / "out")
    arms = tuning_cells(study)
    epochs = [cells[0].config.train.epochs for cells in study.arms()]
    assert epochs[0] != epochs[1]
    for tried, cells in zip(arms, study.arms(), strict=True):
        found = [(c.config.optim.lr, c.config.optim.weight_decay) for c in tried]
        assert found == [(1e-3, 0), (1e-3, 1), (1e-2, 0), (1e-2, 1)]
        for cell in tried:
            optim = dataclasses.replace(
                cell.config.optim,
                lr=cells[0].config.optim.lr,
                weight_decay=cells[0].config.optim.weight_decay,
            )
            same = dataclasses.replace(cell.config, seed=0, optim=optim)
            assert (same, cell.config.seed) == (cells[0].config, TUNING_SEED)


def test_a_choice_is_frozen_and_kept_for_more_seeds(tmp_path: Path) -> None:
    out = tmp_path / "out"
    good = {1e-6: 0.1, 1e-2: 0.9, 3e-2: 0.5}
    first, _, ran = run(read(tmp_path / "s"), out, lambda cell: good[cell.config.optim.lr])
    assert len(ran.ran) == 10
    assert ran.names()[:6] == [
        f"{stem}-tune-lr{lr}" for stem in ("linear", "coarse") for lr in ("1e-06", "0.01", "0.03")
    ]
    more, _, ran = run(read(tmp_path / "s", seeds=4), out, lambda cell: 1.0)
    assert ran.names() == ["linear-seed2", "linear-seed3", "coarse-seed2", "coarse-seed3"]
    assert {c.name for c in first.cells} < {c.name for c in more.cells}
    assert set(rates(more).values()) == {1e-2}
    # What plan.json says stands, even without the runs that it rests on.
    content = json.loads((out / "plan.json").read_text())
    content["tuning"][0]["chosen"] = {"optim.lr": 3e-2}
    (out / "plan.json").write_text(json.dumps(content))
    again, _, _ = run(read(tmp_path / "s"), out, lambda cell: 1.0)
    assert rates(again)["linear-seed0"] == 3e-2
    content["tuning"][0]["chosen"] = {"optim.lr": "much"}
    (out / "plan.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"linear has optim\.lr=much, which it did"):
        run(read(tmp_path / "s"), out, lambda cell: 1.0)
    (out / "plan.json").unlink()
    # Other candidates are another choice, of which finished runs are not made again.
    text = STUDY.replace("3e-2]", "1]")
    changed, _, ran = run(read(tmp_path / "s", text), out, lambda cell: 0.95)
    assert ran.names()[:2] == ["linear-tune-lr1", "coarse-tune-lr1"]
    assert set(rates(changed).values()) == {1}


def test_only_the_arms_that_are_asked_for_are_tuned(tmp_path: Path) -> None:
    out = tmp_path / "out"
    study, failed, ran = run(read(tmp_path / "s"), out, lambda cell: 0.5, only="coarse-seed1")
    assert failed == []
    assert ran.names() == [
        *(f"coarse-tune-lr{lr}" for lr in ("1e-06", "0.01", "0.03")),
        "coarse-seed1",
    ]
    assert {c.arm["stem"] for c in study.cells} == {"coarse"}
    assert "linear-seed0" in study_status(out)  # whose hash is not known yet
    _, _, ran = run(read(tmp_path / "s"), out, lambda cell: 0.5, only="*-tune-*")
    assert {c.arm["stem"] for c in ran.ran} == {"linear"}
    assert len(ran.ran) == 3
    # By its full name, which it has since its arm has chosen.
    _, _, ran = run(read(tmp_path / "s"), out, lambda cell: 0.5, only=study.cells[0].name)
    assert ran.names() == ["coarse-seed0"]
    with pytest.raises(ValueError, match="names no cell"):
        run(read(tmp_path / "s"), out, lambda cell: 0.5, only="resnet")


@pytest.mark.parametrize(("result", "code"), [(0.5, 0), ("failed", 1)])
def test_the_command_that_tunes_alone_fails_only_if_tuning_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: float | str, code: int
) -> None:
    executor = Pretend(lambda cell: result)
    monkeypatch.setattr("hybridvit.studies.executors.choice.choose", lambda *_, **__: executor)
    (tmp_path / "study.yaml").write_text(STUDY)
    out = ["--out", str(tmp_path / "out")]
    command = ["study", str(tmp_path / "study.yaml"), *TINY, *out, "--only", "*-tune-*"]
    assert main(command) == code
    assert {cell.kind for cell in executor.ran} == {"tune"}


def test_a_candidate_that_diverges_has_lost_and_not_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def result(cell: Cell) -> float | str:
        return "diverged" if cell.config.optim.lr > 1e-2 else cell.config.optim.lr

    study, failed, _ = run(read(tmp_path / "s"), tmp_path / "out", result)
    assert failed == []
    assert set(rates(study).values()) == {1e-2}
    printed = capsys.readouterr().out
    assert "optim.lr=0.03: diverged" in printed
    assert "at the edge" not in printed  # one that is larger was tried

    def no_linear(cell: Cell) -> float | str:
        return "diverged" if cell.arm["stem"] == "linear" else 0.5

    study, failed, _ = run(read(tmp_path / "t"), tmp_path / "other" / "out", no_linear)
    assert {c.arm["stem"] for c in study.cells} == {"coarse"}
    assert [name.split("-tune-")[0] for name in failed] == ["linear"] * 3
    assert "linear is not tuned, its seeds wait: all that it tried diverged" in (
        capsys.readouterr().out
    )


def test_an_arm_waits_until_every_candidate_had_its_chance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, broken = tmp_path / "out", [True]

    def result(cell: Cell) -> float | str:
        is_one = cell.arm["stem"] == "linear" and cell.config.optim.lr == 1e-2
        return "failed" if is_one and broken[0] else cell.config.optim.lr

    study, failed, ran = run(read(tmp_path / "s"), out, result)
    assert [name.rpartition("-")[0] for name in failed] == ["linear-tune-lr0.01"]
    assert {c.arm["stem"] for c in study.cells} == {"coarse"}
    assert "linear-seed0" not in ran.names()
    assert "linear-tune-lr0.01" in capsys.readouterr().out
    broken[0] = False
    _, failed, ran = run(read(tmp_path / "s"), out, result)
    assert (ran.names(), len(failed)) == ([], 1)  # it waits for --retry-failed
    study, failed, ran = run(read(tmp_path / "s"), out, result, retry_failed=True)
    assert failed == []
    assert ran.names() == ["linear-tune-lr0.01", "linear-seed0", "linear-seed1"]
    assert rates(study)["linear-seed0"] == 3e-2


STAGES = """
title: T
question: Q
config: digits.yaml
stages:
  pretrain: {objective: {name: masked_patch}}
  finetune: {}
axes:
  stem: {linear: {}, coarse: {stem: {args: {patch: 4}}}}
tune: {optim.lr: [1e-3, 3e-2]}
seeds: [3, 4]
"""


@pytest.mark.parametrize("match", ["", "match: flops\n"])
def test_of_stages_the_last_is_tuned_from_the_first_seeds_weights(
    tmp_path: Path, match: str
) -> None:
    def result(cell: Cell) -> float:
        return cell.config.optim.lr

    study, failed, ran = run(
        read(tmp_path / "s", STAGES + match, over=["train.epochs=20"]), tmp_path / "out", result
    )
    assert failed == []
    names = ran.names()
    assert names[:6] == [
        "linear-pretrain-seed3",
        "linear-finetune-tune-lr0.001",
        "linear-finetune-tune-lr0.03",
        "coarse-pretrain-seed3",
        "coarse-finetune-tune-lr0.001",
        "coarse-finetune-tune-lr0.03",
    ]
    assert len(names) == len(set(names)) == 12
    cells = {c.name.rpartition("-")[0]: c for c in ran.ran}
    trial = cells["linear-finetune-tune-lr0.03"]
    assert trial.after == trial.config.init == cells["linear-pretrain-seed3"].name
    for cell in study.cells:
        assert cell.config.optim.lr == (3e-2 if cell.arm["stage"] == "finetune" else 1e-2)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("optim.lr:", "optim.lrr:", "'optim.lrr' is no key of optim, did you mean 'optim.lr'?"),
        ("optim.lr:", "train.epochs:", "tune: 'train.epochs' is no key of optim"),
        ("[1e-6, 1e-2, 3e-2]", "[1e-2]", "optim.lr=[0.01] should list two or more"),
        ("[1e-6, 1e-2, 3e-2]", "[[1e-2], 1]", "should list two or more numbers or names"),
        ("[1e-6, 1e-2, 3e-2]", "1e-2", "should be section {key: list}"),
        ("[1e-6, 1e-2, 3e-2]", "[1e-2, 0.01]", "optim.lr lists 0.01 twice"),
        ("[1e-6, 1e-2, 3e-2]", "[1e-2, -1]", "optim.lr=-1 should be above 0"),
        ("[1e-6, 1e-2, 3e-2]", "[1e-2, much]", "optim.lr='much' should be float"),
        ("linear: {}", "linear: {optim: {lr: 1}}", "stem=linear sets it, too"),
        ("  stem:", "  tune:", "no axis may be called 'tune'"),
        ("seeds: [0, 1]", f"seeds: [{TUNING_SEED}]", "is that of tuning"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        read(tmp_path / "s", STUDY.replace(old, new))
    assert "\n" not in str(raised.value)


def test_a_tuned_key_is_not_set_on_the_command_line(tmp_path: Path) -> None:
    read(tmp_path / "s")
    with pytest.raises(ValueError, match="is tuned, and an override sets it, too"):
        read_study(tmp_path / "s", [*TINY, "optim.lr=1"])
    stages = STAGES.replace("coarse: {", "coarse: {finetune: {optim: {lr: 1}}, ")
    with pytest.raises(ValueError, match="stem=coarse sets it, too"):
        read(tmp_path / "t", stages)


def test_an_arm_without_a_number_on_validation_is_refused(tmp_path: Path) -> None:
    none = STUDY.replace("coarse: {", "coarse: {data: {val_fraction: 0}, ")
    headless = STUDY.replace("coarse: {", "coarse: {objective: {name: simmim, args: {unit: 1}}, ")
    probed = headless.replace("unit: 1}}", "unit: 1}}, eval: {probes: [linear, knn]}")
    for text, words in (
        (none, "coarse has no validation images"),
        (headless, "objective 'simmim' of coarse has no number on validation images; add knn"),
    ):
        study = read(tmp_path / "s", text)
        for call in (plan, dry_run):
            with pytest.raises(ValueError, match=words):
                call(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    plan(read(tmp_path / "s", probed), tmp_path / "out")


def test_a_dry_run_shows_what_is_tried_and_what_it_costs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = dry_run(read(tmp_path / "s"), out)
    assert "10 runs" in printed
    assert "optim.lr in 1e-06, 0.01, 0.03; 3 runs an arm" in printed
    assert "6 of all these runs" in printed
    total, tuning = (
        float(re.search(rf"{words}([\d.e]+) FLOPs", printed)[1])  # type: ignore[index]
        for words in ("in total ", "all these runs, ")
    )
    assert tuning == pytest.approx(total * 6 / 10, rel=0.01)
    assert not out.exists()
    run(read(tmp_path / "s"), out, lambda cell: cell.config.optim.lr)
    printed = dry_run(read(tmp_path / "s"), out)
    assert "linear takes optim.lr=0.03: optim.lr=1e-06: 0.0 %" in printed
    assert "Warning: The best of what coarse tried is at the edge (optim.lr=0.03 of" in printed


def test_the_config_of_a_seed_says_what_was_chosen(tmp_path: Path) -> None:
    study, _, _ = run(read(tmp_path / "s"), tmp_path / "out", lambda cell: cell.config.optim.lr)
    for cell in study.cells:
        assert cell.name.endswith(config_hash(cell.config))
        assert yaml.safe_load(yaml.safe_dump(resolved(cell.config)))["optim"]["lr"] == 3e-2
