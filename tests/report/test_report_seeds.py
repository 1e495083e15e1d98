from __future__ import annotations

from pathlib import Path

from run_directories import write_run

from hybridvit.report import find_runs, write_report
from hybridvit.report.arms import compare, group
from hybridvit.report.caveats import caveats


def told(root: Path) -> str:
    arms = group(find_runs([root]))
    return "\n".join(caveats(arms, compare(arms)))


def test_the_page_says_what_a_seed_varies(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path, seed=seed, results={"test/accuracy": 0.5 + 0.01 * seed})
    write_report(find_runs([tmp_path]), tmp_path / "out", title="t")
    for name in ("report.html", "report.md"):
        text = (tmp_path / "out" / name).read_text("utf-8").replace("\u00a0", " ")
        assert (
            "A seed varies initialisation, the order of images, augmentation, masks and dropout; "
            "the split of the data is the same for all seeds."
        ) in text
        assert "above about 3.3 standard deviations of the differences" in text


def test_seeds_that_share_their_start_are_told(tmp_path: Path) -> None:
    result = {"test/accuracy": 0.5}
    for seed in range(2):
        own = f"runs/s/linear-pretrain-seed{seed}-0123456{seed}"
        write_run(tmp_path, "linear", seed=seed, results=result, config={"init": own})
        shared = {"init": "runs/pretrained-01234567"}
        write_run(tmp_path, "conv", seed=seed, results=result, config=shared)
        stem = {"stem": {"args": {"pretrained": True}}}
        write_run(tmp_path, "resnet", seed=seed, results=result, config=stem)
    text = told(tmp_path)
    assert "All seeds of linear" not in text
    assert (
        "All seeds of conv / supervised start from the same weights (pretrained-01234567): their "
        "spread leaves out that of other pre-training."
    ) in text
    assert (
        "All seeds of resnet / supervised start from the same weights (a pretrained stem)" in text
    )


def test_one_seed_shares_nothing(tmp_path: Path) -> None:
    write_run(tmp_path, results={"test/accuracy": 0.5}, config={"init": "runs/a-01234567"})
    assert "start from the same weights" not in told(tmp_path)


def test_what_a_pretrained_teacher_has_seen_is_told(tmp_path: Path) -> None:
    def write(stem: str, target: dict[str, object]) -> None:
        args = {"target": "features", "target_args": target}
        objective = {"objective": {"name": "masked_patch", "args": args}}
        write_run(tmp_path, stem, "masked_patch", results={"test/knn": 0.5}, config=objective)

    write("linear", {"teacher": "ema", "pretrained": True})
    write("conv", {"teacher": "vit_small_patch16_224", "pretrained": False})
    assert "predicts what a pretrained" not in told(tmp_path)
    write("resnet", {"teacher": "vit_small_patch16_224", "pretrained": True})
    assert (
        "resnet / masked_patch predicts what a pretrained network computes (vit_small_patch16_224)"
    ) in told(tmp_path)
