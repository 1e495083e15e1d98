import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import make_batch, make_objective

from hybridvit.config import EvalConfig, OptimConfig, RunConfig, TrainConfig
from hybridvit.engine import fit as engine
from hybridvit.engine.average import MovingAverage
from hybridvit.engine.fabric import Fabric
from hybridvit.engine.fit import Calls, Diverged, Progress
from hybridvit.engine.optim import make_optimizer
from hybridvit.engine.step import Trained, accumulate, seed_step

IMAGES = 64


class Loader:
    """Batches that depend on their position alone, as the real one's do."""

    def __init__(self, poison: int | None = None) -> None:
        self.poison = poison

    def batches(self, start: int, steps: int):
        for position in range(start, start + 16 * steps, 16):
            batch = make_batch(16, seed=position)
            if position // 16 == self.poison:
                batch.images = batch.images * torch.nan
            yield batch


def run(
    config: RunConfig,
    loader: Loader | None = None,
    steps_done: int = 0,
    objective=None,
    calls=lambda step: None,
    saved=lambda progress: None,
    average=None,
):
    objective = objective or make_objective()
    fabric = Fabric(accelerator="cpu", devices=1)
    called, optimizer = fabric.setup(objective, make_optimizer(objective, config.optim))
    trained = Trained(fabric, called, objective, optimizer, average, torch.ones(()))
    seen: dict[str, list[object]] = {"log": [], "evaluate": [], "picture": [], "save": []}

    def note(kind: str, step: int) -> None:
        seen[kind].append(step)
        calls(step)

    made = Calls(
        lambda step, values: seen["log"].append((step, values)),
        lambda step: note("evaluate", step),
        lambda step: seen["picture"].append(step),
        lambda progress: (saved(progress), note("save", progress.step)),
    )
    engine.fit(trained, loader or Loader(), IMAGES, config, Progress(steps_done), made)
    return objective, seen


def config(**train: object) -> RunConfig:
    defaults = {"epochs": 3.0, "batch_size": 16, "log_every": 4}
    return RunConfig(train=TrainConfig(**{**defaults, **train}))


def weights(objective: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in objective.parameters()])


def test_steps_logs_and_evaluations_come_when_due() -> None:
    _, seen = run(config())
    assert [step for step, _ in seen["log"]] == [4, 8, 12]
    assert seen["evaluate"] == seen["save"] == [12]  # every 5 epochs of 4 steps, and at the end
    assert seen["log"][0][1].keys() >= {"lr", "seconds", "images_per_second", "train/loss"}


def test_each_rank_drops_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 as a process alone; with equal random numbers, shares would lose the same places."""
    seeds = []
    for rank in (2, 1, 0):
        monkeypatch.setattr("hybridvit.engine.ranks.rank", lambda rank=rank: rank)
        run(config(epochs=0.25))
        seeds.append(torch.initial_seed())
    monkeypatch.undo()
    seed_step(0, 1)
    assert seeds[2] == torch.initial_seed()
    assert len(set(seeds)) == 3


def test_a_checkpoint_comes_in_time_where_evaluations_are_far_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At log points, where the loss is known to be finite; counted from the last one."""
    now = 0.0

    class Timed(Loader):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds  # of a step

        def batches(self, start: int, steps: int):
            nonlocal now
            for batch in super().batches(start, steps):
                now += self.seconds
                yield batch

    monkeypatch.setattr(engine, "time", SimpleNamespace(perf_counter=lambda: now))
    setup = dataclasses.replace(config(log_every=2), eval=EvalConfig(epochs=1.5))
    assert run(setup, Timed(1))[1]["save"] == [6, 12]
    assert run(setup, Timed(300))[1]["save"] == [4, 6, 10, 12]


def test_what_is_saved_has_the_seconds_of_all_its_steps() -> None:
    """At an evaluation between two log points, too: a run that dies resumes from there."""
    seconds = []
    setup = dataclasses.replace(config(log_every=100), eval=EvalConfig(epochs=1))
    run(
        setup,
        calls=lambda step: None,
        saved=lambda progress: seconds.append(progress.train_seconds),
    )
    assert len(seconds) == 3
    assert 0 < seconds[0] < seconds[1] < seconds[2]


@pytest.mark.parametrize(
    ("epochs", "expected"), [(1.0, [4, 8, 12]), (0.5, [2, 4, 6, 8, 10, 12]), (5.0, [12])]
)
def test_due(epochs: float, expected: list[int]) -> None:
    assert [s for s in range(1, 13) if engine.due(s, epochs, 64, 16, 12)] == expected


def test_the_loop_equals_the_steps_written_out() -> None:
    trained, _ = run(config(epochs=1.0))
    objective = make_objective()
    optimizer = torch.optim.AdamW(
        [
            {"params": g["params"], "weight_decay": g["weight_decay"]}
            for g in make_optimizer(objective, OptimConfig()).param_groups
        ],
        lr=1e-3 / 16,
        betas=(0.9, 0.95),
    )
    objective.train()
    for i, batch in enumerate(Loader().batches(0, 4)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 / 16 * (1 + torch.cos(torch.tensor(torch.pi * i / 4)).item()) / 2
        optimizer.zero_grad()
        objective(batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
    torch.testing.assert_close(weights(trained), weights(objective), rtol=1e-4, atol=1e-7)


def test_accumulated_micro_batches_give_the_gradient_of_the_whole() -> None:
    def gradient(parts: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        objective = make_objective()
        fabric = Fabric(accelerator="cpu", devices=1)
        means = accumulate(fabric, fabric.setup_module(objective), make_batch(16), parts)
        grads = [p.grad.flatten() for p in objective.parameters() if p.grad is not None]
        return torch.cat(grads), means

    (whole, metrics), (parts, means) = gradient(1), gradient(4)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(means, metrics)


def test_the_average_follows_the_weights_after_each_step() -> None:
    objective = make_objective()
    average = MovingAverage(objective, 0.9)
    seen = []
    setup = dataclasses.replace(config(epochs=1.0, log_every=1), eval=EvalConfig(epochs=0.25))
    run(
        setup, objective=objective, average=average, calls=lambda _: seen.append(weights(objective))
    )
    expected = seen[0]
    for after in seen[2::2]:  # evaluation and saving, after each of four steps
        expected = expected + 0.1 * (after - expected)
    assert len(seen) == 8
    torch.testing.assert_close(weights(average.module), expected)


def test_learning_rate_is_per_256_images() -> None:
    config = RunConfig(optim=OptimConfig(lr=1e-3), train=TrainConfig(batch_size=64))
    assert engine.peak_lr(config) == pytest.approx(2.5e-4)


def test_micro_batches_keep_neighbours_together() -> None:
    batch = make_batch(8)
    micro = list(batch.split(len(batch.labels) // 2))
    assert [m.index.tolist() for m in micro] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_run_in_two_parts_with_dropout_draws_the_same() -> None:
    # The state between the parts lies in the objective and optimizer; only random draws could
    # differ, and those follow from the step.
    torch.manual_seed(1)
    seed_step(3, 7)
    first = torch.rand(4)
    torch.manual_seed(2)
    seed_step(3, 7)
    assert torch.equal(first, torch.rand(4))
    seed_step(3, 8)
    assert not torch.equal(first, torch.rand(4))


CONSTANT = OptimConfig(schedule="constant")


def test_a_loss_that_is_not_finite_changes_no_weight() -> None:
    three_steps, _ = run(RunConfig(train=TrainConfig(epochs=0.75, batch_size=16), optim=CONSTANT))
    poisoned = make_objective()
    setup = RunConfig(train=TrainConfig(epochs=3.0, batch_size=16, log_every=4), optim=CONSTANT)
    with pytest.raises(Diverged, match="not finite at step 4"):
        run(setup, Loader(poison=3), objective=poisoned)
    assert torch.equal(weights(poisoned), weights(three_steps))


@pytest.mark.parametrize("clip_norm", [1.0, None])
def test_a_gradient_that_is_not_finite_changes_no_weight(clip_norm: float | None) -> None:
    poisoned = make_objective()
    # The loss stays finite, a gradient does not.
    poisoned.model.encoder.cls_token.register_hook(lambda g: g * torch.inf)
    before = weights(poisoned)
    setup = RunConfig(
        train=TrainConfig(epochs=3.0, batch_size=16, log_every=4),
        optim=OptimConfig(clip_norm=clip_norm),
    )
    with pytest.raises(Diverged, match="gradient is not finite"):
        run(setup, objective=poisoned)
    assert torch.equal(weights(poisoned), before)


def test_nothing_is_saved_or_evaluated_after_a_step_that_was_not_finite() -> None:
    seen: list[int] = []
    setup = RunConfig(
        train=TrainConfig(epochs=3.0, batch_size=16, log_every=100),
        eval=EvalConfig(epochs=1.0),
        optim=CONSTANT,
    )
    with pytest.raises(Diverged, match="not finite at step 8"):
        run(setup, Loader(poison=5), calls=lambda step: seen.append(step))
    assert seen == [4, 4]  # evaluated and saved before, at step 4 alone


def test_frozen_weights_stay_and_others_move() -> None:
    objective = make_objective()
    start = {n: p.detach().clone() for n, p in objective.named_parameters()}
    run(
        RunConfig(
            train=TrainConfig(epochs=1.0, batch_size=16), optim=OptimConfig(freeze=["model.stem"])
        ),
        objective=objective,
    )
    for name, parameter in objective.named_parameters():
        moved = not torch.equal(parameter, start[name])
        assert moved != name.startswith("model.stem"), name


def test_batches_are_drawn_from_the_resumed_position() -> None:
    positions: list[int] = []

    class Recorder(Loader):
        def batches(self, start: int, steps: int):
            positions.extend((start, steps))
            return super().batches(start, steps)

    run(config(), Recorder(), steps_done=5)
    assert positions == [80, 7]


def test_a_fixed_batch_is_overfitted() -> None:
    class Fixed(Loader):
        def batches(self, start: int, steps: int):
            return itertools.repeat(make_batch(16), steps)

    setup = RunConfig(
        train=TrainConfig(epochs=40.0, batch_size=16, log_every=160),
        optim=OptimConfig(lr=0.1, weight_decay=0.0, warmup_epochs=2),
    )
    _, seen = run(setup, Fixed())
    assert seen["log"][-1][1]["train/loss"] < 0.1
