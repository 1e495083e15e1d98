"""What only a GPU can show; skipped without one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from hybridvit import config, draws
from hybridvit.engine import fit as fit_module
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
    original = fit_module.seed_step

    def interrupt(seed: int, step: int) -> None:
        if step == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        original(seed, step)

    monkeypatch.setattr(fit_module, "seed_step", interrupt)
    assert train(setup, name="a", out=tmp_path / "a", show=False).status == "stopped"
    monkeypatch.setattr(fit_module, "seed_step", original)
    assert train(setup, name="a", out=tmp_path / "a", show=False).status == "complete"
