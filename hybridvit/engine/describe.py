"""What a model is and costs, as a record and in words, without training it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from hybridvit import build
from hybridvit.analysis import cost
from hybridvit.analysis.leakage import leakage, mixing
from hybridvit.analysis.receptive_field import mixes_globally, receptive_field
from hybridvit.config import RunConfig
from hybridvit.contracts import Batch, DataSpec, Objective, Stem
from hybridvit.data.dataset import AbsentData, Dataset
from hybridvit.data.loader import eval_batches
from hybridvit.data.splits import Split, fingerprint, subset
from hybridvit.encoder.vit import Encoder
from hybridvit.engine.compile import blocks_run_by, recomputed
from hybridvit.engine.init import start_from
from hybridvit.engine.optim import make_optimizer
from hybridvit.registry import Parts

ASSUMED_CLASSES = 1000
PROBE_IMAGES = 2  # more would show no more: one to edit, and one that may be coupled to it


def describe(config: RunConfig) -> str:
    """Tokens, grid, stride, receptive field, mixing, leakage and costs, one line each.

    Raises:
        ValueError: a config that could not be trained.
    """
    parts, _ = build.make_parts(config.plugins)
    config = build.resolve(config, parts)
    spec, data, batch = _data(config, parts)
    objective = build.make_objective(config, parts, spec)
    make_optimizer(objective, config.optim)  # sees to what is frozen, and to its own keys
    if config.init:
        start_from(objective, Path(config.init))
    model = describe_model(objective, spec, config)
    given_away = describe_leakage(objective, batch)
    parameters = model["parameters"]
    h, w = model["grid"]
    rows = {
        "data": data,
        "stem": f"{config.stem.name} ({'patch-local' if model['patch_local'] else 'mixes'})",
        "normalisation": f"mean and std of {model['normalisation']['of']}",
        "objective": config.objective.name,
        "encoder": _encoder_words(objective.model.encoder),
        "tokens": f"{model['tokens']} ({h} x {w})",
        "stride": f"{model['patch_px']} px",
        "a token sees": model["receptive_field"],
        "mixing": _mixing_words(given_away["mixing"]),
        "leakage": _leakage_words(given_away),
        "parameters": "  ".join(f"{part} {count:,}" for part, count in parameters.items()),
    } | _costs(model, config)
    return "\n".join(f"{name:15} {text}" for name, text in rows.items())


def _encoder_words(encoder: Encoder) -> str:
    width = f"{encoder.dim}"
    placed: str = encoder.position
    if encoder.on_tokens is not None:
        placed += f" at {encoder.position_at}, {encoder.position_combine}"
        if encoder.position_combine == "concat":
            d = encoder.on_tokens.dim
            width += f" ({encoder.dim - d} of content and {d} of position)"
    return f"{encoder.depth} blocks of width {width}, positions {placed}"


def _costs(model: dict[str, Any], config: RunConfig) -> dict[str, str]:
    flops, memory = model["flops"], training_memory(model, config)
    found = {"FLOPs an image": f"cannot be counted: {cost.UNCOUNTED}"}
    if flops["forward"] is not None:
        forward, backward = (f"{flops[way] / 1e9:.4g} G" for way in ("forward", "backward"))
        found = {"FLOPs an image": f"forward {forward}, backward {backward} (2 per multiply-add)"}
    if memory is None:
        return found
    return found | {
        "memory": f"about {memory / 2**30:.2f} GiB to train in float32 with "
        f"{config.train.micro_batch} images at a time",
    }


def planned_data(config: RunConfig, parts: Parts) -> tuple[DataSpec, Dataset | None]:
    """What the model must fit, and the data set; a set that is not here may still be planned for.

    Raises:
        ValueError: it is not here, and the config does not say its image size.
    """
    try:
        dataset = build.make_dataset(config, parts)
    except AbsentData as error:
        size = config.data.args.get("image_size")
        if not size:
            hint = "or set data.args.image_size to plan without it"
            raise AbsentData(f"{error}; {hint}") from None
        return DataSpec(ASSUMED_CLASSES, (size, size), 3, (0.5,) * 3, (0.5,) * 3), None
    return dataset.spec(), dataset


def training_memory(model: dict[str, Any], config: RunConfig) -> int | None:
    """Bytes that training takes in float32; none where activations cannot be counted."""
    if model["flops"]["forward"] is None:
        return None
    activations: int = model["activation_bytes"] * config.train.micro_batch
    total: int = model["parameters"]["total"]
    return cost.memory_bytes(total, activations, ema=config.train.ema is not None)


def _data(config: RunConfig, parts: Parts) -> tuple[DataSpec, str, Batch]:
    """What the model must fit, how it is known, and images to measure on."""
    spec, dataset = planned_data(config, parts)
    height, width = spec.image_size
    if dataset is None:
        text = f"{config.data.name} is not here; assumed: {height} px, 1000 classes, colour"
        return spec, f"{text}; measured on noise", _noise(spec.image_size)
    train, _ = build.make_splits(config, dataset)
    text = f"{dataset.name}, {len(train)} training images of {height} x {width} px"
    batch = probe_batch(train, spec.image_size, "cpu")
    return spec, f"{text}, {spec.classes} classes", batch


def fingerprints(dataset: Dataset, *, tests: bool) -> dict[str, str]:
    """What tells whether two runs had the same images, to train and, if it tests, to test on."""
    found = {"fingerprint": fingerprint(dataset.train)}
    return found | ({"test_fingerprint": fingerprint(dataset.test)} if tests else {})


def describe_data(dataset: Dataset, train: int, val: int, *, tests: bool) -> dict[str, Any]:
    """What a data set is, and how many images of it train and validate; what tells its test images
    apart, if they are used."""
    return {
        "name": dataset.name,
        **fingerprints(dataset, tests=tests),
        "decoder": dataset.decoder,
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
    micro_batch = config.train.micro_batch
    spent = kept = cost.measure(objective, spec.image_size, micro_batch)
    if config.train.grad_checkpointing:  # whose FLOPs are not the method's
        with blocks_run_by(objective, recomputed):
            kept = cost.measure(objective, spec.image_size, micro_batch)
    size = min(spec.image_size)
    size -= size % stem.patch_px
    return {
        "tokens": grid[0] * grid[1],
        "grid": list(grid),
        "patch_px": stem.patch_px,
        "patch_local": stem.is_patch_local,
        "normalisation": _normalisation(stem, spec),
        "receptive_field": _sees(stem, size),
        "parameters": cost.parameters(objective),
        "flops": {"forward": spent.forward_flops, "backward": spent.backward_flops},
        "activation_bytes": kept.activation_bytes,
    }


def _normalisation(stem: Stem, spec: DataSpec) -> dict[str, Any]:
    own = stem.normalisation
    mean, std = own or (spec.mean, spec.std)
    return {"of": "the stem's weights" if own else "the data", "mean": [*mean], "std": [*std]}


def describe_leakage(objective: Objective, batch: Batch) -> dict[str, Any]:
    """The stem's mixing and the run's leakage of hidden pixels, in training mode, as a record.

    Args:
        batch: of `probe_batch`.
    """
    model, images = objective.model, batch.images
    images = (images - model.mean.to(images)) / model.std.to(images)
    mixed = mixing(model.stem, images if model.stem.couples_batch else images[:1], training=True)
    hidden = leakage(objective, batch)
    return {
        "mixing": _rounded(dataclasses.asdict(mixed)),
        "hidden": None if hidden is None else _rounded(dataclasses.asdict(hidden)),
    }


def leakage_warning(given_away: dict[str, Any]) -> str | None:
    """What to tell the user of a run whose hidden pixels are not hidden; none if they are."""
    hidden = given_away["hidden"]
    if not hidden or not any(hidden.values()):
        return None
    return (
        f"hidden pixels leak into {100 * hidden['tokens']:.3g} % of the tokens and "
        f"{100 * hidden['outputs']:.3g} % of the predictions, so that the model can read what it "
        "should predict; hide them before the stem (objective.args.fill=mean) or use a "
        "patch-local stem"
    )


def probe_batch(split: Split, image_size: tuple[int, int], device: torch.device | str) -> Batch:
    """The first few images of a split, as evaluation sees them."""
    few = subset(split, torch.arange(min(PROBE_IMAGES, len(split))))
    return next(eval_batches(few, image_size, PROBE_IMAGES, device))


def _noise(size: tuple[int, int]) -> Batch:
    generator = torch.Generator().manual_seed(0)
    integers = torch.arange(PROBE_IMAGES)
    images = torch.rand(PROBE_IMAGES, 3, *size, generator=generator)
    return Batch(images, integers * 0, integers, integers)


def _rounded(node: Any) -> Any:
    """To four digits, not decimals: a small leak is none the less one."""
    if isinstance(node, dict):
        return {key: _rounded(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_rounded(value) for value in node]
    return float(f"{node:.4g}") if isinstance(node, float) else node


def _mixing_words(found: dict[str, Any]) -> str:
    tokens = found["tokens"]
    return (
        f"editing one patch moves {found['moved'] * tokens:.3g} of {tokens} tokens by more than "
        f"{found['threshold']:.0%}; {100 * found['jacobian_outside']:.3g} % of a token's squared "
        "gradient is outside its patch"
    )


def _leakage_words(given_away: dict[str, Any]) -> str:
    if given_away["hidden"] is None:
        return "the objective hides nothing"
    warning = leakage_warning(given_away)
    return warning or "0: no token and no prediction depends on a hidden pixel"


def _sees(stem: Stem, size: int) -> str:
    side, to_corner = receptive_field(stem, size), mixes_globally(stem, size)
    if side == size:
        return f"the whole {size} px image"
    text = "nothing" if side is None else f"{side} px"
    return f"{text} by convolution, global by normalisation statistics" if to_corner else text
