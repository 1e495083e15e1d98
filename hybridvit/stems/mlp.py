"""A patch-local network: the control for "is it locality, or just more network?"."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from hybridvit.contracts import Depth, PatchSide, Stem, Tokens
from hybridvit.patches import grid_of, patchify


class MlpStem(Stem):
    """Fully connected layers on each flattened patch, with GELU between: more than linear, but
    no token sees another patch.

    To give it a convolutional stem's budget, read that stem's parameters and FLOPs from
    `hybridvit describe` and set `hidden`. At depth 1, with n = 3 P^2 numbers a patch, width D and
    N tokens:

        parameters = hidden * (n + D + 1) + D        FLOPs = 2 * N * hidden * (n + D)

    so that `hidden` hits either within half a step of n + D + 1 parameters. It cannot hit both: a
    convolution uses each weight at many places of a patch, these layers at one. Further layers
    add hidden^2 + hidden parameters each.

    Args:
        patch: pixels per patch side P.
        hidden: width of the hidden layers.
        depth: number of hidden layers.
    """

    is_patch_local = True

    def __init__(
        self, *, dim: int, patch: PatchSide = 16, hidden: int = 1536, depth: Depth = 1
    ) -> None:
        super().__init__()
        if min(patch, hidden, depth) < 1:
            raise ValueError(
                f"stem 'mlp': patch={patch}, hidden={hidden} and depth={depth} must be at least 1; "
                "without a hidden layer it is the stem 'linear'"
            )
        self.patch_px = patch
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((3 * patch**2, *[hidden] * depth, dim)):
            linear = nn.Linear(inputs, outputs)
            nn.init.trunc_normal_(linear.weight, std=inputs**-0.5)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        x = self.layers(patchify(images, self.patch_px))  # (B, N, 3 P^2) -> (B, N, D)
        return Tokens(x, grid_of(images.shape[-2:], self.patch_px))
