"""From a config to data, model and objective: the only module that knows every part."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hybridvit import draws
from hybridvit.compose import shipped_folder
from hybridvit.config import RunConfig
from hybridvit.contracts import DataSpec, Objective, Stem
from hybridvit.data.catalog import datasets_table
from hybridvit.data.splits import Split, sample, split_validation, subset
from hybridvit.encoder.model import HybridViT
from hybridvit.encoder.presets import ENCODERS
from hybridvit.objectives import OBJECTIVES
from hybridvit.patches import grid_of
from hybridvit.registry import Parts, Registry, load_plugins
from hybridvit.stems import STEMS
from hybridvit.targets import TARGETS

if TYPE_CHECKING:
    from hybridvit.data.dataset import Dataset


def make_parts(plugins: list[str]) -> tuple[Parts, dict[str, str]]:
    """The built-in parts and those of the named plug-ins, with the plug-ins' versions."""
    parts = Parts()
    tables = (
        (parts.datasets, datasets_table()),
        (parts.stems, STEMS),
        (parts.encoders, ENCODERS),
        (parts.objectives, OBJECTIVES),
        (parts.targets, TARGETS),
    )
    for registry, table in tables:
        for name, factory in table.items():
            registry.add(name, factory)
    return parts, load_plugins(parts, plugins)


def resolve(config: RunConfig, parts: Parts) -> RunConfig:
    """The config with every part's arguments checked and its defaults filled in."""
    registries: dict[str, Registry[Any]] = {
        "data": parts.datasets,
        "stem": parts.stems,
        "encoder": parts.encoders,
        "objective": parts.objectives,
    }
    filled = {}
    for section, registry in registries.items():
        part = getattr(config, section)
        filled[section] = dataclasses.replace(part, args=registry.resolve(part.name, part.args))
    args = filled["objective"].args
    if "target_args" in args:  # a part within a part
        args["target_args"] = parts.targets.resolve(args["target"], args["target_args"] or {})
    return dataclasses.replace(config, **filled)


def make_dataset(config: RunConfig, parts: Parts) -> Dataset:
    """The data set, read from disk.

    Raises:
        ValueError: its factory's; an image's label is none of the classes.
    """
    dataset: Dataset = parts.datasets.build(config.data.name, config.data.args)
    dataset.check_labels()
    return dataset


def make_splits(config: RunConfig, dataset: Dataset) -> tuple[Split, Split]:
    """The images to train on and those to validate with.

    Raises:
        ValueError: more images asked for than there are; a fraction that takes none.
    """
    kept, held_out = split_validation(dataset.train.labels, config.data.val_fraction)
    if config.data.train_images is not None:
        kept = kept[sample(len(kept), config.data.train_images)]
    return subset(dataset.train, kept), subset(dataset.train, held_out)


def make_model(config: RunConfig, parts: Parts, spec: DataSpec) -> HybridViT:
    """Stem and encoder. Each is seeded by itself, so that arms of a comparison start from the
    same encoder whatever their stem.

    Raises:
        ValueError: the stem's stride does not divide the images.
    """
    encoder_args = parts.encoders.resolve(config.encoder.name, config.encoder.args)
    with seeded(config.seed, "stem"):
        stem = parts.stems.build(config.stem.name, config.stem.args, dim=encoder_args["dim"])
    grid = grid_of(spec.image_size, stem.patch_px)
    check_stem(stem, config.stem.name, spec.image_size, (*grid, encoder_args["dim"]))
    with seeded(config.seed, "encoder"):
        encoder = parts.encoders.build(config.encoder.name, config.encoder.args, grid=grid)
    # Pretrained weights bring their own statistics; all other stems share the data set's.
    mean, std = stem.normalisation or (spec.mean, spec.std)
    return HybridViT(stem, encoder, mean=mean, std=std)


def make_objective(config: RunConfig, parts: Parts, spec: DataSpec) -> Objective:
    """The objective with a fresh model."""
    model = make_model(config, parts, spec)
    with seeded(config.seed, "objective"):
        objective: Objective = parts.objectives.build(
            config.objective.name,
            config.objective.args,
            model=model,
            data=spec,
            targets=parts.targets,
        )
    return objective


def check_stem(
    stem: Stem, name: str, size: tuple[int, int], expected: tuple[int, int, int]
) -> None:
    """See by shape alone whether a stem gives the tokens that its declared stride promises.

    Raises:
        ValueError: another grid (h, w) or width D.
    """
    try:
        tokens = copy.deepcopy(stem).to("meta").eval()(torch.empty(1, 3, *size, device="meta"))
    except RuntimeError as error:  # what meta tensors refuse; all else is raised again
        if "meta" not in str(error).lower():
            raise
        return  # shapes that depend on values show only in training
    found, (h, w, dim) = (*tokens.grid, tokens.x.shape[-1]), expected
    if found != expected or tokens.x.shape[1] != h * w:
        raise ValueError(
            f"stem {name!r} declares patch_px={stem.patch_px}, hence {h} x {w} tokens of width "
            f"{dim} for {size[0]} x {size[1]} px, but gives x {tuple(tokens.x.shape)} and grid "
            f"{tokens.grid}"
        )


@contextmanager
def seeded(seed: int, stream: str) -> Iterator[None]:
    """Torch's generator seeded by (seed, stream) inside, as it was outside."""
    # Parts are made on the CPU; forking the GPUs' generators would start a context on each.
    with torch.random.fork_rng(devices=[]):
        key = draws.fold(torch.tensor(seed), draws.stream(stream))
        torch.default_generator.manual_seed(int(key))
        yield


def shipped_configs() -> list[Path]:
    """The whole-run configs that come with the package."""
    return sorted(p for p in shipped_folder().glob("*.yaml") if p.name != "base.yaml")
