from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import make_batch, make_objective

from hybridvit.engine.bf16 import Bf16Parameters
from hybridvit.objectives import OBJECTIVES
from hybridvit.stems import STEMS


def test_it_computes_as_a_copy_in_bf16_would() -> None:
    objective, copy = make_objective("masked_patch").train(), make_objective("masked_patch").train()
    copy.load_state_dict(objective.state_dict())
    for parameter in copy.parameters():
        if parameter.ndim > 1:
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
    position = objective.model.encoder.pos_embed
    position.data.fill_(1.0)
    wrapped = Bf16Parameters(objective)
    optimizer = torch.optim.SGD([position], lr=1.0)
    for _ in range(20):
        # bf16 has no number between 1 and 1 - 2^-8; 20 steps of 2^-11 are two of these.
        optimizer.param_groups[0]["params"][0].grad = torch.full_like(position, 2.0**-11)
        optimizer.step()
    assert torch.all(position == 1 - 20 * 2.0**-11)
    with torch.autocast("cpu", torch.bfloat16):
        moved = wrapped(make_batch(4)).loss
        position.data.fill_(1.0)
        assert not torch.equal(moved, wrapped(make_batch(4)).loss)


@pytest.mark.parametrize("position", ["learned_1d", "sincos_2d", "relative", "rope_2d"])
@pytest.mark.parametrize("stem", STEMS)
def test_every_stem_and_position_takes_it(stem: str, position: str) -> None:
    made = make_objective("masked_patch", stem, encoder_args={"position": position}).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = Bf16Parameters(made)(make_batch(4)).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_takes_it(objective: str) -> None:
    small = {"mae": {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}}
    made, batch = make_objective(objective, **small.get(objective, {})).train(), make_batch(4)
    others = tuple(make_batch(4, seed=view).images for view in range(1, made.views))
    with torch.autocast("cpu", torch.bfloat16):
        loss = Bf16Parameters(made)(dataclasses.replace(batch, others=others)).loss
    loss.backward()
    assert loss.isfinite()
