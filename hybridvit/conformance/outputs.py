"""What an objective holds and gives: types, shapes and ranges, judged one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridvit.conformance.suite import require
from hybridvit.contracts import Batch, Objective, Prediction
from hybridvit.encoder.model import HybridViT


def check_holds_model(objective: Objective) -> None:
    """It is an objective and trains the model that it was given."""
    require(
        isinstance(objective, Objective),
        f"is {type(objective).__name__}: derive it from Objective",
    )
    require(
        isinstance(getattr(objective, "model", None), HybridViT),
        "holds no model: set self.model = model",
    )
    own = {id(p) for p in objective.parameters()}
    lost = [name for name, p in objective.model.named_parameters() if id(p) not in own]
    require(not lost, f"the model's {lost[:1]} is no parameter of it: set self.model = model")
    frozen = [name for name, p in objective.model.named_parameters() if not p.requires_grad]
    require(
        not frozen,
        f"freezes the model's {', '.join(frozen[:3])}: leave that to the config (optim.freeze)",
    )
    require(
        type(objective.views) is int and objective.views >= 1,
        f"declares views={objective.views!r}: the number of views of each image, at least 1",
    )


def check_loss(loss: Tensor) -> None:
    """A finite scalar with a gradient."""
    require(isinstance(loss, Tensor), f"loss is {type(loss).__name__}: return a tensor ()")
    require(loss.shape == (), f"loss has shape {tuple(loss.shape)}: take its mean, shape ()")
    require(loss.isfinite(), f"loss is {loss.detach():.3g}, not finite")
    require(loss.requires_grad, "loss has no gradient: it is detached from the model")


def check_metrics(metrics: dict[str, Tensor]) -> None:
    """Detached finite scalars by name."""
    for name, value in metrics.items():
        require(
            isinstance(value, Tensor) and value.shape == (),
            f"metric {name!r} is {value!r}: give a tensor ()".replace("\n", " "),
        )
        require(
            not value.requires_grad,
            f"metric {name!r} carries a gradient, and with it the whole graph: detach it",
        )
        require(value.isfinite(), f"metric {name!r} is {float(value)}, not finite")


def check_prediction(prediction: Prediction, objective: Objective, data: Batch) -> None:
    """Shapes, types and content of a prediction."""
    require(
        isinstance(prediction, Prediction),
        f"predict gives {type(prediction).__name__}: return Prediction(...) or None",
    )
    (count, _, height, width), px = data.images.shape, objective.model.stem.patch_px
    grid, dim = (height // px, width // px), objective.model.encoder.dim
    hidden, seen, tokens, outputs, where = prediction
    is_shaped("hidden", hidden, (count, *grid), torch.bool)
    is_shaped("seen", seen, data.images.shape, torch.float32)
    is_shaped("tokens", tokens, (count, None, dim), torch.float32)
    is_shaped("outputs", outputs, (count, None, None), torch.float32)
    is_shaped("where", where, (count, outputs.shape[1]), torch.int64)
    require(
        where.min() >= 0 and where.max() < grid[0] * grid[1],
        f"`where` reaches from {where.min()} to {where.max()}: positions of {grid} patches are "
        f"0 to {grid[0] * grid[1] - 1}",
    )
    require(
        seen.min() >= -1 and seen.max() <= 2,
        f"`seen` reaches from {seen.min():.2f} to {seen.max():.2f}: give images as they are "
        "before the model normalises them, in [0, 1]",
    )
    for name in ("seen", "tokens", "outputs"):
        require(getattr(prediction, name).isfinite().all(), f"`{name}` is not finite")
    require(hidden.any(), "hides no patch of any image: return None if that is meant")
    require((~hidden).flatten(1).any(dim=1).all(), "leaves no patch of an image visible")


def is_shaped(name: str, tensor: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype) -> None:
    """A field of a prediction has a shape, None standing for any number above 0, and a type."""
    wanted = ", ".join("any" if n is None else str(n) for n in shape)
    require(isinstance(tensor, Tensor), f"`{name}` is {type(tensor).__name__}, not a tensor")
    fits = tensor.ndim == len(shape) and all(
        found == n or (n is None and found > 0)
        for found, n in zip(tensor.shape, shape, strict=True)
    )
    require(
        fits and tensor.dtype == dtype,
        f"`{name}` is {tuple(tensor.shape)} {tensor.dtype}: it should be ({wanted}) {dtype}",
    )


def check_picture(name: str, row: Tensor, images: Tensor) -> None:
    """A row of pictures that can be written."""
    require(
        isinstance(row, Tensor) and row.shape == images.shape,
        f"picture {name!r} is {tuple(getattr(row, 'shape', ()))}: it should be as the images, "
        f"{tuple(images.shape)}",
    )
    require(not row.requires_grad, f"picture {name!r} carries a gradient: use torch.no_grad()")
    require(
        bool(row.min() >= 0) and bool(row.max() <= 1),
        f"picture {name!r} reaches from {row.min():.2f} to {row.max():.2f}: it should be in [0, 1]",
    )
