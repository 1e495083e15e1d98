"""Every shipped config and study: valid, and each of its keys is read by the code."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from hybridvit import build, config
from hybridvit.config import PARTS, shipped_folder
from hybridvit.studies.grid import read_study

FILES = sorted(shipped_folder().rglob("*.yaml"))
STUDIES = sorted((Path(__file__).parents[1] / "experiments").rglob("study.yaml"))
PACKAGE = Path(config.__file__).parent


def attributes_read() -> set[str]:
    """Names that the package's code, the schema apart, reads as attributes."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name == "config.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
    return names


def leaves(section: dict[str, Any]) -> list[str]:
    """The keys of a config, without the free arguments of parts."""
    keys = []
    for key, value in section.items():
        keys.append(key)
        if isinstance(value, dict) and key not in ("args", "lr_factors"):
            keys += leaves(value)
    return keys


def test_there_are_configs_and_studies() -> None:
    assert len(FILES) >= 4
    assert len(STUDIES) >= 2


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_key_of_a_shipped_config_is_read(path: Path) -> None:
    loaded = config.load(path)
    parts, _ = build.make_parts(loaded.plugins)
    build.resolve(loaded, parts)  # parts check the names of their own arguments
    own = config.read_yaml(path)
    own.pop("extends", None)
    unread = set(leaves(own)) - attributes_read() - set(PARTS)
    assert unread == set()


def test_every_key_of_the_schema_is_read() -> None:
    unread = set(leaves(config.resolved(config.RunConfig()))) - attributes_read()
    assert unread == set()


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.parent.name)
def test_shipped_studies_are_valid(path: Path) -> None:
    study = read_study(path, [])
    assert len(study.cells) > 1
    hashes = {(config.config_hash(c.config), c.kind) for c in study.cells}
    assert len(hashes) == len(study.cells)


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.parent.name)
def test_arms_of_a_study_share_grid_encoder_and_epochs(path: Path) -> None:
    study = read_study(path, [])
    parts, _ = build.make_parts([])
    shared = {
        (
            parts.stems.build(cell.config.stem.name, cell.config.stem.args, dim=8).patch_px,
            str(cell.config.encoder),
            cell.config.train.epochs,
            str(cell.config.data),
        )
        for cell in study.cells
    }
    assert len(shared) == 1
