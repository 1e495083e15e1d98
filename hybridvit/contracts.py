"""All that a plug-in imports: what a stem, an objective and a target are, and what passes between.

Shapes: B images, H x W pixels, a grid of h x w patches, N tokens, width D.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from hybridvit.encoder.model import HybridViT

PatchSide = Annotated[int, range(1, 1_025)]  # pixels, of a patch that is mapped by a matrix
Depth = Annotated[int, range(1, 1_001)]  # layers or blocks in a row


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
    # Further views of the same images, each (B, 3, H, W); `Objective.views` - 1 of them.
    others: tuple[Tensor, ...] = ()

    def split(self, count: int) -> Iterator[Batch]:
        """Batches of `count` images, neighbours staying together; the last one may be smaller."""
        columns = (self.images, self.labels, self.index, self.key, *self.others)
        pieces = zip(*(column.split(count) for column in columns), strict=True)
        for images, labels, index, key, *others in pieces:
            yield Batch(images, labels, index, key, tuple(others))


class StepOutput(NamedTuple):
    """What one forward pass of an objective gives the training loop."""

    loss: Tensor  # ()
    metrics: dict[str, Tensor]  # detached scalars


class Prediction(NamedTuple):
    """What a masked objective hid, saw and predicted: leakage is measured on it.

    `tokens` and `outputs` must depend on no hidden pixel of any image of the batch.
    """

    hidden: Tensor  # (B, h, w) bool, patches of the stem's grid whose own content is withheld
    seen: Tensor  # (B, 3, H, W) images that entered the stem, in [0, 1]
    tokens: Tensor  # (B, N, D) patch tokens that entered the encoder
    outputs: Tensor  # (B, M, outputs) for M patches an image
    where: Tensor  # (B, M) int64, row-major positions of those patches


class Stem(nn.Module, ABC):
    """Images to patch tokens; adds no position embedding and no class token."""

    patch_px: int  # pixels per token side: the total stride
    # Token i is one function, the same for every i, of the pixels of patch i alone.
    is_patch_local: bool = False
    couples_batch: bool = False  # tokens depend on the other images (BatchNorm in train mode)
    # Mean and std, each (3,), that pretrained weights expect of images in [0, 1]; the data set's
    # are used where there are none.
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None

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
    views: int = 1  # augmented views of each image that a batch must hold
    evaluated: str = "model"  # attribute that holds the network to evaluate, e.g. "teacher"

    @abstractmethod
    def forward(self, batch: Batch) -> StepOutput:
        """Loss and metrics of a batch; random draws come from `batch.key` alone."""

    def predict(self, batch: Batch) -> Prediction | None:
        """What a masked objective predicts; None for one that hides nothing."""
        return None

    def after_step(self, step: int) -> None:
        """Called after each optimizer step, e.g. to update an EMA teacher."""

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Named picture rows (B, 3, H, W) in [0, 1], e.g. input and reconstruction."""
        return {}


class Target(nn.Module, ABC):
    """What a masked objective predicts of each patch, and the loss."""

    outputs: int  # numbers predicted for a patch

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Targets (B, N, T) of all patches of augmented images (B, 3, H, W) in [0, 1]."""

    @abstractmethod
    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Mean loss () of outputs (B, M, outputs) against their targets (B, M, T)."""

    def metrics(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Further detached scalars, such as the loss of a constant guess."""
        return {}

    def decode(self, outputs: Tensor, images: Tensor, index: Tensor) -> Tensor | None:
        """Outputs as pictures of their patches, (B, M, C, P, P) in [0, 1] with C 1 or 3.

        Args:
            images: (B, 3, H, W), to lend what the outputs leave out, such as a patch's contrast.
            index: (B, M) positions of the outputs' patches.
        """
        return None

    def after_step(self, model: HybridViT) -> None:
        """Called after each optimizer step with the trained model, e.g. to update a teacher."""
