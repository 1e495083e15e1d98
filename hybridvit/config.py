"""What one run is: the schema as dataclasses, and the values that are checked by it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hybridvit.compose import compose, dotlist, find, overlay, to_plain
from hybridvit.data.augment import Augment
from hybridvit.data.names import PUBLIC
from hybridvit.registry import fits, mismatch, suggest
from hybridvit.version import RESULTS_VERSION

Precision = Literal["fp32", "bf16", "bf16_params"]


@dataclass(frozen=True)
class PartConfig:
    """A registered part by name, with arguments of its own."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataConfig:
    """The data set and how it is fed.

    `resident` keeps the decoded set on the device (null: when it is at most 1 GiB); otherwise
    `workers` processes decode. Validation images are split off the training set, and of the rest
    `train_images` are trained on, the same ones whatever the seed (null: all).
    """

    name: str = "digits"
    args: dict[str, Any] = field(default_factory=dict)
    augment: Augment = field(default_factory=Augment)
    val_fraction: float = 0.1
    train_images: int | None = None
    resident: bool | None = None
    workers: int = 2

    def __post_init__(self) -> None:
        _require(0 <= self.val_fraction < 1, "data.val_fraction", self.val_fraction, "in [0, 1)")
        _require(
            self.train_images is None or self.train_images >= 1,
            "data.train_images",
            self.train_images,
            "at least 1, or null for all",
        )
        _require(self.workers >= 0, "data.workers", self.workers, "at least 0")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule.

    `lr` is per 256 images of batch size. `lr_factors` multiplies it and `freeze` stops it for all
    parameters whose name starts with a given prefix, such as `model.stem` (the running statistics
    of a frozen BatchNorm still move). `layer_decay` d gives
    norm and head the factor 1, the last block d, the one before d^2, and so on down to the stem.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, ...] = (0.9, 0.95)
    momentum: float = 0.9
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_epochs: float = 0.0
    clip_norm: float | None = 1.0
    layer_decay: float = 1.0
    lr_factors: dict[str, float] = field(default_factory=dict)
    freeze: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optim.lr", self.lr, "above 0")
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "at least 0")
        _require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "optim.betas",
            list(self.betas),
            "two numbers in [0, 1)",
        )
        _require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "in [0, 1)")
        _require(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, "at least 0")
        _require(
            self.clip_norm is None or self.clip_norm > 0,
            "optim.clip_norm",
            self.clip_norm,
            "above 0, or null for no clipping",
        )
        _require(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "in (0, 1]")
        _require(
            all(factor >= 0 for factor in self.lr_factors.values()),
            "optim.lr_factors",
            self.lr_factors,
            "factors of at least 0",
        )


@dataclass(frozen=True)
class TrainConfig:
    """The training loop. `log_every` counts steps, `picture_epochs` epochs between pictures.

    `precision` bf16 is autocast; bf16_params also computes with parameters in bf16, whose float32
    masters the optimizer moves.

    `compile`: blocks (one encoder block, for a short start), whole (the objective's forward pass
    as one graph) or graphs (that as CUDA graphs, for small models on a GPU). `grad_checkpointing`
    keeps the inputs of the encoder's blocks alone for the backward pass, which computes the rest
    anew: less memory, more time.
    """

    epochs: float = 10.0
    batch_size: int = 128
    accumulate: int = 1
    precision: Precision = "fp32"
    ema: float | None = None
    compile: Literal["none", "blocks", "whole", "graphs"] = "none"
    grad_checkpointing: bool = False
    threads: int | None = None
    log_every: int = 50
    picture_epochs: float = 10.0
    tensorboard: bool = False

    @property
    def micro_batch(self) -> int:
        """Images that are computed at a time."""
        return self.batch_size // self.accumulate

    def __post_init__(self) -> None:
        _require(self.epochs > 0, "train.epochs", self.epochs, "above 0")
        _require(self.batch_size >= 1, "train.batch_size", self.batch_size, "at least 1")
        _require(
            self.accumulate >= 1 and self.batch_size % self.accumulate == 0,
            "train.accumulate",
            self.accumulate,
            f"a divisor of train.batch_size={self.batch_size}",
        )
        _require(
            self.compile != "graphs" or self.accumulate == 1,
            "train.accumulate",
            self.accumulate,
            "1 with train.compile='graphs': the next graph overwrites the last one's gradients",
        )
        _require(self.ema is None or 0 < self.ema < 1, "train.ema", self.ema, "in (0, 1), or null")
        few = self.threads is None or 1 <= self.threads <= 1024
        _require(few, "train.threads", self.threads, "1 to 1024, at best the cores of this machine")
        _require(self.log_every >= 1, "train.log_every", self.log_every, "at least 1 step")
        _require(self.picture_epochs > 0, "train.picture_epochs", self.picture_epochs, "above 0")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation: validation accuracy every `epochs` epochs, at the end the test set and probes.

    A checkpoint is written at each, and at the first log point after 15 minutes without one.
    """

    epochs: float = 5.0
    batch_size: int = 512
    probes: list[Literal["knn", "linear"]] = field(default_factory=list)

    def __post_init__(self) -> None:
        _require(self.epochs > 0, "eval.epochs", self.epochs, "above 0")
        _require(self.batch_size >= 1, "eval.batch_size", self.batch_size, "at least 1")
        differ = len(set(self.probes)) == len(self.probes)
        _require(differ, "eval.probes", self.probes, "probes that differ; name each once")


@dataclass(frozen=True)
class RunConfig:
    """One training run. `init` is the directory of a finished one to start from: its stem and
    encoder."""

    plugins: list[str] = field(default_factory=list)
    data: DataConfig = field(default_factory=DataConfig)
    stem: PartConfig = field(default_factory=lambda: PartConfig("linear"))
    encoder: PartConfig = field(default_factory=lambda: PartConfig("tiny"))
    objective: PartConfig = field(default_factory=lambda: PartConfig("supervised"))
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    init: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**32, "seed", self.seed, "in [0, 2^32)")


def load(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Compose a config file, the files it extends, and `key.path=value` overrides.

    Raises:
        ValueError: a missing file, bad YAML, an unknown key or a value of the wrong type.
    """
    merged = overlay(compose(find(path)), dotlist(overrides or []))
    return validate(to_plain(merged))


def validate(values: dict[str, Any]) -> RunConfig:
    """Plain values checked against the schema, with defaults filled in.

    Raises:
        ValueError: an unknown key (with the nearest valid one) or a value of the wrong type.
    """
    return typing.cast(RunConfig, _bind(RunConfig, values, ""))


def resolved(config: RunConfig) -> dict[str, Any]:
    """The config as plain values, for records."""
    plain = typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config))))
    if config.init is None:
        del plain["init"]
    return plain


def config_hash(config: RunConfig) -> str:
    """Eight hex digits that name what is computed.

    Where a public data set lies is left out; one's own, in a folder or of a plug-in, is known by
    its place. A run to start from is known by the hash that its name ends in, or else by its name.
    """
    content = resolved(config)
    if config.init is not None:
        name = Path(config.init).name
        content["init"] = re.sub(r"^.*-(?=[0-9a-f]{8}$)", "", name)
    if config.data.name in PUBLIC:
        content["data"]["args"].pop("root", None)
    content["data"]["args"].pop("download", None)
    text = json.dumps([RESULTS_VERSION, content], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _bind(schema: Any, values: Any, path: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"config: {path} should be a section, not {values!r}")
    hints = typing.get_type_hints(schema)
    for key in values:
        if key not in hints:
            where = f"{path}.{key}" if path else str(key)
            raise ValueError(
                f"config: unknown key {where!r}{suggest(str(key), hints)}; "
                f"valid: {', '.join(hints)}"
            )
    bound = {}
    for key, value in values.items():
        where = f"{path}.{key}" if path else key
        if dataclasses.is_dataclass(hints[key]):
            bound[key] = _bind(hints[key], value, where)
        elif not fits(value, hints[key]):
            raise ValueError(f"config: {mismatch(where, value, hints[key])}")
        else:
            bound[key] = tuple(value) if typing.get_origin(hints[key]) is tuple else value
    if "name" in hints and "name" not in bound and schema is PartConfig:
        raise ValueError(f"config: {path} needs a name")
    try:
        return schema(**bound)
    except ValueError as error:  # of a schema that does not know its place, such as Augment
        told = str(error)
        place = "" if told.startswith("config: ") else f"config: {path}."
        raise ValueError(f"{place}{told}") from None


def _require(holds: bool, key: str, value: Any, valid: str) -> None:
    if not holds:
        raise ValueError(f"config: {key}={value!r} should be {valid}")
