"""Every shipped config and study: valid, and each of its keys is read by the code."""

from __future__ import annotations

import dataclasses
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from hybridvit import build, config
from hybridvit.compose import read_yaml, shipped_folder
from hybridvit.config import (
    DataConfig,
    EvalConfig,
    OptimConfig,
    PartConfig,
    RunConfig,
    TrainConfig,
)
from hybridvit.data.augment import Augment
from hybridvit.engine.run import train
from hybridvit.studies.grid import read_study
from hybridvit.studies.status import study_name

FILES = sorted(shipped_folder().rglob("*.yaml"))
EXPERIMENTS = Path(__file__).parents[1] / "experiments"
STUDIES = sorted(p for p in EXPERIMENTS.rglob("*.yaml") if "axes" in read_yaml(p))


SCHEMA = (RunConfig, DataConfig, Augment, OptimConfig, TrainConfig, EvalConfig, PartConfig)


@pytest.fixture(scope="module")
def fields_read(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Fields of the schema that small runs read, outside of checking and recording them."""
    seen: set[str] = set()

    def spy(self: object, name: str) -> object:
        reader = sys._getframe(1).f_code.co_filename
        if not reader.endswith(("dataclasses.py", "hybridvit/config.py", "copy.py")):
            seen.add(f"{type(self).__name__}.{name}")
        return object.__getattribute__(self, name)

    small = ["encoder.args.dim=8", "encoder.args.depth=1", "encoder.args.heads=1"]
    runs = [
        ["optim.name=sgd", "objective.name=masked_patch", "eval.probes=[knn]"],
        ["data.augment.crop=pad", "data.augment.pad=1"],
    ]
    with pytest.MonkeyPatch.context() as patch:
        for schema in SCHEMA:
            patch.setattr(schema, "__getattribute__", spy)
        for number, overrides in enumerate(runs):
            loaded = config.load("digits.yaml", [*small, "train.epochs=1", *overrides])
            out = tmp_path_factory.mktemp("run") / str(number)
            assert train(loaded, name="a", out=out, show=False).status == "complete"
    return seen


def keys(section: dict[str, Any], schema: Any) -> list[str]:
    """`Schema.field` of each key of a config, without the free arguments of parts."""
    found = []
    hints = typing.get_type_hints(schema)
    for key, value in section.items():
        found.append(f"{schema.__name__}.{key}")
        if dataclasses.is_dataclass(hints[key]):
            found += keys(value, hints[key])
    return found


def test_there_are_configs_and_studies() -> None:
    assert len(FILES) >= 4
    assert len(STUDIES) >= 2


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_key_of_a_shipped_config_is_read(path: Path, fields_read: set[str]) -> None:
    loaded = config.load(path)
    parts, _ = build.make_parts(loaded.plugins)
    build.resolve(loaded, parts)  # parts check the names of their own arguments
    own = read_yaml(path)
    own.pop("extends", None)
    assert set(keys(own, RunConfig)) - fields_read == set()


def test_every_field_of_the_schema_is_read(fields_read: set[str]) -> None:
    everything = {f"{s.__name__}.{f.name}" for s in SCHEMA for f in dataclasses.fields(s)}
    assert everything - fields_read == set()


@pytest.mark.parametrize("path", STUDIES, ids=study_name)
def test_shipped_studies_are_valid(path: Path) -> None:
    study = read_study(path, [])
    assert len(study.cells) > 1
    hashes = {(config.config_hash(c.config), c.kind) for c in study.cells}
    assert len(hashes) == len(study.cells)


@pytest.mark.parametrize(
    "name",
    [
        "0000-digits/study.yaml",
        "0001-stem-by-objective/small.yaml",
        "0001-stem-by-objective/longer.yaml",
        "0002-leakage/study.yaml",
        "0008-stems/small.yaml",
    ],
)
def test_arms_of_stems_and_objectives_share_grid_encoder_and_epochs(name: str) -> None:
    study = read_study(EXPERIMENTS / name, [])
    parts, _ = build.make_parts([])
    shared = {
        (
            parts.stems.build(cell.config.stem.name, cell.config.stem.args, dim=8).patch_px,
            str(cell.config.encoder),
            str(cell.config.data),
        )
        for cell in study.cells
    }
    assert len(shared) == 1
    budgets = {(c.config.objective.name, c.config.train.epochs) for c in study.cells if c.arm}
    assert len(budgets) == len({name for name, _ in budgets})  # equal under each objective
