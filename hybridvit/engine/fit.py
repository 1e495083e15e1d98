"""The training loop. It knows no model: an objective gives a loss, everything else is here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from hybridvit.config import RunConfig
from hybridvit.data.loader import TrainLoader
from hybridvit.engine import ranks
from hybridvit.engine.device import wait_for_device
from hybridvit.engine.optim import schedule
from hybridvit.engine.signals import blamed, stop_signals
from hybridvit.engine.step import Trained, take_step

SAVE_SECONDS = 900  # between checkpoints at the most, where evaluations are farther apart


class Diverged(Exception):
    """A loss or gradient was not finite; the weights are those before that step."""


class Stopped(Exception):
    """A signal asked the run to stop; its state is saved."""


@dataclass
class Progress:
    """How far a run is; saved with every checkpoint."""

    step: int = 0
    train_seconds: float = 0.0  # without evaluation and saving
    rates: list[float] = field(default_factory=list)  # images/s between log points


@dataclass
class Calls:
    """What happens beside the steps, all ordinary functions."""

    log: Callable[[int, dict[str, float]], None]
    evaluate: Callable[[int], None]
    picture: Callable[[int], None]
    save: Callable[[Progress], None]


def fit(
    trained: Trained,
    loader: TrainLoader,
    images: int,
    config: RunConfig,
    progress: Progress,
    calls: Calls,
) -> None:
    """Train from `progress.step` to the last step.

    Args:
        images: size of the training set.

    Raises:
        Diverged: a loss or gradient was not finite.
        Stopped: SIGINT or SIGTERM arrived; everything was saved first.
    """
    train, steps = config.train, total_steps(config, images)
    warmup = round(config.optim.warmup_epochs * images / train.batch_size)
    peaks = [peak_lr(config) * group["factor"] for group in trained.optimizer.param_groups]
    batches = loader.batches(progress.step * train.batch_size, steps - progress.step)
    clock, saved = Clock(progress, train.batch_size), time.perf_counter()
    with stop_signals() as signals:
        for step in range(progress.step + 1, steps + 1):
            factor = schedule(step, steps, warmup, config.optim.schedule)
            rates = [peak * factor for peak in peaks]
            with blamed(signals):
                output = take_step(trained, config, next(batches), step, rates)
            progress.step = step

            stop = ranks.asked(signals)
            logs = step % train.log_every == 0 or step == steps or bool(stop)
            evaluates = due(step, config.eval.epochs, images, train.batch_size, steps)
            pictures = due(step, train.picture_epochs, images, train.batch_size, steps)
            if not (logs or evaluates or pictures):
                continue
            if not trained.finite:
                raise Diverged(
                    f"loss or gradient is not finite at step {step} or up to "
                    f"{train.log_every - 1} steps before"
                )
            clock.lap()  # the seconds are logged or saved
            if logs:
                means = {name: ranks.mean(value) for name, value in output.items()}
                calls.log(step, {"lr": max(rates), **clock.times(), **host(means)})
            with clock.paused():
                with blamed(signals):
                    if evaluates:
                        calls.evaluate(step)
                    if pictures:
                        calls.picture(step)
                if evaluates or stop or time.perf_counter() - saved > SAVE_SECONDS:
                    calls.save(progress)
                    saved = time.perf_counter()
            if stop:
                ranks.asked([])  # waits until it is saved: one that ends has the others killed
                raise Stopped(f"stopped by {stop[0]} after step {step} of {steps}")


def peak_lr(config: RunConfig) -> float:
    """The learning rate after warm-up: it is configured per 256 images."""
    return config.optim.lr * config.train.batch_size / 256


def total_steps(config: RunConfig, images: int) -> int:
    """Optimizer steps of a run on a training set of `images`."""
    return max(1, round(config.train.epochs * images / config.train.batch_size))


def due(step: int, epochs: float, images: int, batch_size: int, steps: int) -> bool:
    """Whether `step` is the first after another `epochs` epochs, or the last."""
    per = epochs * images / batch_size
    return step == steps or math.floor(step / per) > math.floor((step - 1) / per)


def host(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Metrics as numbers, with their `train/` names."""
    return {f"train/{name}": float(value) for name, value in metrics.items()}


class Clock:
    """Training time and throughput, without evaluation and saving."""

    def __init__(self, progress: Progress, batch_size: int) -> None:
        self.progress, self.batch_size = progress, batch_size
        self.step, self.mark = progress.step, time.perf_counter()

    def lap(self) -> None:
        """Account for the steps since the last lap."""
        wait_for_device()
        now = time.perf_counter()
        images = (self.progress.step - self.step) * self.batch_size
        self.progress.train_seconds += now - self.mark
        if images:
            self.progress.rates.append(images / (now - self.mark))
        self.step, self.mark = self.progress.step, now

    def times(self) -> dict[str, float]:
        """Seconds trained so far and the latest throughput."""
        rates = self.progress.rates
        return {
            "seconds": self.progress.train_seconds,
            "images_per_second": rates[-1] if rates else 0.0,
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside; steps that a GPU still computes are counted first."""
        wait_for_device()
        now = time.perf_counter()
        yield
        wait_for_device()
        self.mark += time.perf_counter() - now
