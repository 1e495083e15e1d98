"""Whether a directory's run is the one that is asked for, and what it was made of before."""

from __future__ import annotations

import json
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hybridvit import build, config
from hybridvit.config import RunConfig
from hybridvit.engine import step as step_module
from hybridvit.engine.run import train
from hybridvit.engine.runlog import RunDirectory, check_same_run, cores, earlier

SMALL = [
    "encoder.args={dim: 16, depth: 1, heads: 2}",
    "train.epochs=2",
    "train.batch_size=64",
    "train.log_every=5",
    "eval.epochs=1",
]


def load(*overrides: str) -> RunConfig:
    return config.load("digits.yaml", [*SMALL, *overrides])


def read(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_text())
    return content


def folder_of_images(root: Path, seed: int, split: str = "train") -> None:
    generator = torch.Generator().manual_seed(seed)
    for label in "ab":
        folder = root / split / label
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(8):
            # Noise: files of other pixels have other sizes, by which they are told apart.
            pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()[: 8 - seed]).save(folder / f"{number}.png")


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("ends", ["complete", "stopped"])
def test_a_run_is_not_taken_for_one_of_other_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str, ends: str
) -> None:
    root = tmp_path / "images"
    for each in ("train", "test"):
        folder_of_images(root, 0, each)
    overrides = [f"data={{name: image_folder, args: {{root: {root}, image_size: 8}}}}"]
    overrides += ["data.val_fraction=0.2", "data.workers=0", "train.batch_size=4"]
    settings = load(*overrides)
    original = step_module.seed_step

    def interrupt(seed: int, step: int) -> None:
        if step == 2 and ends == "stopped":
            os.kill(os.getpid(), signal.SIGTERM)
        original(seed, step)

    monkeypatch.setattr(step_module, "seed_step", interrupt)
    out = tmp_path / "run"
    assert train(settings, name="a", out=out, show=False).status == ends
    monkeypatch.setattr(step_module, "seed_step", original)
    folder_of_images(root, 1, split)
    if (split, ends) == ("test", "stopped"):  # it has not looked at any
        assert train(settings, name="a", out=out, show=False).status == "complete"
        return
    which = "other test images" if split == "test" else "other images"
    with pytest.raises(ValueError, match=f"was begun on {which} .*choose another out=DIR"):
        train(settings, name="a", out=out, show=False)
    folder_of_images(root, 0, split)
    assert train(settings, name="a", out=out, show=False).status == "complete"


def test_a_finished_run_needs_its_data_no_more(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for split in ("train", "test"):
        folder_of_images(root, 0, split)
    settings = load(
        f"data={{name: image_folder, args: {{root: {root}, image_size: 8}}}}",
        "data.val_fraction=0.2", "data.workers=0", "train.batch_size=4",
    )  # fmt: skip
    train(settings, name="a", out=tmp_path / "run", show=False)
    root.rename(tmp_path / "away")
    root.mkdir()  # as of a disk that is not mounted
    outcome = train(settings, name="a", out=tmp_path / "run", show=False)
    assert "is already complete (whether its images are still the same is not known: " in (
        outcome.message
    )
    assert len(outcome.message.splitlines()) == 1


@pytest.mark.parametrize(
    ("status", "saved", "refused"),
    [
        ("complete", False, True),
        ("stopped", True, True),
        ("failed", False, False),  # nothing of the old code is left
    ],
)
def test_a_run_does_not_go_on_with_other_code_of_a_plugin(
    tmp_path: Path, status: str, saved: bool, refused: bool
) -> None:
    directory = RunDirectory(tmp_path)
    if saved:
        (directory.checkpoints / "step-00000003").mkdir(parents=True)
    before = {"hash": "01234567", "status": status, "plugins": {"mine:register": "1, code a"}}
    check_same_run(directory, before, "01234567", {"mine:register": "1, code a"})
    given = pytest.raises(ValueError, match=r"mine:register' \(1, code a, now 1, code b\)")
    with given if refused else nullcontext():
        check_same_run(directory, before, "01234567", {"mine:register": "1, code b"})


def test_a_run_that_goes_on_keeps_what_it_was_and_its_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, out, threads = load("train.epochs=1"), tmp_path / "run", torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    original = step_module.seed_step

    def interrupt(seed: int, step: int) -> None:
        if step in (5, 12):
            os.kill(os.getpid(), signal.SIGTERM)
        original(seed, step)

    monkeypatch.setattr(step_module, "seed_step", interrupt)
    try:
        torch.set_num_threads(2)
        assert train(settings, name="a", out=out, show=False).status == "stopped"
        record = read(out, "run.json")
        record["code"]["commit"] = "aaaa"
        (out / "run.json").write_text(json.dumps(record))
        torch.set_num_threads(1)
        assert train(settings, name="a", out=out, show=False).status == "stopped"
        assert torch.get_num_threads() == min(2, cores())
        monkeypatch.setattr(step_module, "seed_step", original)
        torch.set_num_threads(1)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the user knows better
        assert train(settings, name="a", out=out, show=False).status == "complete"
        assert torch.get_num_threads() == 1
        assert [x["hardware"]["threads"] for x in read(out, "run.json")["earlier"]] == [2, 2]
    finally:
        torch.set_num_threads(threads)
    record = read(out, "run.json")
    assert [x["code"]["commit"] == "aaaa" for x in record["earlier"]] == [True, False]
    assert record["earlier"][1]["code"] == record["code"]
    assert record["earlier"][0]["started"] <= record["earlier"][1]["started"] <= record["started"]
    assert "earlier" not in record["earlier"][1]


def test_a_run_that_saved_nothing_begins_anew(tmp_path: Path) -> None:
    settings, out = load("train.epochs=1"), tmp_path / "run"
    out.mkdir()
    before = {"hash": config.config_hash(build.resolve(settings, build.make_parts([])[0]))}
    (out / "run.json").write_text(json.dumps({**before, "status": "failed"}))
    train(settings, name="a", out=out, show=False)
    assert read(out, "run.json")["earlier"] == []


def test_a_process_that_saved_nothing_has_no_part_in_a_run() -> None:
    first = {"hardware": {"threads": 2}, "begins_at": 0, "earlier": []}
    (kept,) = earlier(first, 5)
    assert kept["hardware"] == {"threads": 2}
    failed = {"hardware": {"threads": 9}, "begins_at": 5, "earlier": [kept]}
    assert earlier(failed, 5) == [kept]
    assert [x["hardware"]["threads"] for x in earlier(failed, 6)] == [2, 9]
