from __future__ import annotations

import json
from pathlib import Path

from run_directories import write_run

from hybridvit.report import find_runs, text_table, write_report
from hybridvit.report.arms import compare, group

CHOSEN = {"linear": 1e-3, "conv": 3e-3, "resnet": 1e-3}


def choice(label: str, chosen: float) -> dict[str, object]:
    tried = {1e-4: 0.5, 1e-3: 0.6, 3e-3: None}
    tried[chosen] = 0.7
    return {
        "label": label,
        "metric": "val/accuracy",
        "trials": [
            {"cell": f"{label}-{lr}", "values": {"optim.lr": lr}, "result": result}
            for lr, result in tried.items()
        ],
        "chosen": {"optim.lr": chosen},
    }


def write_study(root: Path) -> None:
    """Three arms of three seeds with what they chose, and their tuning runs."""
    for i, (stem, lr) in enumerate(CHOSEN.items()):
        for seed in range(3):
            write_run(
                root,
                stem,
                seed=seed,
                results={"test/accuracy": 0.5 + 0.1 * i + 0.01 * seed},
                config={"optim": {"lr": lr}},
                record={"arm": {"stem": stem}},
            )
        write_run(
            root,
            stem,
            seed=2**32 - 1,
            results={"val/accuracy": 0.99},
            config={"optim": {"lr": lr}},
            record={"kind": "tune", "arm": {"stem": stem, "tune": "optim.lr=1"}},
        )
    choices = [choice(stem, lr) for stem, lr in CHOSEN.items()]
    plan = {"schema": 1, "match": None, "tuning": choices}
    (root / "plan.json").write_text(json.dumps(plan))


def test_arms_with_rates_of_their_own_are_compared(tmp_path: Path) -> None:
    write_study(tmp_path)
    arms = group(find_runs([tmp_path]))
    pairs = {(c.arm.label, c.other.label) for c in compare(arms, ("optim.lr",))}
    assert pairs == {("conv", "linear"), ("resnet", "linear")}
    # Without tuning the rates tell arms apart.
    assert {(c.arm.label, c.other.label) for c in compare(arms)} == {("resnet", "linear")}


def test_the_page_says_what_was_tried_and_taken(tmp_path: Path) -> None:
    write_study(tmp_path)
    runs = find_runs([tmp_path])
    assert {run.kind for run in runs} == {"train"}
    page = write_report(runs, tmp_path / "out", title="t").read_text("utf-8")
    markdown = (tmp_path / "out" / "report.md").read_text("utf-8")
    for text in (page, markdown):
        assert "Tuning" in text
        assert "Every arm tried the same values of optim.lr before its seeds ran" in text
        assert "optim.lr=0.0001: 50.0 %; optim.lr=0.001: 70.0 %; optim.lr=0.003: diverged" in (
            text.replace("&nbsp;", " ").replace("\u00a0", " ")
        )
    assert ",0.99" not in (tmp_path / "out" / "results.csv").read_text("utf-8")
    found = [line for line in text_table(runs).splitlines() if "at the edge" in line]
    assert len(found) == 1
    assert "The best of what conv tried is at the edge (optim.lr=0.003 of 0.0001 to" in found[0]


def test_without_tuning_there_is_no_such_section(tmp_path: Path) -> None:
    write_study(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps({"schema": 1, "tuning": [{"chosen": 3}]}))
    page = write_report(find_runs([tmp_path]), tmp_path / "out", title="t").read_text("utf-8")
    assert "tuning" not in page.split("<script")[0].lower().replace("fine-tuning", "")
