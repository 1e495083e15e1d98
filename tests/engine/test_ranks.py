"""Runs of several processes beside the same runs of one."""

from __future__ import annotations

import json
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
from safetensors.torch import load_file
from torch import Tensor

from hybridvit import build, config
from hybridvit.cli import SILENCE, main
from hybridvit.data.loader import eval_batches
from hybridvit.engine.checkpoint import latest
from hybridvit.engine.load import load_run
from hybridvit.engine.ranks import asked, check_launch, check_shares
from hybridvit.engine.run import train
from hybridvit.engine.signals import blamed
from hybridvit.evaluation.accuracy import predictions
from hybridvit.objectives import OBJECTIVES

# Without momentum or moments, so that weights are sums of gradients: AdamW would hide a factor.
SMALL = [
    "encoder.args.dim=16",
    "encoder.args.depth=2",
    "encoder.args.heads=2",
    "optim.name=sgd",
    "optim.momentum=0",
    "optim.lr=0.2",
    "optim.warmup_epochs=0",
    "train.epochs=0.25",
    "train.batch_size=64",
    "eval.probes=[]",
]
# BatchNorm of a projection head, as of a stem, has the statistics of a rank's share.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "mae": {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
    "simclr": {"hidden_dim": 32, "output_dim": 16, "batch_norm": False},
    "dino": {"hidden_dim": 32, "bottleneck_dim": 16, "output_dim": 64},
}
RUN = ["--standalone", "--nproc-per-node=2"]
# torchrun's second process would be refused there, where it has no GPU of its own.
needs_two = pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="two ranks want two GPUs, or none"
)


def objective(name: str) -> list[str]:
    args = json.dumps(ARGUMENTS.get(name, {}))
    return [*SMALL, f"objective={{name: {name}, args: {args}}}", "data.augment.crop=resized"]


CASES = {
    **{name: objective(name) for name in OBJECTIVES},
    **{
        f"{name}, in parts": [*objective(name), "train.accumulate=2"] for name in ("simclr", "dino")
    },
    "untrained parts": [*objective("mae"), "encoder.args.pool=map", "encoder.args.fc_norm=true"],
    "mixed, in parts": [
        *objective("supervised"),
        "objective.args={mixup: 0.8, cutmix: 1.0}",
        "train.accumulate=2",
        "train.ema=0.9",
        "eval.batch_size=2000",  # nothing for rank 1
    ],
    "hybrid": [
        *objective("masked_patch"),
        "stem={name: resnet, args: {width: 0.125, blocks: [1], strides: [1], root_kernel: 3, "
        "root_stride: 2, root_pool: false}}",
        "train.grad_checkpointing=true",
    ],
    "compiled": [
        *objective("supervised"),
        "encoder.args.depth=1",
        "train.compile=whole",
        "optim.clip_norm=null",
    ],
    "evaluated in turns": [
        *objective("masked_patch"),
        "eval={probes: [knn, linear], epochs: 0.2, batch_size: 100}",
        "train.picture_epochs=0.2",
    ],
    "masters": [*objective("simmim"), "train.precision=bf16_params"],
}
TOLERANCE = {"masters": 0.02}  # of the way that weights went; gradients in bf16 have 8 bits


def torchrun(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *RUN, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def hybridvit(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line on two ranks."""
    return torchrun("-m", "hybridvit.cli", *arguments)


def told(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The command's own lines on stderr; torchrun adds its own."""
    return [line for line in done.stderr.splitlines() if line.startswith("hybridvit:")]


def weights(run: Path, name: str = "weights") -> dict[str, Tensor]:
    path = latest(run / "checkpoints")
    assert path is not None
    return load_file(path / f"{name}.safetensors")


def initial(overrides: list[str]) -> dict[str, Tensor]:
    parts, _ = build.make_parts([])
    settings = build.resolve(config.load("digits.yaml", overrides), parts)
    made = build.make_objective(settings, parts, build.make_dataset(settings, parts).spec())
    return made.state_dict()


def way(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """How far apart weights are, as a norm."""
    apart = [(a[k].double() - b[k].double()).square().sum() for k in a if a[k].is_floating_point()]
    return float(torch.stack(apart).sum().sqrt())


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


@needs_two
def test_ranks_take_the_steps_of_one_process(tmp_path: Path) -> None:
    """Every objective: the same loss and weights, to rounding, as if one had all images."""
    (tmp_path / "cases.json").write_text(json.dumps(CASES))
    script = Path(__file__).with_name("training_ranks.py")
    done = torchrun(script, tmp_path / "cases.json", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    for name, overrides in CASES.items():
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        eager = [o for o in overrides if o != "train.compile=whole"]
        train(config.load("digits.yaml", eager), name=name, out=one, show=False)
        allowed = TOLERANCE.get(name, 1e-4)
        went = way(weights(one), initial(overrides))
        assert went > 0.01, name
        assert way(weights(one), weights(two)) < allowed * went, name
        assert losses(two) == pytest.approx(losses(one), rel=allowed), name
        if "train.ema=0.9" in overrides:
            assert way(weights(one, "ema"), weights(two, "ema")) < allowed * went, name
        record = json.loads((two / "run.json").read_text())
        assert (record["status"], record["hardware"]["ranks"]) == ("complete", 2)
        assert results(two) == pytest.approx(results(one), abs=0.01), name  # 4 of 359 images


@needs_two
def test_all_ranks_evaluate_with_the_running_statistics_that_are_kept(tmp_path: Path) -> None:
    """Those of rank 0, whose share of the images is not the others'."""
    overrides = [
        *objective("supervised"),
        "stem={name: conv, args: {channels: [8]}}",
        "optim.name=adamw",
        "optim.lr=0.02",
        "train.batch_size=8",
        "train.epochs=1",
        "eval.batch_size=50",
    ]
    run = tmp_path / "run"
    done = hybridvit("train", "digits.yaml", *overrides, f"out={run}")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr  # torch's, of how it joins gradients, from each rank
    dataset = build.make_dataset(config.load("digits.yaml", overrides), build.make_parts([])[0])
    batches = eval_batches(dataset.test, dataset.image_size, 50, "cpu")
    said, labels = predictions(load_run(run), batches)
    kept = json.loads((run / "predictions.json").read_text())
    assert kept["predicted"]["test/accuracy"] == said.tolist()
    assert kept["labels"] == labels.tolist()


def results(run: Path) -> dict[str, float]:
    """What a run's network, and on the way its validation images, are worth."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seen = {f"{line['step']} {k}": v for line in lines for k, v in line.items() if "val/" in k}
    found: dict[str, float] = json.loads((run / "summary.json").read_text())["results"]
    return found | seen


@needs_two
@pytest.mark.parametrize("streamed", [False, True])
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path, streamed: bool) -> None:
    """Stopped on two ranks by a signal, then brought to its end by one process. Where torchrun ends
    a run it signals the decode workers, too."""
    overrides = [*objective("supervised"), "train.epochs=10", "train.log_every=1"]
    if streamed:
        overrides += [*of(slow_folder(tmp_path)), "data.workers=1"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    stop(run, overrides)
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "stopped", record["error"]
    assert "SIGTERM" in record["error"] or "another rank" in record["error"]
    stopped_at = int(latest(run / "checkpoints").name.removeprefix("step-"))
    assert stopped_at > 0
    if streamed:
        return
    for out in (run, whole):
        train(config.load("digits.yaml", overrides), name="digits", out=out, show=False)
    went = way(weights(whole), initial(overrides))
    # Sums of two ranks are rounded otherwise. A step left out is 3 to 9 thousandths of the way.
    assert way(weights(run), weights(whole)) < 1e-4 * went
    assert stopped_at < int(latest(whole / "checkpoints").name.removeprefix("step-"))
    record = json.loads((run / "run.json").read_text())
    assert [p["hardware"]["ranks"] for p in (*record["earlier"], record)] == [2, 1]


def stop(run: Path, overrides: list[str]) -> None:
    """Train on two ranks, and have torchrun end them once they are at it."""
    command = [sys.executable, "-m", "torch.distributed.run", *RUN, "-m", "hybridvit.cli", "train"]
    with subprocess.Popen(
        [*command, "digits.yaml", *overrides, f"out={run}"], stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)  # torchrun hands it on
        process.communicate()


def of(images: Path) -> list[str]:
    """A config of a folder's images, decoded as they are needed."""
    data = f"data={{name: image_folder, args: {{root: {images}, image_size: 8}}}}"
    return [data, "data.resident=false", "stem.args.patch=2"]


def slow_folder(folder: Path) -> Path:
    """Images that take longer to decode than to train on, so that no batch waits for its step."""
    for number in range(192):
        place = folder / "images" / f"class{number % 2}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(0, 256, (400, 400, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(place)
    return folder / "images"


@needs_two
def test_a_rank_that_fails_fails_the_run(tmp_path: Path) -> None:
    """torchrun then ends the others by a signal, which is not why they end."""
    images = slow_folder(tmp_path)
    last = max(images.rglob("*.png"))
    last.write_bytes(last.read_bytes()[:2000])
    run = tmp_path / "run"
    done = hybridvit("train", "digits.yaml", *SMALL, *of(images), "train.epochs=20", f"out={run}")
    assert any(last.name in line for line in told(done)), done.stderr
    assert json.loads((run / "run.json").read_text())["status"] == "failed"


@needs_two
def test_ranks_end_with_the_first_in_one_line(tmp_path: Path) -> None:
    out = f"out={tmp_path / 'run'}"
    train(config.load("digits.yaml", SMALL), name="digits", out=tmp_path / "run", show=False)
    again = hybridvit("train", "digits.yaml", *SMALL, out)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines() == [
        f"{tmp_path / 'run'} is already complete",
        str(tmp_path / "run"),
    ]
    other = hybridvit("train", "digits.yaml", *SMALL, "seed=1", out)
    assert "holds the run" in told(other)[0]
    assert told(other)[1:] == ["hybridvit: rank 1 ends, because another rank has"]


@pytest.mark.parametrize(
    "command", [["bench", "digits.yaml", "--beside-load"], ["study", "study.yaml"]]
)
def test_what_takes_one_process_says_so(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert main(command) == 2
    assert "WORLD_SIZE=2 asks for several processes, and only" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_what_all_do_wrong_is_told_once(
    rank: str, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("hybridvit.cli.SILENCE", 0)
    assert main(["train", "digits.yaml", "stem.name=patch"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_shares_are_whole_pairs() -> None:
    check_shares(63, 1, 1)
    check_shares(64, 4, 8)
    with pytest.raises(ValueError, match=r"batch_size=64 cannot be shared by 16 ranks .* of 128"):
        check_shares(64, 4, 16)


def test_launches_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE=8 asks for several processes; start them by"):
        check_launch(0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    check_launch(0)  # on CPUs
    check_launch(4)
    with pytest.raises(ValueError, match="has 2 GPUs; use --nproc-per-node=2"):
        check_launch(2)


@pytest.mark.parametrize("said", ["abc", "0", "-2", "1.5", ""])
@pytest.mark.parametrize("command", [["train"], ["bench", "--beside-load"], ["study"]])
def test_a_number_of_processes_that_is_none_is_a_mistake(
    command: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", said)
    assert main([*command, "digits.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"the environment variable WORLD_SIZE={said!r} should be" in line


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_so_is_a_rank_that_is_none(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "x")
    assert main(["list"]) == 2
    assert f"{name}='x' should be a whole number" in capsys.readouterr().err


def test_a_rank_alone_tells_of_mistakes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever sets RANK in a shell."""
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "digits.yaml", "stem.name=patch"]) == 2
    assert "patch" in capsys.readouterr().err


def test_a_rank_that_is_silent_lets_rank_0_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchrun ends rank 0 once another one has ended."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main(["train", "digits.yaml", "stem.name=patch"]) == 2
    assert waited == [SILENCE]


def test_a_signal_is_not_blamed_for_a_rank_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridvit.engine.ranks.count", lambda: 2)
    with pytest.raises(RuntimeError, match="closed by peer"), blamed(["SIGTERM"]):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:545] Connection closed by peer")
    with pytest.raises(KeyboardInterrupt), blamed(["SIGTERM"]):
        raise RuntimeError("a worker has ended")


def test_a_process_alone_asks_itself() -> None:
    assert "WORLD_SIZE" not in os.environ
    assert asked([]) == []
    assert asked(["SIGINT", "SIGTERM"]) == ["SIGINT"]
