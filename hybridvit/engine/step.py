"""One training step, as runs take it and as benchmarks measure it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridvit import draws
from hybridvit.config import RunConfig
from hybridvit.contracts import Batch, Objective
from hybridvit.engine import ranks
from hybridvit.engine.average import MovingAverage
from hybridvit.engine.fabric import Fabric


@dataclass
class Trained:
    """What steps move, as Fabric has set it up."""

    fabric: Fabric
    called: Any  # the objective as steps call it, from which all gradients come
    objective: Objective
    optimizer: Any
    average: MovingAverage | None  # updated after each step
    finite: Tensor  # 0 once a loss or gradient was not finite: no later step counts


def take_step(
    trained: Trained,
    config: RunConfig,
    batch: Batch,
    step: int,
    rates: list[float],
    phase: Callable[[str], None] = lambda name: None,
) -> dict[str, Tensor]:
    """Forward, backward and update; the batch's mean loss and metrics.

    The host waits for nothing. Where the loss or the gradient is not finite, no weight moves.

    Args:
        step: from 1; what is drawn at random follows from it.
        rates: the learning rate of each parameter group.
        phase: called with `forward`, `backward` and `optimizer` when these have been done.
    """
    for group, rate in zip(trained.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    seed_step(config.seed, step)
    means = accumulate(trained.fabric, trained.called, batch, config.train.accumulate, phase)
    norm = clip(trained, config.optim.clip_norm)
    loss_is_finite = torch.isfinite(ranks.mean(means["loss"]))
    trained.finite = trained.finite * loss_is_finite * torch.isfinite(norm)
    move(trained, step)
    phase("optimizer")
    return means


def accumulate(
    fabric: Fabric,
    called: Any,
    batch: Batch,
    parts: int,
    phase: Callable[[str], None] = lambda name: None,
) -> dict[str, Tensor]:
    """Forward and backward of a batch in `parts` micro-batches; mean loss and metrics."""
    means: dict[str, Tensor] = {}
    for i, micro in enumerate(batch.split(len(batch.labels) // parts)):
        with fabric.no_backward_sync(called, enabled=i < parts - 1):
            loss, metrics = called(micro)
            phase("forward")
            fabric.backward(loss / parts)
            phase("backward")
        for name, value in {**metrics, "loss": loss.detach()}.items():
            means[name] = means.get(name, 0) + value / parts
    return means


def clip(trained: Trained, limit: float | None) -> Tensor:
    """The gradient's norm, which is then cut to `limit` if there is one."""
    if limit is None:
        gradients = [p.grad for p in trained.called.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)
    norm = trained.fabric.clip_gradients(
        trained.called, trained.optimizer, max_norm=limit, error_if_nonfinite=False
    )
    assert norm is not None
    return norm


def move(trained: Trained, step: int) -> None:
    """All that moves once the gradients are there: weights, teachers, the average.

    The fused optimizer skips its step where `finite` is 0, without the host waiting for the loss.
    """
    trained.optimizer.optimizer.found_inf = 1 - trained.finite
    trained.optimizer.step()
    trained.optimizer.zero_grad()
    trained.objective.after_step(step)
    if trained.average is not None:
        trained.average.update(trained.objective)


def seed_step(seed: int, step: int) -> None:
    """Seed torch for dropout and stochastic depth, so that a resumed run draws the same, and each
    rank otherwise."""
    key = draws.fold(draws.fold(torch.tensor(seed), draws.stream("step")), step)
    rank = ranks.rank()
    drawn = int(draws.fold(key, rank) if rank else key)
    # torch.manual_seed looks for every kind of device, which takes 0.2 ms where there is none.
    torch.default_generator.manual_seed(drawn)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(drawn)
