"""What objectives that compare two views of an image share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hybridvit.contracts import Batch


def both_views(batch: Batch, objective: str) -> Tensor:
    """The first views of a batch, then the second ones: (2 B, 3, H, W).

    Raises:
        ValueError: another number of views.
    """
    views = (batch.images, *batch.others)
    if len(views) != 2:
        raise ValueError(
            f"objective {objective!r} compares 2 augmented views of each image, the batch holds "
            f"{len(views)}: give the second as Batch.others=(images,), or TrainLoader views=2"
        )
    return torch.cat(views)


def picture_rows(batch: Batch) -> dict[str, Tensor]:
    """The views as rows of pictures; of a batch with one view, that one."""
    names = ("first view", "second view")
    return dict(zip(names, (batch.images, *batch.others), strict=False))


def no_autocast(x: Tensor) -> torch.autocast:
    """A context in which autocast leaves products on x's device alone; lightly's losses need it."""
    # Meta tensors, on which costs are counted, have no autocast.
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def widened(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def spread(features: Tensor) -> Tensor:
    """How far features (B, D) fill the sphere: 0 when all are equal, which is a collapse, about 1
    when they point everywhere (Chen and He 2021, section 4.1)."""
    from lightly.utils.debug import std_of_l2_normalized

    deviation: Tensor = std_of_l2_normalized(widened(features.detach()))
    return deviation * math.sqrt(features.shape[1])
