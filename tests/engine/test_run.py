"""Whole runs on the digits: record, resume, stop, refuse."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from hybridvit import build, config
from hybridvit.cli import main
from hybridvit.config import RunConfig
from hybridvit.data.dataset import Dataset
from hybridvit.data.splits import DecodedSplit
from hybridvit.engine import checkpoint
from hybridvit.engine import session as session_module
from hybridvit.engine import step as step_module
from hybridvit.engine.fabric import make_fabric
from hybridvit.engine.run import train
from hybridvit.engine.runlog import RunDirectory
from hybridvit.engine.session import Session
from hybridvit.engine.step import seed_step

SMALL = [
    "encoder.args.dim=16",
    "encoder.args.depth=1",
    "encoder.args.heads=2",
    "encoder.args.dropout=0.1",
    "train.epochs=2",
    "train.batch_size=64",
    "train.log_every=5",
    "eval.epochs=1",
    "train.ema=0.9",
]


def load(*overrides: str) -> RunConfig:
    return config.load("digits.yaml", [*SMALL, *overrides])


def read(folder: Path, name: str) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / name).read_text())
    return content


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_whole_record(tmp_path: Path) -> None:
    outcome = train(
        load("objective.name=masked_patch", "eval.probes=[knn,linear]"),
        name="digits",
        out=tmp_path / "run",
        arm={"stem": "linear"},
        show=False,
    )
    assert outcome.status == "complete"
    record = read(outcome.path, "run.json")
    assert record["status"] == "complete"
    assert record["arm"] == {"stem": "linear"}
    assert record["data"]["train"] + record["data"]["val"] + record["data"]["test"] == 1797
    assert record["model"]["tokens"] == 16
    assert record["packages"]["torch"] == torch.__version__.split("+")[0]
    results = read(outcome.path, "summary.json")["results"]
    assert results.keys() == {
        "test/knn",
        "test/linear",
        "untrained/test/knn",
        "untrained/test/linear",
    }
    assert (outcome.path / "config.yaml").is_file()
    logged = [line["step"] for line in lines(outcome.path) if "train/loss" in line]
    assert logged == [5, 10, 15, 20, 25, 30, 35, 40]
    # 1,294 training images make 20.2 steps an epoch.
    assert [line["step"] for line in lines(outcome.path) if "val/knn" in line] == [21, 40]
    assert list((outcome.path / "figures").glob("reconstructions-*.png"))
    kept = list((outcome.path / "checkpoints").iterdir())
    assert [p.name for p in kept] == ["step-00000040"]


def prepared(settings: RunConfig, folder: Path) -> Session:
    fabric = make_fabric(settings.train.precision)
    parts, _ = build.make_parts([])
    return Session(settings, parts, RunDirectory(folder), fabric, show=False)


def test_what_a_seed_varies_and_what_not(tmp_path: Path) -> None:
    """As the report says: initialisation, order, augmentation, masks and dropout, not the split."""

    def session(seed: int) -> Session:
        masks = ["objective.name=simmim", "objective.args.unit=1", "data.augment.crop=pad"]
        settings = load(*masks, f"seed={seed}")
        return prepared(settings, tmp_path)

    a, b, again = session(0), session(1), session(0)
    for split in ("train_split", "val_split"):
        assert torch.equal(getattr(a, split).index, getattr(b, split).index)
    assert torch.equal(a.dataset.test.labels, b.dataset.test.labels)
    others = b.objective.state_dict()
    for name, weight in a.objective.state_dict().items():
        assert torch.equal(weight, again.objective.state_dict()[name])
        if name.endswith(("proj.weight", "pos_embed", "mask_token", "decoder.weight")):
            assert not torch.equal(weight, others[name])

    def epoch(of: Session) -> tuple[list[int], dict[int, tuple[Tensor, Tensor]]]:
        """The order of the images, and each as it was augmented, with its key."""
        images: dict[int, tuple[Tensor, Tensor]] = {}
        for batch in of.loader.batches(0, len(of.train_split) // 64):
            places = batch.index.tolist()
            images |= {i: (batch.images[n], batch.key[n]) for n, i in enumerate(places)}
        return list(images), images

    (first, x), (second, y), (same, z) = (epoch(of) for of in (a, b, again))
    assert first == same != second
    assert all(torch.equal(x[i][0], z[i][0]) for i in first)
    shared = sorted(set(first) & set(second))
    shifted = [i for i in shared if not torch.equal(x[i][0], y[i][0])]
    assert len(shifted) > 0.9 * len(shared)
    drawn = [a.objective.masking.draw(torch.stack([s[i][1] for i in shared])) for s in (x, y)]
    assert (drawn[0] != drawn[1]).flatten(1).any(dim=1).float().mean() > 0.9
    noise = []
    for seed in (0, 1):
        seed_step(seed, 7)
        noise.append(torch.rand(5))
    assert not torch.equal(*noise)


@pytest.mark.parametrize(
    ("objective", "metric"), [("supervised", "val/accuracy"), ("masked_patch", "val/knn")]
)
def test_a_run_that_tunes_never_looks_at_the_test_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str, metric: str
) -> None:
    class Untouched:
        def __len__(self) -> int:
            return 1

    made = build.make_dataset

    def without_test(*args: Any) -> Dataset:
        return dataclasses.replace(made(*args), test=Untouched())

    monkeypatch.setattr(build, "make_dataset", without_test)
    settings = load(f"objective.name={objective}", "eval.probes=[knn,linear]")
    outcome = train(settings, name="digits", out=tmp_path / "run", tunes=True, show=False)
    assert outcome.status == "complete"
    assert read(outcome.path, "run.json")["kind"] == "tune"
    results = read(outcome.path, "summary.json")["results"]
    assert results == {metric: lines(outcome.path)[-1][metric]}
    assert not (outcome.path / "predictions.json").exists()
    with pytest.raises(AttributeError, match="Untouched"):
        train(settings, name="digits", out=tmp_path / "other", show=False)


def test_the_recorded_config_gives_the_same_run(tmp_path: Path) -> None:
    first = train(load(), name="a", out=tmp_path / "a", show=False)
    again = config.load(first.path / "config.yaml")
    second = train(again, name="b", out=tmp_path / "b", show=False)
    assert read(first.path, "run.json")["hash"] == read(second.path, "run.json")["hash"]
    one, two = (checkpoint.latest(r.path / "checkpoints") for r in (first, second))
    assert one is not None
    assert two is not None
    for name, tensor in checkpoint.read_weights(one).items():
        assert torch.equal(tensor, checkpoint.read_weights(two)[name]), name


def test_a_complete_run_says_so_and_changes_nothing(tmp_path: Path) -> None:
    first = train(load(), name="a", out=tmp_path / "a", show=False)
    before = {p: p.stat().st_mtime_ns for p in first.path.rglob("*") if p.name != ".lock"}
    second = train(load(), name="a", out=tmp_path / "a", show=False)
    assert "already complete" in second.message
    assert {p: p.stat().st_mtime_ns for p in first.path.rglob("*") if p.name != ".lock"} == before
    (first.path / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"complete but has no summary\.json; remove it"):
        train(load(), name="a", out=tmp_path / "a", show=False)


def test_a_batch_of_more_images_than_there_are_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(load("data.train_images=32", "train.epochs=1"), name="a", out=tmp_path / "a")
    told = "warning: train.batch_size=64 takes each of the 32 training images 2 times a step; set"
    assert told in capfd.readouterr().err
    train(load("data.train_images=64", "train.epochs=1"), name="b", out=tmp_path / "b")
    assert "warning" not in capfd.readouterr().err


def test_a_stopped_and_resumed_run_equals_one_in_one_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(load(), name="a", out=tmp_path / "whole", show=False)
    original = step_module.seed_step

    def interrupt(seed: int, step: int) -> None:
        if step == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        original(seed, step)

    monkeypatch.setattr(step_module, "seed_step", interrupt)
    stopped = train(load(), name="a", out=tmp_path / "parts", show=False)
    assert stopped.status == "stopped"
    assert "SIGTERM after step 13 of 40" in stopped.message
    assert "run the same command again" in stopped.message
    assert read(stopped.path, "run.json")["status"] == "stopped"
    assert not (stopped.path / "summary.json").exists()

    monkeypatch.setattr(step_module, "seed_step", original)
    resumed = train(load(), name="a", out=tmp_path / "parts", show=False)
    assert resumed.status == "complete"
    for name in (checkpoint.WEIGHTS, checkpoint.EMA):
        one, two = (
            checkpoint.read_weights(p / "checkpoints" / "step-00000040", name)
            for p in (whole.path, resumed.path)
        )
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert (
        read(whole.path, "summary.json")["results"] == read(resumed.path, "summary.json")["results"]
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "where", ["hybridvit.engine.session.fit", "hybridvit.engine.session.Session.final_results"]
)
def test_a_signal_outside_of_training_closes_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int
) -> None:
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)  # the handler runs before it is over

    monkeypatch.setattr(where, interrupt)
    outcome = train(load(), name="a", out=tmp_path / "a", show=False)
    assert outcome.status == read(outcome.path, "run.json")["status"] == "stopped"
    assert "run the same command again to go on" in outcome.message
    assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize(
    ("number", "streamed", "said"),
    [
        (signal.SIGINT, False, "stopped by SIGINT"),
        (signal.SIGINT, True, "stopped by SIGINT"),
        (signal.SIGTERM, True, "stopped by "),  # ends the workers, and with them the evaluation
    ],
)
def test_a_signal_to_all_processes_saves_and_says_how_to_go_on(
    number: signal.Signals, streamed: bool, said: str, tmp_path: Path
) -> None:
    """Decode workers are told, too, and they are needed: each step is evaluated."""
    workers = ["data.resident=false", "data.workers=1", "train.batch_size=8", "eval.epochs=0.1"]
    command = [
        sys.executable,
        "-m",
        "hybridvit.cli",
        "train",
        "digits.yaml",
        *SMALL,
        *([make_folder(tmp_path / "set"), *workers] if streamed else []),
        "train.epochs=500",
        f"out={tmp_path / 'run'}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert said in out
    assert "run the same command again to go on" in out
    assert "Traceback" not in err
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") is not None


def test_a_diverged_run_is_recorded_as_that(tmp_path: Path) -> None:
    setup = load("optim.lr=1e30", "optim.clip_norm=null", "optim.name=sgd", "optim.warmup_epochs=0")
    outcome = train(setup, name="a", out=tmp_path / "a", show=False)
    assert outcome.status == "diverged"
    assert "try a lower optim.lr" in outcome.message
    assert read(outcome.path, "run.json")["status"] == "diverged"
    assert not (outcome.path / "summary.json").exists()


def test_another_configs_directory_is_refused(tmp_path: Path) -> None:
    train(load(), name="a", out=tmp_path / "a", show=False)
    with pytest.raises(ValueError, match=r"holds the run .* of another config"):
        train(load("seed=1"), name="a", out=tmp_path / "a", show=False)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        train(load(), name="a", out=tmp_path, show=False)


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    from hybridvit.engine.runlog import RunDirectory

    with (
        RunDirectory(tmp_path / "a").locked(),
        pytest.raises(ValueError, match="in use by another process"),
    ):
        train(load(), name="a", out=tmp_path / "a", show=False)


def test_the_untrained_probe_is_of_the_same_seeds_start(tmp_path: Path) -> None:
    overrides = ["objective.name=masked_patch", "eval.probes=[knn]"]
    frozen = ["optim.freeze=[model]"]
    outcome = train(load(*overrides, *frozen), name="a", out=tmp_path / "a", show=False)
    results = read(outcome.path, "summary.json")["results"]
    assert results["test/knn"] == results["untrained/test/knn"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stem", ["linear", "resnet"])
@pytest.mark.parametrize("objective", ["supervised", "masked_patch"])
def test_every_pair_trains(tmp_path: Path, stem: str, objective: str, precision: str) -> None:
    stems = {
        "linear": "stem={name: linear, args: {patch: 2}}",
        "resnet": "stem={name: resnet, args: {width: 0.125, blocks: [1], strides: [2], "
        "root_kernel: 3, root_stride: 1, root_pool: false}}",
    }
    setup = load(stems[stem], f"objective.name={objective}", f"train.precision={precision}")
    outcome = train(setup, name="a", out=tmp_path / "a", show=False)
    assert outcome.status == "complete"
    losses = [line["train/loss"] for line in lines(outcome.path) if "train/loss" in line]
    assert losses[-1] < losses[0]


def test_tensorboard_gets_the_metrics(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    outcome = train(load("train.tensorboard=true"), name="a", out=tmp_path / "a", show=False)
    assert list((outcome.path / "tensorboard").glob("events*"))


def test_streaming_equals_resident(tmp_path: Path) -> None:
    runs = [
        train(load(f"data.resident={r}", "data.workers=0"), name="a", out=tmp_path / r, show=False)
        for r in ("true", "false")
    ]
    one, two = (checkpoint.read_weights(r.path / "checkpoints" / "step-00000040") for r in runs)
    assert all(torch.equal(one[key], two[key]) for key in one)


def make_folder(folder: Path) -> str:
    """60 small images of two classes; an override that trains on them."""
    for value, name in enumerate(("a", "b")):
        (folder / name).mkdir(parents=True)
        for i in range(30):
            Image.new("L", (8, 8), 5 * i + value).save(folder / name / f"{i}.png")
    return f"data={{name: image_folder, args: {{root: {folder}, image_size: 8}}}}"


def test_a_streamed_run_starts_workers_for_training_and_for_evaluation_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    start = multiprocessing.Process.start
    monkeypatch.setattr(
        multiprocessing.Process, "start", lambda self: (started.append(self.name), start(self))[1]
    )
    before_training: list[int] = []
    fit = session_module.fit
    monkeypatch.setattr(
        "hybridvit.engine.session.fit", lambda *a: (before_training.append(len(started)), fit(*a))
    )
    settings = load(make_folder(tmp_path / "set"), "data.resident=false", "data.workers=1",
                    "train.epochs=6", "train.picture_epochs=2", "objective.name=masked_patch",
                    "eval.probes=[knn]", "eval.epochs=2")  # fmt: skip
    assert train(settings, name="a", out=tmp_path / "a", show=False).status == "complete"
    evaluations = [line for line in lines(tmp_path / "a") if "val/knn" in line]
    assert len(evaluations) > 1
    assert before_training == [1]  # evaluation's, which would else be copies of all that grew
    assert len(started) == 2


@pytest.mark.parametrize(("resident", "decodings"), [("null", 1), ("false", 2)])
def test_validation_and_test_images_are_decoded_once(
    resident: str, decodings: int, tmp_path: Path, cache_folder: Path
) -> None:
    images = make_folder(tmp_path / "set")
    settings = load(images, f"data.resident={resident}", "data.workers=0")
    session = prepared(settings, tmp_path)
    for split in (session.val_split, session.dataset.test):
        assert isinstance(split, DecodedSplit)
        decode, decoded = split.decode, []
        split.decode = lambda i, decode=decode, seen=decoded: (seen.append(i), decode(i))[1]
        first, again = (list(session.evaluator.batches(split)) for _ in range(2))
        assert len(decoded) == decodings * len(split)
        for one, other in zip(first, again, strict=True):
            assert torch.equal(one.images, other.images)
        stored = split.read_many(range(len(split)))
        assert torch.equal(first[0].images[:, 0].cpu(), stored[:, 0] / 255)
    assert len(list(cache_folder.glob("*.pixels"))) == (3 if decodings == 1 else 0)


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b""])
def test_a_record_that_is_none_is_one_line(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_bytes(content)
    assert main(["train", "digits.yaml", f"out={tmp_path}"]) == 2
    assert "run.json is no record of a run; remove" in capsys.readouterr().err


def test_threads_that_no_machine_has_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Torch would be killed as it starts them."""
    assert main(["train", "digits.yaml", "train.threads=20000"]) == 2
    assert "train.threads=20000 should be 1 to 1024" in capsys.readouterr().err
