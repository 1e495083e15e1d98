from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import make_batch, make_objective

from hybridvit import config
from hybridvit.engine.bf16 import Bf16Parameters
from hybridvit.engine.run import train


def test_it_computes_as_a_copy_in_bf16_would() -> None:
    objective, copy = make_objective("masked_patch").train(), make_objective("masked_patch").train()
    copy.load_state_dict(objective.state_dict())
    for parameter in copy.parameters():
        parameter.data = parameter.data.bfloat16()
    losses = []
    for module in (Bf16Parameters(objective), copy):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(module(make_batch(4)).loss)
        losses[-1].backward()
    assert torch.equal(*losses)
    for ours, theirs in zip(objective.parameters(), copy.parameters(), strict=True):
        assert ours.dtype == torch.float32
        assert ours.grad is not None
        assert ours.grad.dtype == torch.float32
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad.float())


def test_steps_too_small_for_bf16_add_up() -> None:
    objective = make_objective("masked_patch").train()
    with torch.no_grad():
        objective.model.encoder.norm.weight.fill_(1.0)
    wrapped = Bf16Parameters(objective)
    optimizer = torch.optim.SGD([objective.model.encoder.norm.weight], lr=1.0)
    for _ in range(20):
        # bf16 has no number between 1 and 1 - 2^-8; 20 steps of 2^-11 are two of these.
        optimizer.param_groups[0]["params"][0].grad = torch.full((16,), 2.0**-11)
        optimizer.step()
    assert torch.all(objective.model.encoder.norm.weight == 1 - 20 * 2.0**-11)
    with torch.autocast("cpu", torch.bfloat16):
        moved = wrapped(make_batch(4)).loss
        objective.model.encoder.norm.weight.data.fill_(1.0)
        assert not torch.equal(moved, wrapped(make_batch(4)).loss)


@pytest.mark.parametrize("objective", ["supervised", "masked_patch"])
def test_it_converges_as_autocast_does(tmp_path: Path, objective: str) -> None:
    curves = {}
    for precision in ("fp32", "bf16", "bf16_params"):
        setup = config.load("digits.yaml", [
            f"objective.name={objective}", f"train.precision={precision}", "train.epochs=6",
            "train.batch_size=64", "train.log_every=10", "encoder.args.dim=32",
            "encoder.args.depth=2", "encoder.args.heads=2",
        ])  # fmt: skip
        out = train(setup, name="a", out=tmp_path / precision, show=False).path
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        curves[precision] = torch.tensor([x["train/loss"] for x in lines if "train/loss" in x])
    exact = curves["fp32"]
    assert exact[-1] < 0.8 * exact[0]
    for precision in ("bf16", "bf16_params"):
        # Of the distance from the first loss: rounding to 8 bits at every step, no bias.
        difference = (curves[precision] - exact).abs() / (exact[0] - exact[-1])
        assert difference.mean() < 0.02, precision
