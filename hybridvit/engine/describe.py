"""What a model is and costs, as a record and in words, without training it."""

from __future__ import annotations

from typing import Any

from hybridvit import build
from hybridvit.analysis import cost
from hybridvit.analysis.receptive_field import mixes_globally, receptive_field
from hybridvit.config import RunConfig
from hybridvit.contracts import DataSpec, Objective, Stem
from hybridvit.data.dataset import AbsentData, Dataset
from hybridvit.data.splits import fingerprint, split_validation
from hybridvit.registry import Parts

ASSUMED_CLASSES = 1000


def describe(config: RunConfig) -> str:
    """Tokens, grid, stride, receptive field, parameters, FLOPs and memory, one line each.

    Raises:
        ValueError: a config that could not be trained.
    """
    parts, _ = build.make_parts(config.plugins)
    config = build.resolve(config, parts)
    spec, data = _spec(config, parts)
    objective = build.make_objective(config, parts, spec)
    model = describe_model(objective, spec, config)
    parameters = model["parameters"]
    h, w = model["grid"]
    rows = {
        "data": data,
        "stem": f"{config.stem.name} ({'patch-local' if model['patch_local'] else 'mixes'})",
        "objective": config.objective.name,
        "tokens": f"{model['tokens']} ({h} x {w})",
        "stride": f"{model['patch_px']} px",
        "a token sees": model["receptive_field"],
        "parameters": "  ".join(f"{part} {count:,}" for part, count in parameters.items()),
    } | _costs(model, config)
    return "\n".join(f"{name:15} {text}" for name, text in rows.items())


def _costs(model: dict[str, Any], config: RunConfig) -> dict[str, str]:
    flops = model["flops"]
    if flops["forward"] is None:
        return {"FLOPs an image": "cannot be counted: the objective's shapes depend on its data"}
    micro_batch = config.train.batch_size // config.train.accumulate
    memory = cost.memory_bytes(
        model["parameters"]["total"],
        model["activation_bytes"] * micro_batch,
        ema=config.train.ema is not None,
    )
    return {
        "FLOPs an image": f"forward {flops['forward'] / 1e9:.4g} G, backward "
        f"{flops['backward'] / 1e9:.4g} G (2 per multiply-add)",
        "memory": f"about {memory / 2**30:.2f} GiB to train in float32 with {micro_batch} images "
        "at a time",
    }


def _spec(config: RunConfig, parts: Parts) -> tuple[DataSpec, str]:
    """What the model must fit, and how it is known; a set that is not here may still be planned
    for, if the config says its image size."""
    size = config.data.args.get("image_size")
    try:
        dataset = build.make_dataset(config, parts)
    except AbsentData as error:
        if not size:
            hint = "or set data.args.image_size to describe it without"
            raise ValueError(f"{error}; {hint}") from None
        spec = DataSpec(ASSUMED_CLASSES, (size, size), 3, (0.5,) * 3, (0.5,) * 3)
        return spec, f"{config.data.name} is not here; assumed: {size} px, 1000 classes, colour"
    spec = dataset.spec()
    height, width = spec.image_size
    kept, _ = split_validation(dataset.train.labels, config.data.val_fraction)
    text = f"{dataset.name}, {len(kept)} training images of {height} x {width} px"
    return spec, f"{text}, {spec.classes} classes"


def describe_data(dataset: Dataset, train: int, val: int) -> dict[str, Any]:
    """What a data set is, and how many images of it train and validate."""
    return {
        "name": dataset.name,
        "fingerprint": fingerprint(dataset.train),
        "train": train,
        "val": val,
        "test": len(dataset.test),
        "classes": len(dataset.classes),
        "channels": dataset.channels,
        "image_size": list(dataset.image_size),
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "notes": dataset.notes,
    }


def describe_model(objective: Objective, spec: DataSpec, config: RunConfig) -> dict[str, Any]:
    """Tokens, stride, receptive field, parameters and FLOPs of an objective's model."""
    stem, grid = objective.model.stem, objective.model.encoder.grid
    micro_batch = config.train.batch_size // config.train.accumulate
    spent = cost.measure(objective, spec.image_size, micro_batch)
    size = min(spec.image_size)
    size -= size % stem.patch_px
    return {
        "tokens": grid[0] * grid[1],
        "grid": list(grid),
        "patch_px": stem.patch_px,
        "patch_local": stem.is_patch_local,
        "receptive_field": _sees(stem, size),
        "parameters": cost.parameters(objective),
        "flops": {"forward": spent.forward_flops, "backward": spent.backward_flops},
        "activation_bytes": spent.activation_bytes,
    }


def _sees(stem: Stem, size: int) -> str:
    side, to_corner = receptive_field(stem, size), mixes_globally(stem, size)
    if side == size:
        return f"the whole {size} px image"
    text = "nothing" if side is None else f"{side} px"
    return f"{text} by convolution, global by normalisation statistics" if to_corner else text
