"""What one run is: the schema as dataclasses, the values from YAML, joined by OmegaConf."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybridvit.data.augment import Augment
from hybridvit.data.names import PUBLIC
from hybridvit.plain_yaml import MAX_NESTING, check_plain
from hybridvit.references import check_references, unresolved
from hybridvit.registry import QUOTES, fits, mismatch, suggest
from hybridvit.version import RESULTS_VERSION

Precision = Literal["fp32", "bf16", "bf16_params"]
PARTS = ("data", "stem", "encoder", "objective")
MAX_BYTES = 1 << 20


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


def find(path: str | Path) -> Path:
    """A config file: as given, or among the configs that come with the package."""
    shipped = shipped_folder()
    candidates = [Path(path), shipped / path, shipped / str(path).removeprefix("configs/")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    names = sorted(str(p.relative_to(shipped)) for p in shipped.glob("*.yaml"))
    raise ValueError(
        f"no config file {str(path)!r}{suggest(Path(path).name, names)}; "
        f"shipped ones: {', '.join(names)}"
    )


def shipped_folder() -> Path:
    """The configs that come with the package: inside a wheel, beside the package in a checkout."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def compose(path: Path, trail: tuple[Path, ...] = ()) -> DictConfig:
    """A file laid over the files that its `extends` lists, in their order."""
    path = path.resolve()
    if path in trail:
        raise ValueError(
            f"{path.name}: extends itself through {' -> '.join(p.name for p in trail)}"
        )
    own = read_yaml(path)
    bases = own.pop("extends", [])
    if not isinstance(bases, list) or not all(isinstance(b, str) for b in bases):
        raise ValueError(f"{path.name}: extends should be a list of files, not {bases!r}")
    merged = OmegaConf.create({})
    for base in bases:
        found = [p for p in (path.parent / base, shipped_folder() / base) if p.is_file()]
        if not found:
            raise ValueError(
                f"{path.name}: extends {base!r}, which is neither in {path.parent} nor shipped"
            )
        merged = _laid_over(merged, compose(found[0], (*trail, path)))
    return _laid_over(merged, OmegaConf.create(own))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file that may come from a stranger.

    Raises:
        ValueError: over 1 MiB, not plain (`check_plain`), or no mapping.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path}: larger than {MAX_BYTES} bytes; that is no config")
        text = path.read_text(encoding="utf-8")
        try:
            check_plain(text)
        except ValueError as error:
            raise ValueError(f"{path}: YAML {error}") from None
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise ValueError(f"{path}: should hold sections such as 'stem:', not a {root.id}")
        content = parse(text) if root is not None else {}
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}: not valid YAML{where}: {_problem(error)}") from None
    return dict(content)


def parse(text: str) -> Any:
    """YAML by OmegaConf's loader: 1e-3 is a number, and a key that stands twice is an error.

    References are checked before anything follows one, as laying files over each other does.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except OmegaConfBaseException as error:
        raise ValueError(f"config: {str(error).splitlines()[0]}") from None
    check_references(content)
    return content


def overlay(base: DictConfig, top: DictConfig) -> DictConfig:
    """Merge `top` over `base`; a part whose `name` changes loses the old part's arguments."""
    renamed = [p for p in PARTS if _name(top, p) not in (None, _name(base, p))]
    if renamed:
        base = OmegaConf.create(base)  # a copy: others lie over the same base
    for part in renamed:
        if isinstance(base.get(part), DictConfig):
            base[part].pop("args", None)
    return _merged(base, top)


def dotlist(overrides: list[str]) -> DictConfig:
    """`key.path=value` arguments as a config; values are read as YAML.

    Raises:
        ValueError: no `=`, or an empty key.
    """
    config = OmegaConf.create({})
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not all(key.split(".")):
            raise ValueError(f"override {item!r} should be key.path=value, such as train.epochs=3")
        if key.count(".") >= MAX_NESTING:
            raise ValueError(f"override {item!r}: {MAX_NESTING} levels are the most")
        try:
            check_plain(text)
            value = parse(f"value: {text}")["value"]
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise ValueError(
                f"override {item!r}: {text!r} is not valid YAML: {_problem(error)}"
            ) from None
        except ValueError as error:
            raise ValueError(f"override {item!r}: {error}") from None
        own = OmegaConf.create({})
        try:
            OmegaConf.update(own, key, value)
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            raise ValueError(f"override {item!r}: {str(error).splitlines()[0]}") from None
        config = _merged(config, own)
    return config


def to_plain(config: DictConfig) -> dict[str, Any]:
    """All values, with what they refer to.

    Raises:
        ValueError: as `check_references`, or a reference to nothing.
    """
    check_references(OmegaConf.to_container(config, resolve=False))
    try:
        return typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        raise unresolved(error) from None


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


def _laid_over(base: DictConfig, top: DictConfig) -> DictConfig:
    """Of files, which together may hold more references than each by itself."""
    check_references([OmegaConf.to_container(each, resolve=False) for each in (base, top)])
    return overlay(base, top)


def _merged(base: DictConfig, top: DictConfig) -> DictConfig:
    try:
        return typing.cast(DictConfig, OmegaConf.merge(base, top))
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        under, over = (OmegaConf.to_container(each, resolve=False) for each in (base, top))
        told = _clash(under, over) or str(error).splitlines()[0]
        raise ValueError(f"config: {told}") from None


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


def _name(config: DictConfig, part: str) -> Any:
    node: Any = config
    try:
        for key in (part, "name"):  # by [], whose errors tell the key, as those of `get` do not
            node = node[key] if isinstance(node, DictConfig) and key in set(node) else None
        return node
    except OmegaConfBaseException as error:
        raise unresolved(error) from None


def _clash(base: Any, top: Any, path: str = "") -> str | None:
    """Where a list is laid over a section, or a section over a list."""
    for key, over in top.items():
        where, under = f"{path}{key}", base.get(key)
        if isinstance(under, dict) and isinstance(over, dict):
            if found := _clash(under, over, f"{where}."):
                return found
        elif isinstance(under, dict) and isinstance(over, list):
            return f"{where} should be a section, not {over!r}"
        elif isinstance(under, list) and isinstance(over, dict):
            return f"{where}={over!r} is laid over the list {under!r}; write a list here, too"
    return None


def _problem(error: Exception) -> str:
    """What is wrong with YAML, and what to do where that is known."""
    problem = getattr(error, "problem", None) or str(error).split("\n")[0]
    if "duplicate key" in problem:
        return f"{problem}; name it once"
    is_colon = "':'" in problem or "mapping values" in problem
    return f"{problem}; {QUOTES}" if is_colon else str(problem)


def _require(holds: bool, key: str, value: Any, valid: str) -> None:
    if not holds:
        raise ValueError(f"config: {key}={value!r} should be {valid}")
