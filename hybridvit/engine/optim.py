"""Optimizer, parameter groups and learning-rate schedule."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn

from hybridvit.config import OptimConfig
from hybridvit.contracts import Objective
from hybridvit.registry import suggest


def make_optimizer(objective: Objective, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW or SGD over the parameter groups, with fused kernels. The loop sets the rates.

    Raises:
        ValueError: a prefix in `freeze` or `lr_factors` that matches no parameter, or nothing
            left to train.
    """
    freeze(objective, config.freeze)
    groups = parameter_groups(objective, config)
    if not groups:
        raise ValueError("optim.freeze leaves no parameter to train; freeze less")
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)


def parameter_groups(objective: Objective, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups of equal weight decay and learning-rate factor, each with its parameters' names."""
    for prefix in config.lr_factors:
        _check_prefix(objective, prefix, "optim.lr_factors")
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = config.weight_decay if decays(name, parameter) else 0.0
        factor = lr_factor(name, objective.model.encoder.depth, config)
        group = groups.setdefault(
            (decay, factor),
            {"params": [], "names": [], "weight_decay": decay, "factor": factor},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to norms, biases, tokens and positions."""
    leaf = name.rpartition(".")[2]
    return parameter.ndim >= 2 and not re.search(r"token|pos_embed|position|latent", leaf)


def lr_factor(name: str, depth: int, config: OptimConfig) -> float:
    """Product of the part's factor (longest matching prefix) and layer-wise decay."""
    prefixes = [p for p in config.lr_factors if matches(name, p)]
    factor = config.lr_factors[max(prefixes, key=len)] if prefixes else 1.0
    return factor * float(config.layer_decay ** (depth + 1 - layer_of(name, depth)))


def layer_of(name: str, depth: int) -> int:
    """0 for stem, tokens and positions, k for the k-th block, depth + 1 for all that follows."""
    block = re.match(r"model\.encoder\.blocks\.(\d+)\.", name)
    if block:
        return int(block.group(1)) + 1
    first = r"model\.(stem\.|encoder\.(cls_token|reg_token|pos_embed|norm_pre))"
    return 0 if re.match(first, name) else depth + 1


def matches(name: str, prefix: str) -> bool:
    """Whether a parameter lies under a prefix such as `model.stem`."""
    return name == prefix or name.startswith(prefix + ".")


def schedule(step: int, steps: int, warmup: int, kind: str) -> float:
    """Factor of the peak learning rate at step 1 .. steps; a decay ends at 0 after the last."""
    if step <= warmup:
        return step / warmup
    if kind == "constant":
        return 1.0
    progress = (step - 1 - warmup) / max(1, steps - warmup)
    return 1 - progress if kind == "linear" else (1 + math.cos(math.pi * progress)) / 2


def freeze(objective: Objective, prefixes: list[str]) -> None:
    """Let all parameters below the prefixes stay as they are; they then have no gradient, which
    saves a part of the backward pass.

    Raises:
        ValueError: a prefix that no parameter has.
    """
    for prefix in prefixes:
        _check_prefix(objective, prefix, "optim.freeze")
        for name, parameter in objective.named_parameters():
            if matches(name, prefix):
                parameter.requires_grad_(False)


def _check_prefix(objective: Objective, prefix: str, key: str) -> None:
    names = [name for name, _ in objective.named_parameters()]
    if not any(matches(name, prefix) for name in names):
        parents = {".".join(n.split(".")[:k]) for n in names for k in (1, 2, 3)}
        raise ValueError(
            f"config: {key}: no parameter lies under {prefix!r}{suggest(prefix, parents)}; "
            "prefixes look like model.stem or model.encoder.blocks.0"
        )
