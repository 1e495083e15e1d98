"""What only a GPU can show; skipped without one."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybridvit import config, draws
from hybridvit.data.augment import Augment, augment
from hybridvit.engine import step as step_module
from hybridvit.engine.bench import Steps
from hybridvit.engine.run import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_draws_are_equal_on_both_devices() -> None:
    keys = draws.image_keys(3, torch.arange(64) % 4, torch.arange(64))
    for function in (draws.uniform, draws.permutation):
        on_gpu = function(keys.cuda(), draws.stream("x"), 50)
        assert torch.equal(on_gpu.cpu(), function(keys, draws.stream("x"), 50))


@pytest.mark.parametrize("stem", ["linear", "resnet"])
@pytest.mark.parametrize("objective", ["supervised", "masked_patch"])
def test_a_stopped_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stem: str, objective: str
) -> None:
    stems = {
        "linear": "stem={name: linear, args: {patch: 2}}",
        "resnet": "stem={name: resnet, args: {width: 0.125, blocks: [1], strides: [2], "
        "root_kernel: 3, root_stride: 1, root_pool: false}}",
    }
    overrides = [stems[stem], f"objective.name={objective}", "train.epochs=2", "train.ema=0.9"]
    setup = config.load("digits.yaml", [*overrides, "train.precision=bf16", "eval.probes=[knn]"])
    original = step_module.seed_step

    def interrupt(seed: int, step: int) -> None:
        if step == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        original(seed, step)

    monkeypatch.setattr(step_module, "seed_step", interrupt)
    assert train(setup, name="a", out=tmp_path / "a", show=False).status == "stopped"
    monkeypatch.setattr(step_module, "seed_step", original)
    assert train(setup, name="a", out=tmp_path / "a", show=False).status == "complete"


HOWS = {
    "pad": Augment(crop="pad", flip=True),
    "resized": Augment(crop="resized", flip=True, erase=0.5),
    "rand": Augment(policy="rand"),
    "trivial": Augment(policy="trivial"),
    "contrastive": Augment(crop="resized", jitter=0.5, grayscale=0.2, blur=0.5),
}


@pytest.mark.parametrize("how", HOWS)
def test_images_are_augmented_equally_on_both_devices(how: str) -> None:
    """But for rounding, which may choose another pixel of the source or grey value here and
    there."""
    images = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8)
    key = draws.image_keys(0, torch.zeros(256, dtype=torch.int64), torch.arange(256))
    here = augment(images, key, HOWS[how], (32, 32))
    there = augment(images.cuda(), key.cuda(), HOWS[how], (32, 32)).cpu()
    assert (here - there).abs().mean() < 1 / 255 / 4


@contextmanager
def no_waiting() -> Iterator[None]:
    """Have the host fail where it would wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("resident", ["true", "false"])
@pytest.mark.parametrize("objective", ["supervised", "masked_patch", "mae", "simmim", "dino"])
def test_steps_wait_for_nothing(objective: str, resident: str) -> None:
    overrides = [f"objective.name={objective}", "train.precision=bf16", "train.ema=0.9"]
    overrides += [f"data.resident={resident}", "data.workers=0"]
    if objective == "dino":
        overrides.append("data.augment.crop=resized")
    steps = Steps(config.load("digits.yaml", overrides))
    for _ in range(3):  # the first ones send what they keep
        steps.run(lambda _: None)
    with no_waiting():
        # Over the end of what is augmented together, so that more is, and of an epoch.
        for _ in range(steps.session.loader.together + 5):
            steps.run(lambda _: None)


def losses(out: Path, *overrides: str) -> Tensor:
    fixed = ["train.epochs=6", "train.log_every=10", "train.batch_size=64"]
    path = train(config.load("digits.yaml", [*fixed, *overrides]), name="a", out=out, show=False)
    lines = (path.path / "metrics.jsonl").read_text().splitlines()
    return torch.tensor([x["train/loss"] for x in map(json.loads, lines) if "train/loss" in x])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("objective", ["supervised", "mae"])
@pytest.mark.parametrize(
    "fast",
    [
        ["train.compile=blocks"],
        ["train.compile=whole"],
        ["train.compile=graphs"],
        ["train.compile=whole", "train.precision=bf16_params"],
        ["train.grad_checkpointing=true"],
        ["data.resident=false", "data.workers=2"],
    ],
    ids=" ".join,
)
def test_a_fast_path_trains_as_the_plain_one(
    tmp_path: Path, fast: list[str], objective: str
) -> None:
    """Within 2 % of what the plain loss falls by, on the mean of the curve."""
    chosen = [f"objective.name={objective}", "train.precision=bf16"]
    plain = losses(tmp_path / "plain", *chosen)
    ours = losses(tmp_path / "fast", *chosen, *fast)
    assert (ours - plain).abs().mean() < 0.02 * (plain[0] - plain[-1])
