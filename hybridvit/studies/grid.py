"""A study file, read: the grid of axes x seeds as cells, each with its resolved config."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from hybridvit import build
from hybridvit.compose import compose, dotlist, find, overlay, read_yaml, to_plain
from hybridvit.config import OptimConfig, RunConfig, config_hash, validate
from hybridvit.registry import Parts, fits, suggest, type_name
from hybridvit.studies.status import study_name

TUNING_SEED = 2**32 - 1  # of tuning runs, which no result comes from
OWN_LABELS = ("stage", "tune")  # of cells, beside their axes
PartsOf = Callable[[tuple[str, ...]], Parts]  # of plug-ins
Match = Literal["epochs", "images", "flops", "params", "seconds"]
KEYS: dict[str, Any] = {
    "title": str,
    "question": str,
    "config": str,
    "stages": dict[str, Any],
    "axes": dict[str, Any],
    "include": list[dict[str, Any]],
    "exclude": list[dict[str, Any]],
    "baseline": dict[str, Any],
    "seeds": list[int],
    "match": Match,
    "tune": dict[str, list[Any]],
    "smallest_difference": float,
    "threads": int,
    "pixels": bool,
    "longer": str | None,
}


@dataclass(frozen=True)
class Cell:
    """One run of a study; without an arm, the pixel baselines.

    `name` is its folder: the arm, the seed and the hash of the resolved config, so that a run of
    another config is never taken for it.
    """

    name: str
    config: RunConfig
    arm: dict[str, str]
    kind: str = "train"  # or pixels, or tune: a run that is scored on validation alone
    after: str | None = None  # the cell whose weights it starts from

    @property
    def label(self) -> str:
        """The arm in words."""
        return " / ".join(self.arm.values()) or "all"

    @property
    def stage(self) -> str | None:
        """Of a study that has stages."""
        return self.arm.get("stage")

    def with_config(self, config: RunConfig) -> Cell:
        """The same cell under another config, and hence another hash."""
        name = f"{self.name.rpartition('-')[0]}-{config_hash(config)}"
        return dataclasses.replace(self, name=name, config=config)


@dataclass(frozen=True)
class Study:
    """A study file, read and checked.

    Args:
        question: what is asked, for the report.
        longer: the command that answers what this budget cannot.
        threads: per cell; as many cells run at once as the cores allow.
        match: the cost that is equal in all arms; none: whatever their configs say.
        smallest_difference: between arms that would matter, in percentage points, for the report.
        baseline: the value of some axes that arms with others are compared with, for the report.
        stages: names of the parts of each chain of cells; none where a cell is a chain.
        tune: candidates of each key of which every arm chooses on validation.
    """

    name: str
    title: str
    question: str
    longer: str | None
    threads: int
    cells: list[Cell] = field(default_factory=list)
    match: Match | None = None
    smallest_difference: float | None = None
    stages: tuple[str, ...] = ()
    tune: dict[str, list[Any]] = field(default_factory=dict)
    baseline: dict[str, str] = field(default_factory=dict)

    def arms(self) -> list[list[Cell]]:
        """Cells that differ in their seed only, arm by arm, in the order of the file."""
        found: dict[tuple[str, ...], list[Cell]] = {}
        for cell in self.cells:
            if cell.kind == "train":
                found.setdefault(tuple(cell.arm.values()), []).append(cell)
        return list(found.values())


def read_study(path: Path, overrides: list[str], seeds: int | None = None) -> Study:
    """Read a study file and resolve every cell before anything runs.

    Args:
        path: the file, or the folder of a study.yaml.
        overrides: `key.path=value`, laid over the base config of all cells.
        seeds: how many, instead of the file's: its first ones, or more after them.

    Raises:
        ValueError: a bad study file, or a cell whose config is not valid.
    """
    path = path / "study.yaml" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no study file {str(path)!r}; experiments/ holds the shipped ones")
    content = read_yaml(path)
    _check(content, path)
    given = dotlist(overrides)
    _check_untuned(given, content, "an override", path)
    _check_own(given, path)
    base_path = path.parent / content["config"]
    base = compose(base_path if base_path.is_file() else find(content["config"]))
    threads = content.get("threads", 1)
    over = [given, OmegaConf.create({"train": {"threads": threads}})]
    arms = list(_arms(content))
    if not arms:
        raise ValueError(f"{path}: include and exclude leave no arm")
    parts_of = functools.cache(lambda plugins: build.make_parts([*plugins])[0])
    cells: list[Cell] = []
    known: set[str] = set()
    wanted = _seeds(content.get("seeds", [0, 1, 2]), seeds)
    for arm in arms:
        stages = list(_stages(content, arm, base, over))  # which all seeds share
        for seed in wanted:
            *shared, last = _chain(stages, seed, parts_of)
            cells += [*(c for c in shared if c.name not in known), last]
            known |= {c.name for c in (*shared, last)}
    if content.get("pixels", False):
        cells.insert(0, _cell("pixels", _layered(base, *over), {}, parts_of, "pixels"))
    check_distinct(cells)
    return Study(
        study_name(path),
        content["title"],
        content["question"],
        content.get("longer"),
        threads,
        cells,
        content.get("match"),
        content.get("smallest_difference"),
        tuple(content.get("stages", {})),
        content.get("tune", {}),
        {axis: str(value) for axis, value in content.get("baseline", {}).items()},
    )


def _stages(
    content: dict[str, Any], arm: dict[str, Any], base: DictConfig, over: list[DictConfig]
) -> Iterator[tuple[dict[str, str], DictConfig]]:
    """Labels and config of each stage of an arm, or of the arm if there are none.

    A stage is labelled by the axes that change it or a stage before, so that arms which differ
    only later share it.
    """
    axes, stages = content["axes"], content.get("stages", {})
    for i, stage in enumerate(stages or [None]):
        later = list(stages)[i + 1 :]
        labels = {
            axis: str(value)
            for axis, value in arm.items()
            if any(layer.keys() - set(later) for layer in axes[axis].values()) or not later
        }
        layers = [stages.get(stage, {})]
        for axis, value in arm.items():
            layer = axes[axis][value]
            layers.append({key: part for key, part in layer.items() if key not in stages})
            layers.append(layer.get(stage, {}) if stage else {})
        if stage:
            labels["stage"] = stage
        yield labels, _layered(base, *layers, *over)


def _layered(base: DictConfig, *layers: Any) -> DictConfig:
    """A config under others, the last one on top."""
    for layer in layers:
        if layer:
            base = overlay(base, OmegaConf.create(layer))
    return base


def _chain(
    stages: Sequence[tuple[dict[str, str], DictConfig]], seed: int, parts_of: PartsOf
) -> list[Cell]:
    """The cells of an arm and seed: one, or one a stage, each starting from the one before."""
    chain: list[Cell] = []
    for labels, config in stages:
        after = chain[-1].name if chain else None
        own = _layered(config, {"seed": seed} | ({"init": after} if after else {}))
        name = "-".join([*labels.values(), f"seed{seed}"])
        chain.append(_cell(name, own, labels, parts_of, after=after))
    return chain


def with_configs(cells: Sequence[Cell], changed: Mapping[str, RunConfig]) -> list[Cell]:
    """The cells, in their order, with the configs given by name. What starts from a cell whose
    name changes by that starts from the new one."""
    renamed: dict[str, str] = {}
    found = []
    for cell in cells:
        config, after = changed.get(cell.name, cell.config), cell.after
        if after is not None:
            after = renamed[after]
            config = dataclasses.replace(config, init=after)
        found.append(dataclasses.replace(cell.with_config(config), after=after))
        renamed[cell.name] = found[-1].name
    return found


def check_distinct(cells: list[Cell]) -> None:
    """See that no two cells are one run.

    Raises:
        ValueError: two are.
    """
    owners: dict[tuple[str, str], str] = {}
    for cell in cells:
        key = (config_hash(cell.config), cell.kind)
        if key in owners:
            raise ValueError(
                f"cells {owners[key]} and {cell.name} are the same run; "
                "an axis value changes nothing, or a seed stands twice"
            )
        owners[key] = cell.name


def _seeds(given: list[int], wanted: int | None) -> list[int]:
    if wanted is None:
        return given
    if wanted < 1:
        raise ValueError(f"--seeds {wanted} should be at least 1")
    further = (seed for seed in itertools.count() if seed not in given)
    return [*given, *itertools.islice(further, max(0, wanted - len(given)))][:wanted]


def _arms(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each combination of one value an axis that the constraints leave, as {axis: value}."""
    axes = content["axes"]
    include, exclude = content.get("include"), content.get("exclude", [])
    for combination in itertools.product(*axes.values()):
        arm = dict(zip(axes, combination, strict=True))
        wanted = include is None or any(_meets(arm, condition) for condition in include)
        if wanted and not any(_meets(arm, condition) for condition in exclude):
            yield arm


def _meets(arm: dict[str, Any], condition: dict[str, Any]) -> bool:
    """Whether an arm has, on every axis that a condition names, one of its values."""
    return all(str(arm[axis]) in _listed(values) for axis, values in condition.items())


def _listed(values: Any) -> list[str]:
    return [str(v) for v in (values if isinstance(values, list) else [values])]


def _cell(
    name: str,
    merged: DictConfig,
    arm: dict[str, str],
    parts_of: PartsOf,
    kind: str = "train",
    after: str | None = None,
) -> Cell:
    try:
        config = validate(to_plain(merged))
        config = build.resolve(config, parts_of(tuple(config.plugins)))
        return Cell(f"{name}-{config_hash(config)}", config, arm, kind, after)
    except ValueError as error:
        raise ValueError(f"cell {name}: {error}") from None


def _check(content: dict[str, Any], path: Path) -> None:
    for key, value in content.items():
        if key not in KEYS:
            raise ValueError(
                f"{path}: unknown key {key!r}{suggest(key, KEYS)}; valid: {', '.join(KEYS)}"
            )
        if not fits(value, KEYS[key]):
            raise ValueError(f"{path}: {key}={value!r} should be {type_name(KEYS[key])}")
    for key in ("title", "question", "config", "axes"):
        if key not in content:
            raise ValueError(f"{path}: needs {key!r}")
    _check_numbers(content, path)
    _check_axes(content["axes"], path)
    _check_stages(content, path)
    _check_tune(content, path)
    _check_layers(content, path)
    for key in ("include", "exclude"):
        for condition in content.get(key, []):
            _check_condition(condition, content["axes"], f"{path}: {key}")
    _check_baseline(content, path)


def _check_numbers(content: dict[str, Any], path: Path) -> None:
    if content.get("threads", 1) < 1:
        raise ValueError(f"{path}: threads={content['threads']} should be at least 1")
    if content.get("tune") and TUNING_SEED in content.get("seeds", []):
        raise ValueError(f"{path}: seeds: {TUNING_SEED} is that of tuning; choose another")
    if not content.get("seeds", [0]):
        raise ValueError(f"{path}: seeds is empty; give at least one, and three for an interval")
    if (smallest := content.get("smallest_difference")) is not None and smallest <= 0:
        raise ValueError(f"{path}: smallest_difference={smallest} should be points above 0")


def _check_axes(axes: dict[str, Any], path: Path) -> None:
    for axis, values in axes.items():
        if axis in OWN_LABELS:
            raise ValueError(f"{path}: no axis may be called {axis!r}, which cells are labelled by")
        if not isinstance(values, dict) or not values:
            raise ValueError(f"{path}: axis {axis!r} should map names to overrides")
        for value, layer in values.items():
            if not re.fullmatch(r"[\w.+-]+", str(value)):
                raise ValueError(
                    f"{path}: {axis}={value} names folders; use letters, digits and . _ + -"
                )
            if not isinstance(layer, dict):
                raise ValueError(f"{path}: {axis}={value} should be a set of overrides")


def _check_stages(content: dict[str, Any], path: Path) -> None:
    stages = content.get("stages", {})
    layers = [layer for values in content["axes"].values() for layer in values.values()]
    for stage, own in stages.items():
        if stage in RunConfig.__dataclass_fields__ or not re.fullmatch(r"[\w.+]+", str(stage)):
            raise ValueError(
                f"{path}: stage {stage!r} should have a name of letters, digits and . _ + that is "
                "no section of a config"
            )
        if not all(isinstance(part, dict) for part in (own, *(x.get(stage, {}) for x in layers))):
            raise ValueError(f"{path}: stage {stage!r} should be a set of overrides")


def _check_tune(content: dict[str, Any], path: Path) -> None:
    """Of the optimizer alone: nothing else leaves what is compared, and what it costs, alone."""
    valid = [f"optim.{name}" for name in OptimConfig.__dataclass_fields__]
    for key, candidates in content.get("tune", {}).items():
        if key not in valid:
            raise ValueError(
                f"{path}: tune: {key!r} is no key of optim{suggest(key, valid)}; "
                f"valid: {', '.join(valid)}"
            )
        plain = all(isinstance(value, bool | int | float | str) for value in candidates)
        if len(candidates) < 2 or not plain:
            raise ValueError(
                f"{path}: tune: {key}={candidates} should list two or more numbers or names"
            )
        for value in candidates:
            if candidates.count(value) > 1:
                raise ValueError(f"{path}: tune: {key} lists {value} twice")
            validate({"optim": {key.partition(".")[2]: value}})


def _check_layers(content: dict[str, Any], path: Path) -> None:
    """See that no axis and no stage sets what the study itself does."""
    stages = content.get("stages", {})
    for own in stages.values():
        _check_own(own, path)
    for axis, values in content["axes"].items():
        for value, layer in values.items():
            for part in (layer, *(layer.get(stage, {}) for stage in stages)):
                _check_own(part, path)
                _check_untuned(part, content, f"{axis}={value}", path)


def _check_own(layer: Any, path: Path) -> None:
    for key, instead in (("seed", "use --seeds, or `seeds`"), ("train.threads", "use `threads`")):
        if OmegaConf.select(OmegaConf.create(layer), key) is not None:
            raise ValueError(f"{key} is the study's own; {instead} in {path}")


def _check_untuned(layer: Any, content: dict[str, Any], where: str, path: Path) -> None:
    for key in content.get("tune", {}):
        if OmegaConf.select(OmegaConf.create(layer), key) is not None:
            raise ValueError(
                f"{path}: {key} is tuned, and {where} sets it, too; take it out of one of them"
            )


def _check_baseline(content: dict[str, Any], path: Path) -> None:
    baseline = content.get("baseline", {})
    for axis, value in baseline.items():
        if isinstance(value, dict | list):
            raise ValueError(f"{path}: baseline: {axis}={value!r} should be one value of the axis")
    _check_condition(baseline, content["axes"], f"{path}: baseline")
    if baseline and not any(_meets(arm, baseline) for arm in _arms(content)):
        raise ValueError(f"{path}: baseline={baseline} is no arm that include and exclude leave")


def _check_condition(condition: dict[str, Any], axes: dict[str, Any], where: str) -> None:
    for axis, values in condition.items():
        if axis not in axes:
            raise ValueError(
                f"{where}: no axis {axis!r}{suggest(axis, axes)}; there are: {', '.join(axes)}"
            )
        known = [str(v) for v in axes[axis]]
        for value in _listed(values):
            if value not in known:
                raise ValueError(
                    f"{where}: axis {axis!r} has no value {value!r}{suggest(value, known)}; "
                    f"it has: {', '.join(known)}"
                )
