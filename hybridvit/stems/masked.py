"""What the convolutional stems share: masking inside, norms, the projection to tokens.

Masking keeps one rule: hidden positions are zero at the input of every convolution and pooling, as
in sparse convolutions (SparK, Tian et al. 2023, section 3.1), and statistics of a norm are those of
visible positions. `docs/masked-stems.md` says what this saves and what it does not.

Here `visible` is (B, h, w) bool at the grid of the tokens, or None where nothing is hidden; it is
repeated to the resolution (B, C, H, W) of the features that it meets.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from hybridvit.contracts import Tokens
from hybridvit.patches import as_pixels

Norm = Literal["group", "batch"]


def hide(x: Tensor, visible: Tensor | None) -> Tensor:
    """Features (B, C, H, W) with zeros at hidden positions, whatever was there, NaN included."""
    # Not x * visible, which keeps NaN, nor masked_fill, which loses channels_last.
    return x if visible is None else torch.where(~as_pixels(visible, x), 0, x)


def normalise(norm: nn.Module, x: Tensor, visible: Tensor | None) -> Tensor:
    """`norm(x)` with the statistics of visible positions, and zeros at hidden ones.

    ReLU and sums keep these zeros, so that the next convolution may take them as they are.
    Statistics are taken in float32 at least; the result has the type of `x`. An image without
    visible positions gives zeros and adds nothing to BatchNorm's running statistics.

    Args:
        norm: GroupNorm (per image), BatchNorm2d (over the batch) or a norm that takes no
            statistics over positions.
        x: (B, C, H, W).
    """
    if visible is None:
        y: Tensor = norm(x)
        return y
    hidden = ~as_pixels(visible, x)
    if isinstance(norm, nn.GroupNorm):
        y = _group_norm(norm, x, hidden)
    elif isinstance(norm, nn.BatchNorm2d) and norm.training:
        y = _batch_norm(norm, x, hidden)
    else:
        y = norm(x)
    return torch.where(hidden, 0, y)


def make_norm(
    kind: Norm, channels: int, groups: int | None = None
) -> nn.GroupNorm | nn.BatchNorm2d:
    """GroupNorm or BatchNorm; by default as many of 32 groups as divide the channels."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(math.gcd(32, channels) if groups is None else groups, channels)


def projection(channels: int, dim: int, patch: int = 1) -> nn.Conv2d:
    """Linear map of patches of a feature map to tokens: the E of Dosovitskiy et al. 2021, eq. 1."""
    proj = nn.Conv2d(channels, dim, patch, patch)
    nn.init.trunc_normal_(proj.weight, std=(channels * patch**2) ** -0.5)
    nn.init.zeros_(proj.bias)  # type: ignore[arg-type]  # Conv2d types it as optional
    return proj


def as_tokens(x: Tensor) -> Tokens:
    """A feature map (B, D, h, w) as tokens (B, h * w, D)."""
    return Tokens(x.flatten(2).mT, (x.shape[-2], x.shape[-1]))


def check_kernel(stem: str, name: str, kernel: int, stride: int, least: int = 3) -> None:
    """Refuse a window that, padded by half of it, would not cover the pixels of its position.

    Raises:
        ValueError: an even kernel (the grid would not be size / stride), or a small one.
    """
    least = max(least, 2 * stride - 1)
    if stride < 1 or kernel < least or kernel % 2 == 0:
        raise ValueError(
            f"stem '{stem}': {name}={kernel} must be odd and at least {least} for a stride of "
            f"{stride}, which must be at least 1"
        )


def _group_norm(norm: nn.GroupNorm, x: Tensor, hidden: Tensor) -> Tensor:
    groups = _wide(x).unflatten(1, (norm.num_groups, -1))  # (B, G, C / G, H, W)
    _, _, var, centred = _moments(groups, hidden[:, None], (2, 3, 4))
    y = (centred * (var + norm.eps).rsqrt()).flatten(1, 2)
    return _affine(norm.weight, norm.bias, y).to(x.dtype)


def _batch_norm(norm: nn.BatchNorm2d, x: Tensor, hidden: Tensor) -> Tensor:
    count, mean, var, centred = _moments(_wide(x), hidden, (0, 2, 3))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    with torch.no_grad():
        # As torch: the unbiased variance. Fewer than two values have none.
        weight = norm.momentum * (count > 1).flatten()
        unbiased = var * (count / (count - 1).clamp(min=1))
        for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            running.lerp_(new.flatten().to(running.dtype), weight.to(running.dtype))
        norm.num_batches_tracked.add_(1)
    return _affine(norm.weight, norm.bias, centred * (var + norm.eps).rsqrt()).to(x.dtype)


def _moments(
    x: Tensor, hidden: Tensor, dims: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Number of visible values over `dims`, their mean and variance, and x - mean, 0 if hidden."""
    repeats = math.prod([x.shape[d] // hidden.shape[d] for d in dims])
    count = (~hidden).sum(dims, keepdim=True) * repeats
    divisor = count.clamp(min=1)
    mean = torch.where(hidden, 0, x).sum(dims, keepdim=True) / divisor
    centred = torch.where(hidden, 0, x - mean)
    var = centred.square().sum(dims, keepdim=True) / divisor
    return count, mean, var, centred


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _affine(weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    return y * weight[:, None, None] + bias[:, None, None]
