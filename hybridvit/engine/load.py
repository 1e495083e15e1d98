"""The network of a finished run, from its directory alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hybridvit import build, config
from hybridvit.config import RunConfig
from hybridvit.contracts import DataSpec
from hybridvit.encoder.model import HybridViT
from hybridvit.engine import checkpoint
from hybridvit.engine.evaluate import evaluated
from hybridvit.engine.runlog import RunDirectory, plugin_change

OF_EMA = "ema of "


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a finished run has saved of the network that its results are of.

    Args:
        name: of the network in the objective, such as `model`.
        weights: of the whole objective, or of its moving average where that is evaluated.
    """

    record: dict[str, Any]
    name: str
    weights: dict[str, Tensor]
    sha256: str


def read_run(run: Path) -> Saved:
    """The record and weights of a finished run.

    Raises:
        ValueError: no finished run with a checkpoint, or a damaged one.
    """
    record = RunDirectory(run).read_record() if run.is_dir() else None
    path = checkpoint.latest(run / "checkpoints")
    if record is None or record.get("status") != "complete" or path is None:
        raise ValueError(f"{str(run)!r} is no finished run with a checkpoint; train it first")
    network = str(record["network"])
    manifest = checkpoint.read_manifest(path)
    file = checkpoint.EMA if network.startswith(OF_EMA) else checkpoint.WEIGHTS
    weights = checkpoint.read_weights(path, file)
    return Saved(record, network.removeprefix(OF_EMA), weights, manifest["sha256"][file])


def load_run(run: str | Path, plugins: Sequence[str] = ()) -> HybridViT:
    """The trained network that a run's results are of, in eval mode on the CPU.

    Called with images (B, 3, H, W) in [0, 1] it gives logits (B, classes) if it has a head;
    `features` gives what probes look at. Neither the data set nor pretrained weights are needed.

    Args:
        run: the run directory.
        plugins: those of the run whose code you trust; a run may come from a stranger.

    Raises:
        ValueError: no finished run with a checkpoint, a damaged one, plug-ins not named here or of
            other code.
    """
    saved = read_run(Path(run))
    setup = config.load(Path(run) / "config.yaml")
    unnamed = [name for name in setup.plugins if name not in plugins]
    if unnamed:
        raise ValueError(
            f"{str(run)!r} needs plug-ins whose code would run; if you trust them: "
            f"load_run(..., plugins={setup.plugins})"
        )
    parts, versions = build.make_parts(setup.plugins)
    if change := plugin_change(saved.record, versions):
        raise ValueError(f"{str(run)!r} was made with {change}; restore the code")
    objective = build.make_objective(_without_downloads(setup), parts, _spec(saved.record))
    network = evaluated(objective, setup)
    prefix = f"{saved.name}."
    network.load_state_dict(
        {k.removeprefix(prefix): v for k, v in saved.weights.items() if k.startswith(prefix)}
    )
    return network.eval()


def _spec(record: dict[str, Any]) -> DataSpec:
    data = record["data"]
    return DataSpec(
        data["classes"],
        tuple(data["image_size"]),
        data["channels"],
        tuple(data["mean"]),
        tuple(data["std"]),
    )


def _without_downloads(setup: RunConfig) -> RunConfig:
    """A config whose parts begin at random: their weights are those of the checkpoint."""
    stem, objective = (_random(part.args) for part in (setup.stem, setup.objective))
    return dataclasses.replace(
        setup,
        stem=dataclasses.replace(setup.stem, args=stem),
        objective=dataclasses.replace(setup.objective, args=objective),
    )


def _random(args: dict[str, Any]) -> dict[str, Any]:
    found = {k: _random(v) if isinstance(v, dict) else v for k, v in args.items()}
    return found | ({"pretrained": False} if found.get("pretrained") is True else {})
