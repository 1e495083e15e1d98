import math

import pytest
import torch
from conftest import make_objective

from hybridvit.config import OptimConfig
from hybridvit.engine import optim


def test_weight_decay_leaves_out_norms_biases_tokens_and_positions() -> None:
    objective = make_objective("masked_patch", "resnet")
    groups = optim.parameter_groups(objective, OptimConfig(weight_decay=0.3))
    decayed = {n for g in groups if g["weight_decay"] == 0.3 for n in g["names"]}
    spared = {n for g in groups if g["weight_decay"] == 0 for n in g["names"]}
    modules = dict(objective.named_modules())
    for name in decayed:
        module = modules[name.rpartition(".")[0]]
        assert isinstance(module, torch.nn.Linear | torch.nn.Conv2d), name
        assert name.endswith("weight"), name
    for name in ("mask_token", "model.encoder.cls_token", "model.encoder.pos_embed"):
        assert name in spared
    assert decayed | spared == {n for n, _ in objective.named_parameters()}
    # Every weight of a linear or convolutional layer is decayed.
    weights = {
        f"{n}.weight"
        for n, m in modules.items()
        if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
    }
    assert decayed == weights


def test_layer_decay_goes_down_with_depth() -> None:
    config = OptimConfig(layer_decay=0.5)
    factors = {
        name: optim.lr_factor(name, 2, config)
        for name in (
            "model.stem.proj.weight",
            "model.encoder.pos_embed",
            "model.encoder.blocks.0.mlp.fc1.weight",
            "model.encoder.blocks.1.mlp.fc1.weight",
            "model.encoder.norm.weight",
            "model.head.weight",
        )
    }
    assert list(factors.values()) == [0.125, 0.125, 0.25, 0.5, 1.0, 1.0]


def test_the_longest_prefix_sets_the_factor() -> None:
    config = OptimConfig(lr_factors={"model": 0.5, "model.stem": 0.1})
    assert optim.lr_factor("model.stem.proj.weight", 2, config) == 0.1
    assert optim.lr_factor("model.encoder.cls_token", 2, config) == 0.5
    assert optim.lr_factor("decoder.weight", 2, config) == 1.0


def test_frozen_parts_are_not_optimized() -> None:
    objective = make_objective()
    optimizer = optim.make_optimizer(objective, OptimConfig(freeze=["model.stem"]))
    trained = {n for g in optimizer.param_groups for n in g["names"]}
    assert not any(n.startswith("model.stem") for n in trained)
    assert not objective.model.stem.proj.weight.requires_grad


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimConfig(freeze=["model.stm"]), r"no parameter lies under 'model.stm', did you mean"),
        (OptimConfig(lr_factors={"stem": 1.0}), "optim.lr_factors: no parameter lies under 'stem'"),
        (OptimConfig(freeze=["model"]), "leaves no parameter"),
    ],
)
def test_errors(config: OptimConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.make_optimizer(make_objective(), config)


def test_schedules_in_closed_form() -> None:
    cosine = [optim.schedule(s, 10, 2, "cosine") for s in range(1, 11)]
    assert cosine[:3] == [0.5, 1.0, 1.0]
    for s in range(3, 11):
        assert cosine[s - 1] == pytest.approx(0.5 + 0.5 * math.cos(math.pi * (s - 3) / 8))
    linear = [optim.schedule(s, 10, 2, "linear") for s in range(3, 11)]
    assert linear == pytest.approx([1 - k / 8 for k in range(8)])
    assert [optim.schedule(s, 10, 2, "constant") for s in (1, 2, 10)] == [0.5, 1.0, 1.0]
    assert optim.schedule(1, 1, 0, "cosine") == 1.0


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_step_equals_the_textbook(name: str) -> None:
    # One step from fresh state, computed by hand in float64.
    objective = make_objective().double()
    config = OptimConfig(name=name, lr=0.1, weight_decay=0.0, betas=(0.9, 0.95))
    optimizer = optim.make_optimizer(objective, config)
    weight = objective.model.stem.proj.weight
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    grad = weight.grad.clone()
    optimizer.step()
    step = grad / (grad.abs() + 1e-8) if name == "adamw" else grad
    torch.testing.assert_close(weight.detach(), before - 0.1 * step)
