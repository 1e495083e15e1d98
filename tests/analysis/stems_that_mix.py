"""Small stems that mix patches, and pictures for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybridvit.contracts import Stem, Tokens


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


class Net(Stem):
    """Any network to a feature map as a stem of stride 4."""

    patch_px = 4

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        x = self.net(images)
        return Tokens(x.flatten(2).mT, (x.shape[-2], x.shape[-1]))


def overlapping(dim: int = 1) -> Net:
    """Stride 4 and a kernel of 12 px: a token sees its own and the eight patches around it."""
    torch.manual_seed(0)
    return Net(nn.Conv2d(3, dim, 12, 4, 4))


def grid_distances(place: int, h: int, w: int) -> list[int]:
    return [max(abs(place // w - i // w), abs(place % w - i % w)) for i in range(h * w)]
