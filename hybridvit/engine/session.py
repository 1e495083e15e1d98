"""What one process needs to carry a run on, and how it does."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from hybridvit import build
from hybridvit.config import RunConfig
from hybridvit.contracts import Batch
from hybridvit.data.dataset import Dataset
from hybridvit.data.loader import TrainLoader
from hybridvit.data.resident import fits
from hybridvit.data.splits import subset
from hybridvit.encoder.model import HybridViT
from hybridvit.engine import checkpoint, ranks
from hybridvit.engine.allocator import keep_freed_memory
from hybridvit.engine.average import MovingAverage
from hybridvit.engine.compile import check_compile, for_training
from hybridvit.engine.describe import (
    describe_data,
    describe_leakage,
    describe_model,
    leakage_warning,
    probe_batch,
)
from hybridvit.engine.evaluate import Evaluator, evaluated
from hybridvit.engine.fabric import Fabric
from hybridvit.engine.fit import Calls, Diverged, Progress, Stopped, fit, total_steps
from hybridvit.engine.init import start_from
from hybridvit.engine.optim import make_optimizer
from hybridvit.engine.pictures import write_rows
from hybridvit.engine.runlog import RunDirectory
from hybridvit.engine.step import Trained
from hybridvit.evaluation import probes
from hybridvit.evaluation.accuracy import accuracy
from hybridvit.registry import Parts

PICTURED = 8


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    path: Path
    status: str  # complete, stopped or diverged
    message: str  # empty of ranks above 0


class Session:
    """What one process needs to carry a run on: data, objective, optimizer, Fabric."""

    def __init__(
        self,
        config: RunConfig,
        parts: Parts,
        directory: RunDirectory,
        fabric: Fabric,
        show: bool,
    ) -> None:
        self.config, self.parts, self.directory, self.fabric = config, parts, directory, fabric
        check_compile(config.train, self.fabric.device)
        if self.fabric.device.type == "cpu":
            keep_freed_memory()
        self.dataset: Dataset = build.make_dataset(config, parts)
        self.train_split, self.val_split = build.make_splits(config, self.dataset)
        resident = config.data.resident
        self.resident = fits(self.dataset.train) if resident is None else resident
        self.objective = build.make_objective(config, parts, self.dataset.spec())
        self.init = start_from(self.objective, Path(config.init)) if config.init else None
        self.loader = TrainLoader(
            self.train_split,
            config.data.augment,
            self.dataset.image_size,
            batch_size=config.train.batch_size,
            seed=config.seed,
            device=self.fabric.device,
            resident=self.resident,
            workers=config.data.workers,
            views=self.objective.views,
            fill=self.objective.model.mean.flatten().tolist(),
            rank=ranks.rank(),
            world=ranks.count(),
            parts=config.train.accumulate,
        )
        self.evaluator = Evaluator(
            config,
            self.dataset,
            self.train_split,
            self.val_split,
            self.fabric,
            resident=self.loader.resident,
            show=show,
        )
        self.length = len(self.train_split)
        self.optimizer = make_optimizer(self.objective, config.optim)
        ema = config.train.ema
        self.average = MovingAverage(self.objective, ema) if ema else None
        self.evaluated()  # an objective that names none should fail before training
        self.tensorboard: Any = None
        self.bar: Any = None
        self.show = show

    def described(self, *, tests: bool) -> dict[str, Any]:
        """What a run's record says of its data and its model."""
        data = describe_data(self.dataset, len(self.train_split), len(self.val_split), tests=tests)
        found = {
            "data": data,
            "model": describe_model(self.objective, self.dataset.spec(), self.config),
            "leakage": self.leakage(),
            "network": self.network,
        }
        return found if self.init is None else found | {"init": self.init}

    def run(self, record: dict[str, Any]) -> Outcome:
        """Fit, evaluate and close the record."""
        for note in self.dataset.notes:
            self.say(f"data: {note}")
        for warning in filter(None, (leakage_warning(record["leakage"]), self._repeats())):
            self.say(f"warning: {warning}")
        try:
            if self.config.train.tensorboard:
                self.tensorboard = _tensorboard(self.directory.path)
            progress = self.fit()
            results = self.results(tunes=record["kind"] == "tune")
        except Stopped as stopped:
            self._close(record, "stopped", str(stopped))
            again = "run the same command again to go on"
            return Outcome(self.directory.path, "stopped", f"{stopped}; saved, {again}")
        except Diverged as diverged:
            self._close(record, "diverged", str(diverged))
            return Outcome(
                self.directory.path,
                "diverged",
                f"{diverged}; try a lower optim.lr, optim.clip_norm or train.precision=fp32",
            )
        finally:
            if self.bar is not None:
                self.bar.close()
            if self.tensorboard is not None:
                self.tensorboard.close()
        self.directory.write_summary(
            {
                "steps": progress.step,
                "images": progress.step * self.config.train.batch_size,
                "train_seconds": round(progress.train_seconds, 3),
                "images_per_second": round(median(progress.rates), 1),
                "network": self.network,
                "results": results,
                "leakage": self.leakage(),
                "protocol": {k: v for k, v in probes.PROTOCOL.items() if "/" not in k},
            }
        )
        self._close(record, "complete", None)
        return Outcome(self.directory.path, "complete", _sentence(results))

    def prepare(self) -> Trained:
        """What training steps move, all on the device."""
        fabric = self.fabric
        called: Any = for_training(self.objective, self.config.train)
        called, optimizer = fabric.setup(called, self.optimizer)
        if self.average is not None:
            self.average.module.to(fabric.device)
        called.train()
        finite = torch.ones((), device=fabric.device)
        return Trained(fabric, called, self.objective, optimizer, self.average, finite)

    def fit(self) -> Progress:
        """Set up, resume if there is a checkpoint, and train to the end."""
        config = self.config
        path = checkpoint.latest(self.directory.checkpoints)
        progress = self._load(path) if path else Progress()
        if not self.resident:
            self.evaluator.decoders.start()
        trained = self.prepare()
        if path:  # now that the parameters are where their state must be
            self.optimizer.load_state_dict(checkpoint.read_optimizer(path))
        steps = total_steps(config, self.length)
        if self.show and sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=progress.step, unit="step", dynamic_ncols=True)
        elif progress.step:
            self.say(f"resuming at step {progress.step} of {steps}")
        calls = Calls(self.log, self.evaluate, self.picture, self.save)
        if ranks.rank():
            calls = Calls(_nothing, self.evaluate, _nothing, _nothing)
        fit(trained, self.loader, self.length, config, progress, calls)
        return progress

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append a line of metrics; show it."""
        images = step * self.config.train.batch_size
        epoch = images / self.length
        self.directory.append_metrics({"step": step, "epoch": epoch, "images": images, **values})
        if self.tensorboard is not None:
            for key, value in values.items():
                self.tensorboard.add_scalar(key, value, step)
        if self.bar is not None:
            shown = {k.split("/")[-1]: f"{v:.4g}" for k, v in values.items() if "loss" in k}
            if "images_per_second" in values:
                shown["img/s"] = f"{values['images_per_second']:.0f}"
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(step - self.bar.n)
        elif self.show:
            shown_text = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
            self.say(f"step {step}/{total_steps(self.config, self.length)}  {shown_text}")

    def evaluate(self, step: int) -> None:
        """Log what the model is worth on the validation images, if that can be said."""
        values = self.validation()
        if values:
            self.log(step, values)

    def validation(self) -> dict[str, float]:
        """What the model is worth on the validation images."""
        return self.evaluator.validation(self.evaluated())

    def results(self, tunes: bool) -> dict[str, float]:
        """What a run ends with; one to choose values by does not look at the test images."""
        return self.validation() if tunes else self.final_results()

    def final_results(self) -> dict[str, float]:
        """Accuracy and probes on the test split, which nothing has looked at before."""
        model, labels = self.evaluated(), self.dataset.test.labels
        results = {} if model.head is None else self.evaluator.validation(model)
        predicted = self.evaluator.head(model)
        if self.config.eval.probes:
            self.say("probing frozen features")
            predicted |= self.evaluator.probe(model, "test")
            untrained = build.make_model(self.config, self.parts, self.dataset.spec())
            predicted |= self.evaluator.probe(untrained.to(self.fabric.device), "untrained/test")
        if predicted:
            classes = {key: said.tolist() for key, said in predicted.items()}
            self.directory.write_predictions(labels.tolist(), classes)
        return results | {key: accuracy(said, labels) for key, said in predicted.items()}

    def picture(self, step: int) -> None:
        """Write the objective's pictures of the same few images."""
        batch = self._pictured()
        self.objective.eval()
        with self.fabric.autocast():
            rows = self.objective.pictures(batch)
        self.objective.train()
        if rows:
            write_rows(rows, self.directory.figures / f"reconstructions-step-{step:06d}.png")

    def save(self, progress: Progress) -> None:
        """Write a checkpoint."""
        average = self.average.module.state_dict() if self.average is not None else None
        checkpoint.save(
            self.directory.checkpoints,
            progress.step,
            weights=self.objective.state_dict(),
            ema=average,
            optimizer=self.optimizer.state_dict(),
            progress={"train_seconds": progress.train_seconds, "rates": progress.rates},
        )

    def evaluated(self) -> HybridViT:
        """The network that evaluation looks at, of the moving average where there is one."""
        objective = self.objective if self.average is None else self.average.module
        return evaluated(objective, self.config)

    @property
    def network(self) -> str:
        """What `evaluated` is, in words."""
        name = self.objective.evaluated
        return name if self.average is None else f"ema of {name}"

    def leakage(self) -> dict[str, Any]:
        """What the stem mixes and the run leaks, as they are now."""
        batch = probe_batch(self.train_split, self.dataset.image_size, self.fabric.device)
        return describe_leakage(self.objective, batch)

    def say(self, text: str) -> None:
        """A line for the user, beside the progress bar."""
        if self.show:
            tqdm.write(text, file=sys.stderr)

    def _repeats(self) -> str | None:
        """In words, if a step takes images more than once."""
        size = self.config.train.batch_size
        if size <= self.length:
            return None
        return (
            f"train.batch_size={size} takes each of the {self.length} training images "
            f"{size / self.length:.3g} times a step; set it to {self.length} or less"
        )

    def _pictured(self) -> Batch:
        source = self.val_split if len(self.val_split) else self.train_split
        count = min(PICTURED, len(source))
        few = subset(source, torch.arange(count))
        if self.objective.views == 1:
            return next(self.evaluator.batches(few))
        views = TrainLoader(
            few,
            self.config.data.augment,
            self.dataset.image_size,
            batch_size=count,
            seed=self.config.seed,
            device=self.fabric.device,
            resident=False,
            views=self.objective.views,
            fill=self.objective.model.mean.flatten().tolist(),
        )
        return next(views.batches(0, 1))

    def _load(self, path: Path) -> Progress:
        """Weights and progress of a checkpoint."""
        manifest = checkpoint.read_manifest(path)
        self.objective.load_state_dict(checkpoint.read_weights(path))
        if self.average is not None:
            self.average.module.load_state_dict(checkpoint.read_weights(path, checkpoint.EMA))
            self.average.updates = manifest["step"]
        return Progress(manifest["step"], **manifest["progress"])

    def _close(self, record: dict[str, Any], status: str, error: str | None) -> None:
        self.directory.write_record({**record, "status": status, "error": error})


def _nothing(*_: object) -> None:
    """What ranks above 0 do where rank 0 logs, draws or saves."""


def _sentence(results: dict[str, float]) -> str:
    if not results:
        return "complete; nothing to evaluate: set eval.probes=[knn,linear] to probe its features"
    return ", ".join(f"{name} {value:.1%}" for name, value in results.items())


def _tensorboard(path: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "train.tensorboard=true needs TensorBoard: pip install 'hybridvit[tensorboard]'"
        ) from None
    return SummaryWriter(str(path / "tensorboard"))
