from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from conftest import make_batch, make_objective
from torch import Tensor, autocast, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hybridvit.engine.bf16 import Bf16Parameters
from hybridvit.objectives import OBJECTIVES
from hybridvit.stems import STEMS


def test_it_computes_as_a_copy_in_bf16_would() -> None:
    objective, copy = make_objective("masked_patch").train(), make_objective("masked_patch").train()
    copy.load_state_dict(objective.state_dict())
    for name, parameter in copy.named_parameters():
        if parameter.ndim > 1 or (name.endswith("bias") and "norm" not in name):
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


class Events(TorchDispatchMode):
    """What is cast to bf16 of some tensors, and products, in order."""

    def __init__(self, of: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {tensor.data_ptr(): name for name, tensor in of.items()}
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if str(func) == "aten._to_copy.default" and made.dtype == torch.bfloat16:
            self.found += filter(None, [self.names.get(args[0].data_ptr())])
        elif any(word in str(func) for word in ("mm.", "convolution")):
            self.found.append("product")
        return made


@pytest.mark.parametrize("stem", STEMS)
def test_no_layer_casts_a_parameter(stem: str) -> None:
    """All that autocast would cast in its layer is cast before the first, once."""
    made = make_objective("supervised", stem).train()
    called: tuple[nn.Module, ...] = (made, Bf16Parameters(made))
    cast = []
    for module in called:
        with Events(dict(made.named_parameters())) as events, autocast("cpu", torch.bfloat16):
            module(make_batch(4))
        first = events.found.index("product")
        cast.append((set(events.found[:first]), [n for n in events.found if n != "product"]))
    (early, all_of_it), (copied, all_copied) = cast
    assert set(all_of_it) - early  # else this could not fail
    assert set(all_of_it) <= copied
    assert sorted(copied) == sorted(all_copied)


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
