"""Masked features the slow way: a dictionary that holds visible positions and nothing else.

Nothing here knows of tensors with zeros in them: what is hidden is not there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Position = tuple[int, int, int]  # image, row, column


@dataclass
class Sparse:
    """Feature vectors (C,) of the visible positions of maps of `side`."""

    at: dict[Position, Tensor]
    side: tuple[int, int]
    visible: list[list[list[bool]]]  # image, row and column of the grid

    def sees(self, image: int, row: int, column: int, side: tuple[int, int]) -> bool:
        """Whether a position of a map of `side` lies in a visible patch."""
        grid = self.visible[image]
        return grid[row * len(grid) // side[0]][column * len(grid[0]) // side[1]]

    def map(self, function: Callable[[Tensor], Tensor]) -> Sparse:
        return Sparse({p: function(v) for p, v in self.at.items()}, self.side, self.visible)

    def windows(self, stride: int, reduce: Callable[[Position, tuple[int, int]], Tensor]) -> Sparse:
        """A map of 1 / stride the side; `reduce` is given the position and its first pixel."""
        side = (self.side[0] // stride, self.side[1] // stride)
        at = {
            (b, i, j): reduce((b, i, j), (i * stride, j * stride))
            for b in range(len(self.visible))
            for i in range(side[0])
            for j in range(side[1])
            if self.sees(b, i, j, side)
        }
        return Sparse(at, side, self.visible)

    def groups(self, group: Callable[[Position], int]) -> dict[int, list[Tensor]]:
        out: dict[int, list[Tensor]] = {}
        for position, value in self.at.items():
            out.setdefault(group(position), []).append(value)
        return out


def sparse(x: Tensor, visible: Tensor) -> Sparse:
    """The visible positions of (B, C, H, W)."""
    out = Sparse({}, (x.shape[2], x.shape[3]), visible.tolist())
    for b in range(x.shape[0]):
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                if out.sees(b, i, j, out.side):
                    out.at[b, i, j] = x[b, :, i, j]
    return out


def convolve(
    x: Sparse, weight: Tensor, bias: Tensor | None, stride: int, before: int, groups: int = 1
) -> Sparse:
    """Convolution over the visible neighbours; `before` is the padding at the top and left."""
    out, _, kernel, _ = weight.shape
    weight = weight.detach()
    zero = torch.zeros(out, dtype=weight.dtype)
    bias = zero if bias is None else bias.detach()

    def at(position: Position, first: tuple[int, int]) -> Tensor:
        total = bias.clone()
        for a in range(kernel):
            for c in range(kernel):
                source = (position[0], first[0] + a - before, first[1] + c - before)
                if source in x.at:
                    v = x.at[source]
                    if groups == 1:
                        total += weight[:, :, a, c] @ v
                    else:  # depthwise
                        total += weight[:, 0, a, c] * v
        return total

    return x.windows(stride, at)


def max_pool(x: Sparse, kernel: int, stride: int, before: int) -> Sparse:
    """Maximum over a window of non-negative features; hidden ones count as 0."""

    def at(position: Position, first: tuple[int, int]) -> Tensor:
        best = torch.zeros_like(next(iter(x.at.values())))
        for a in range(kernel):
            for c in range(kernel):
                source = (position[0], first[0] + a - before, first[1] + c - before)
                if source in x.at:
                    best = torch.maximum(best, x.at[source])
        return best

    return x.windows(stride, at)


def group_norm(x: Sparse, norm: nn.GroupNorm) -> Sparse:
    """Mean and variance of each image and group over the visible positions, one by one."""
    weight, bias = norm.weight.detach(), norm.bias.detach()
    out: dict[Position, Tensor] = {p: torch.empty_like(v) for p, v in x.at.items()}
    per = norm.num_channels // norm.num_groups
    for image, vectors in x.groups(lambda position: position[0]).items():
        for g in range(norm.num_groups):
            channels = range(g * per, (g + 1) * per)
            mean, var = moments([float(v[c]) for v in vectors for c in channels])
            for position, value in x.at.items():
                if position[0] == image:
                    for c in channels:
                        standard = (value[c] - mean) / math.sqrt(var + norm.eps)
                        out[position][c] = standard * weight[c] + bias[c]
    return Sparse(out, x.side, x.visible)


def batch_norm(x: Sparse, norm: nn.BatchNorm2d) -> Sparse:
    """Mean and variance of each channel over the visible positions of all images."""
    weight, bias = norm.weight.detach(), norm.bias.detach()
    out: dict[Position, Tensor] = {p: torch.empty_like(v) for p, v in x.at.items()}
    for c in range(norm.num_features):
        mean, var = moments([float(v[c]) for v in x.at.values()])
        for position, value in x.at.items():
            out[position][c] = (value[c] - mean) / math.sqrt(var + norm.eps) * weight[c] + bias[c]
    return Sparse(out, x.side, x.visible)


def normalise(x: Sparse, norm: nn.Module) -> Sparse:
    if isinstance(norm, nn.GroupNorm):
        return group_norm(x, norm)
    assert isinstance(norm, nn.BatchNorm2d)
    return batch_norm(x, norm)


def moments(values: list[float]) -> tuple[float, float]:
    """Mean and biased variance."""
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((v - mean) ** 2 for v in values) / len(values)


def check_tokens(tokens: Tensor, expected: Sparse) -> None:
    """Tokens (B, h * w, D) equal the map at each visible position; there is one at least."""
    assert expected.at
    for (b, i, j), value in expected.at.items():
        got = tokens[b, i * expected.side[1] + j].detach()
        torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-9)
