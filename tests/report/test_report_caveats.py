import json
from pathlib import Path
from typing import Any

import pytest
from run_directories import caveats_of, write_masked, write_pair, write_run

from hybridvit.report import find_runs
from hybridvit.report.arms import compare, group
from hybridvit.report.caveats import caveats


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"packages": {"torch": "2.11.0"}}, "differ in torch (runs each): 2.15.0 (3), 2.11.0 (1)."),
        ({"hardware": {"threads": 16}}, "differ in threads (runs each): 4 (3), 16 (1)."),
        ({"hardware": {"gpu": "H200"}}, "differ in GPU (runs each): none (3), H200 (1)."),
        ({"code": {"commit": "abc"}}, "differ in commit"),
        ({"code": {"dirty": True}}, "One run was made with uncommitted changes"),
        ({"data": {"fingerprint": "beef"}}, "differ in data fingerprint"),
        ({"data": {"notes": ["two scans were dropped"]}}, "Data: two scans were dropped"),
    ],
)
def test_differences_within_a_comparison_are_told(
    tmp_path: Path, record: dict[str, object], text: str
) -> None:
    for stem in ("linear", "conv"):
        for seed in (0, 1):
            odd = record if (stem, seed) == ("conv", 1) else None
            write_run(tmp_path, stem, seed=seed, results={"test/accuracy": 0.5}, record=odd)
    assert text in caveats_of(tmp_path)
    if "differ in" in text:
        assert caveats_of(tmp_path).count("Runs that are compared differ") == 1


def test_uneven_models_are_told(tmp_path: Path) -> None:
    write_run(tmp_path, "linear", results={"test/accuracy": 0.5})
    model = {"tokens": 4, "patch_px": 8, "patch_local": False, "flops": {"forward": 4_690_000_000}}
    write_run(tmp_path, "conv", results={"test/accuracy": 0.5}, record={"model": model})
    text = caveats_of(tmp_path)
    assert "have 4 and 16 tokens; 8 and 4 pixels per token side (stride)" in text
    assert "takes 2 times the forward FLOPs per image" in text


def against(root: Path, baseline: dict[str, str]) -> str:
    arms = group(find_runs([root]))
    return "\n".join(caveats(arms, compare(arms, baseline=baseline)))


def test_uneven_arms_are_told_with_a_baseline_too(tmp_path: Path) -> None:
    for stem, tokens, epochs, images in (("linear", 256, 10, 500), ("conv", 64, 40, 2000)):
        write_run(
            tmp_path,
            stem,
            results={"test/accuracy": 0.5},
            config={"train": {"epochs": epochs}},
            record={
                "arm": {"stem": stem},
                "model": {"tokens": tokens, "patch_px": 4, "patch_local": stem == "linear"},
            },
            summary={"images": images},
        )
    assert (
        "conv and linear are uneven in tokens (64 and 256), epochs (40 and 10), training images "
        "(2000 and 500).\n"
    ) in against(tmp_path, {"stem": "linear"})


@pytest.mark.parametrize(
    ("configs", "told"),
    [
        # An axis of patches, alone and where a match sets the epochs.
        ([{"stem": {"args": {"patch": 4}}}, {"stem": {"args": {"patch": 8}}}], None),
        (
            [
                {"stem": {"args": {"patch": 4}}, "train": {"epochs": 1}},
                {"stem": {"args": {"patch": 8}}, "train": {"epochs": 4, "accumulate": 2}},
            ],
            "epochs (4 and 1)",
        ),
        # Axes of lengths and of training sets.
        ([{"train": {"epochs": 1}}, {"train": {"epochs": 4}}], None),
        (
            [
                {"data": {"train_images": 10}, "train": {"epochs": 4}},
                {"data": {"train_images": 40}, "train": {"epochs": 1}},
            ],
            None,
        ),
        # An axis of widths under a match.
        (
            [
                {"encoder": {"args": {"dim": 64}}, "train": {"epochs": 4}},
                {"encoder": {"args": {"dim": 128}}, "train": {"epochs": 1}},
            ],
            "epochs (1 and 4)",
        ),
    ],
)
def test_what_an_axis_sets_itself_is_not_told(
    tmp_path: Path, configs: list[dict[str, Any]], told: str | None
) -> None:
    for name, config in zip(("base", "other"), configs, strict=True):
        patch = config.get("stem", {}).get("args", {}).get("patch", 4)
        model = {"tokens": 1024 // patch**2, "patch_px": patch, "patch_local": True}
        write_run(tmp_path, results={"test/accuracy": 0.5}, config=config,
                  record={"arm": {"a": name}, "model": model})  # fmt: skip
    found = [x for x in against(tmp_path, {"a": "base"}).splitlines() if "uneven" in x]
    assert found == ([f"other and base are uneven in {told}."] if told else [])


def test_training_before_that_one_side_alone_had_is_told(tmp_path: Path) -> None:
    starts = {"scratch": None, "mae": "runs/s/mae-seed0-01234567", "simmim": "runs/s/simmim-seed0"}
    for start, init in starts.items():
        write_run(tmp_path, results={"test/accuracy": 0.5}, config={"init": init},
                  record={"arm": {"start": start}})  # fmt: skip
    sentence = "{} starts from trained weights, {} from fresh ones: what those cost is on no axis."
    text = against(tmp_path, {"start": "scratch"})
    assert sentence.format("mae", "scratch") in text
    assert sentence.format("simmim", "scratch") in text
    text = against(tmp_path, {"start": "mae"})
    assert sentence.format("mae", "scratch") in text
    assert "simmim starts" not in text


@pytest.mark.parametrize(
    ("epochs", "warmups", "told"),
    [
        ((10, 40), (2, 2), "5 % and 20 %"),
        ((10, 10), (0, 1), "10 % and 0 %"),
        ((1, 10), (2, 2), "20 % and 100 %"),  # longer than all training
        ((10, 14), (2, 2), None),  # 1.4 times
        ((10, 40), (1, 4), None),
        ((10, 40), (0, 0), None),
    ],
)
def test_warmup_that_takes_other_shares_is_told(
    tmp_path: Path, epochs: tuple[int, int], warmups: tuple[int, int], told: str | None
) -> None:
    for stem, length, warmup in zip(("linear", "conv"), epochs, warmups, strict=True):
        config = {"train": {"epochs": length}, "optim": {"warmup_epochs": warmup}}
        write_run(tmp_path, stem, results={"test/accuracy": 0.5}, config=config,
                  record={"arm": {"stem": stem}})  # fmt: skip
    found = [x for x in against(tmp_path, {"stem": "linear"}).splitlines() if "warm-up" in x]
    sentence = f"conv and linear spend {told} of their training in warm-up."
    assert found == ([sentence] if told else [])


def test_an_axis_of_warmup_is_no_uneven_warmup(tmp_path: Path) -> None:
    for warmup in (1, 4):
        write_run(tmp_path, results={"test/accuracy": 0.5},
                  config={"optim": {"warmup_epochs": warmup}},
                  record={"arm": {"w": str(warmup)}})  # fmt: skip
    assert "warm-up" not in against(tmp_path, {"w": "1"})


def test_unequal_costs_are_told_of_whatever_is_compared(tmp_path: Path) -> None:
    for arm, flops in (("none", 2_000_000_000), ("dear", 6_000_000_000)):
        record = {"arm": {"kind": arm}, "model": {"flops": {"forward": flops}}}
        lr = {"optim": {"lr": flops}}
        write_run(tmp_path, results={"test/accuracy": 0.5}, record=record, config=lr)
    arms = group(find_runs([tmp_path]))
    text = " ".join(caveats(arms, compare(arms, baseline={"kind": "none"})))
    assert "dear takes 3 times the forward FLOPs per image of none." in text


def test_test_split_and_many_claims(tmp_path: Path) -> None:
    write_pair(tmp_path)
    assert "comparisons are on this page" not in caveats_of(tmp_path)
    write_masked(tmp_path, "linear", [0.80, 0.81, 0.805], [0.70, 0.71, 0.70])
    write_run(
        tmp_path,
        "resnet",
        results={"test/accuracy": 0.5},
        metrics=[{"step": 1, "test/accuracy": 0.2}],
    )
    text = caveats_of(tmp_path)
    assert "3 comparisons are on this page. Their verdicts are Holm's" in text
    assert "scored the test split during training" in text
    assert "The same test split scores 4 arms" in text
    assert "The test split has 400 images, one of them 0.25 points" in text


def test_runs_that_changed_on_their_way_are_told(tmp_path: Path) -> None:
    """run.json's own lines are of the last of the processes that carried it on."""
    path = write_run(tmp_path, seed=1) / "run.json"
    now = json.loads(path.read_text())
    first = {
        **now,
        "code": {**now["code"], "commit": "aaa"},
        "packages": {**now["packages"], "torch": "2.11"},
    }

    def told(earlier: object) -> list[str]:
        path.write_text(json.dumps({**now, "earlier": earlier}))
        return [c for c in caveats_of(tmp_path).splitlines() if "changed on its way" in c]

    assert told([now, now]) == []
    (line,) = told([first, now])
    commit, torch = now["code"]["commit"], now["packages"]["torch"]
    assert line.startswith("Run linear-supervised (seed 1, ")
    assert f"changed on its way (commit: aaa, then {commit}; torch: 2.11, then {torch})." in line
    for bad in ("x", ["x", None], [{"code": 3, "packages": ["torch"]}]):
        told(bad)  # whatever a stranger wrote there
