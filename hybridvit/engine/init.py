"""Starting from a finished run: its stem and encoder, every tensor of them accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from hybridvit.contracts import Objective
from hybridvit.encoder.model import HybridViT
from hybridvit.encoder.positions import moved
from hybridvit.engine.load import read_run

PARTS = ("stem.", "encoder.")


def start_from(objective: Objective, run: Path) -> dict[str, Any]:
    """Give a fresh objective's model the stem and encoder of a run, of the network that it
    evaluated; head, decoder and the like begin anew. A copy that the objective made of its model,
    such as a teacher, gets them too.

    Returns what was done, for the record: parameters loaded, interpolated to another grid, and
    left behind.

    Raises:
        ValueError: no finished run, or one whose stem or encoder has other tensors.
    """
    try:
        saved = read_run(run)
    except ValueError as error:
        raise ValueError(f"init={error}") from None
    record, weights, prefix = saved.record, saved.weights, f"{saved.name}."
    inner = tuple(prefix + part for part in PARTS)
    found = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(inner)}
    model = objective.model
    copies = [m for m in objective.modules() if isinstance(m, HybridViT) and _is_copy(m, model)]
    grid = record["model"]["grid"]
    fitted, interpolated = _fitted(found, model, (grid[0], grid[1]), run)
    for copy in copies:
        copy.load_state_dict(fitted, strict=False)  # `_fitted` has seen to stem and encoder
    return {
        "run": record["hash"],
        "name": record["name"],
        "network": record["network"],
        "sha256": saved.sha256,
        "loaded": len(fitted),
        "interpolated": interpolated,
        "left": sorted({_part(k, prefix) for k in weights if not k.startswith(inner)}),
    }


def _part(name: str, prefix: str) -> str:
    """What of an objective a tensor belongs to: `decoder`, or `model.head`."""
    own = name.removeprefix(prefix)
    return (prefix if own != name else "") + own.split(".")[0]


def _is_copy(other: HybridViT, model: HybridViT) -> bool:
    ours, theirs = _tensors(model), _tensors(other)
    return ours.keys() == theirs.keys() and all(
        ours[k].shape == theirs[k].shape and bool((ours[k] == theirs[k]).all()) for k in ours
    )


def _tensors(model: HybridViT) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if k.startswith(PARTS)}


def _fitted(
    found: dict[str, Tensor], model: HybridViT, old: tuple[int, int], run: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors that a model wants, positions interpolated where its grid is another.

    Raises:
        ValueError: one is missing, too many, or of another shape.
    """
    wanted = _tensors(model)
    odd = sorted(found.keys() ^ wanted.keys())
    if odd:
        whose = "this model" if odd[0] in wanted else "that run"
        raise ValueError(
            f"init={str(run)!r}: only {whose} has {odd[0]} ({len(odd)} such tensors); "
            "use the same stem and encoder"
        )
    fitted, interpolated = {}, []
    for name, tensor in found.items():
        new = tensor
        if name.endswith("pos_embed") and old != model.encoder.grid:
            if model.encoder.position == "relative":
                raise ValueError(
                    f"init={str(run)!r}: positions are of a grid of {old} there and of "
                    f"{model.encoder.grid} here; with position='relative' use the same grid"
                )
            new = moved(model.encoder.position, tensor, old, model.encoder.grid)
        if new is not tensor:
            interpolated.append(name)
        if new.shape != wanted[name].shape:
            raise ValueError(
                f"init={str(run)!r}: {name} is {tuple(new.shape)} there and "
                f"{tuple(wanted[name].shape)} here; use the same stem and encoder"
            )
        fitted[name] = new
    return fitted, interpolated
