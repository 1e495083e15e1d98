"""All that a plug-in imports: what a stem and an objective are, and what passes between them.

Shapes: B images, H x W pixels, a grid of h x w patches, N tokens, width D.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from hybridvit.encoder.model import HybridViT


class Tokens(NamedTuple):
    """Patch tokens of a batch, without class token and position embedding."""

    x: Tensor  # (B, N, D)
    grid: tuple[int, int]  # (h, w)
    # (B, N) row-major grid positions; None: all h * w, in order. It hides tuple.index, which
    # nobody looks for in tokens.
    index: Tensor | None = None  # type: ignore[assignment]


@dataclass(frozen=True)
class DataSpec:
    """What an objective may know of the data set."""

    classes: int
    image_size: tuple[int, int]  # (H, W) in pixels, as the model sees them
    channels: int  # 1 for grey sets, whose images are repeated to 3 channels
    mean: tuple[float, ...]  # per channel of the 3, images in [0, 1]
    std: tuple[float, ...]


@dataclass
class Batch:
    """Images as they enter the model: augmented, in [0, 1], not yet normalised."""

    images: Tensor  # (B, 3, H, W) float32
    labels: Tensor  # (B,) int64
    index: Tensor  # (B,) int64, position in the data set
    key: Tensor  # (B,) int64, random key of each image: a pure function of (seed, epoch, index)


class StepOutput(NamedTuple):
    """What one forward pass of an objective gives the training loop."""

    loss: Tensor  # ()
    metrics: dict[str, Tensor]  # detached scalars


class Stem(nn.Module, ABC):
    """Images to patch tokens; adds no position embedding and no class token."""

    patch_px: int  # pixels per token side: the total stride
    is_patch_local: bool = False  # token i is a function of the pixels of patch i alone
    couples_batch: bool = False  # tokens depend on the other images (BatchNorm in train mode)

    @abstractmethod
    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        """Tokens of normalised images.

        Args:
            images: (B, 3, H, W); H and W are multiples of `patch_px`. Hidden pixels are filled
                before they arrive.
            visible: (B, h, w) bool, False where a patch holds no content but the fill (one that
                was replaced shows another, visible patch). A stem may use it to do better than
                the fill; it may also ignore it.
        """


class Objective(nn.Module, ABC):
    """A model and the loss that trains it. `forward` is the only trained entry point."""

    model: HybridViT

    @abstractmethod
    def forward(self, batch: Batch) -> StepOutput:
        """Loss and metrics of a batch; random draws come from `batch.key` alone."""

    def after_step(self, step: int) -> None:
        """Called after each optimizer step, e.g. to update an EMA teacher."""

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Named picture rows (B, 3, H, W) in [0, 1], e.g. input and reconstruction."""
        return {}
