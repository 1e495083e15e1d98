"""Supervised classification."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridvit import draws
from hybridvit.contracts import Batch, DataSpec, Objective, StepOutput

if TYPE_CHECKING:
    from hybridvit.encoder.model import HybridViT

_SHARE = draws.stream("supervised.share")
_KIND = draws.stream("supervised.kind")
_BOX = draws.stream("supervised.box")
QUANTILES = 4097  # points of a table of Beta(alpha, alpha)


class Supervised(Objective):
    """Classification of whole images, with label smoothing, mixup and CutMix.

    Partners are neighbours (2k, 2k + 1) of the batch. With both mixup and CutMix each pair draws
    one of them with equal chance.

    Args:
        head: one linear layer, or the paper's pre-training head with a tanh hidden layer
            (section 3.1).
        loss: softmax cross-entropy, or one sigmoid a class (summed over classes).
        label_smoothing: share of the target spread evenly over all classes.
        mixup, cutmix: the parameter alpha of Beta(alpha, alpha) (Zhang et al. 2018, Yun et al.
            2019); 0 is off.
    """

    mixup_quantiles: Tensor
    cutmix_quantiles: Tensor

    def __init__(
        self,
        *,
        model: HybridViT,
        data: DataSpec,
        head: Literal["linear", "mlp"] = "linear",
        loss: Literal["softmax", "sigmoid"] = "softmax",
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(
                f"objective 'supervised': label_smoothing={label_smoothing} should be in [0, 1)"
            )
        if mixup < 0 or cutmix < 0:
            raise ValueError(
                f"objective 'supervised': mixup={mixup}, cutmix={cutmix} should be at least 0"
            )
        self.model = model
        self.classes = data.classes
        self.loss_kind, self.label_smoothing = loss, label_smoothing
        self.mixup, self.cutmix = mixup, cutmix
        # Not persistent: they follow from alpha alone.
        self.register_buffer("mixup_quantiles", beta_quantiles(mixup), persistent=False)
        self.register_buffer("cutmix_quantiles", beta_quantiles(cutmix), persistent=False)
        model.head = make_head(head, model.encoder.dim, data.classes)

    def forward(self, batch: Batch) -> StepOutput:
        targets = F.one_hot(batch.labels, self.classes).float()
        images = batch.images
        if self.training and (self.mixup or self.cutmix):
            images, targets = self.mix(images, targets, batch.key)
        logits = self.model(images).float()
        loss = classification_loss(logits, targets, self.loss_kind, self.label_smoothing)
        accuracy = (logits.argmax(1) == targets.argmax(1)).float().mean()
        return StepOutput(loss, {"loss": loss.detach(), "accuracy": accuracy})

    def mix(self, images: Tensor, targets: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Mix each image with its neighbour: (B, 3, H, W) and (B, classes).

        Raises:
            ValueError: an odd number of images.
        """
        if len(images) % 2:
            raise ValueError(
                f"mixup and CutMix pair neighbours; a batch of {len(images)} images is odd: choose "
                "an even train.batch_size (per micro-batch)"
            )
        key = key[0::2].repeat_interleave(2)  # both partners draw the same
        other, other_targets = swap_pairs(images), swap_pairs(targets)
        kind = draws.uniform(key, _KIND, 1)[:, 0]
        use_cutmix = kind < (0.5 if self.mixup and self.cutmix else float(bool(self.cutmix)))

        u = draws.uniform(key, _SHARE, 1)[:, 0]
        share = lookup(self.mixup_quantiles, u)  # of the image itself; its partner has the rest
        inside = box(1 - lookup(self.cutmix_quantiles, u), key, images.shape[-2:])  # (B, H, W)
        cut_share = 1 - inside.float().mean(dim=(1, 2))

        blended = share[:, None, None, None] * images + (1 - share)[:, None, None, None] * other
        pasted = torch.where(inside[:, None], other, images)
        share = torch.where(use_cutmix, cut_share, share)[:, None]
        mixed = torch.where(use_cutmix[:, None, None, None], pasted, blended)
        return mixed, share * targets + (1 - share) * other_targets


def classification_loss(
    logits: Tensor, targets: Tensor, kind: Literal["softmax", "sigmoid"], smoothing: float
) -> Tensor:
    """Mean loss of logits (B, K) against target distributions (B, K)."""
    targets = targets * (1 - smoothing) + smoothing / targets.shape[1]
    if kind == "sigmoid":
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(logits)
    return F.cross_entropy(logits, targets)


def make_head(kind: Literal["linear", "mlp"], dim: int, classes: int) -> nn.Module:
    """Features (B, D) to logits (B, classes); logits start at 0."""
    last = nn.Linear(dim, classes)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return last if kind == "linear" else nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), last)


def swap_pairs(x: Tensor) -> Tensor:
    """Exchange rows 2k and 2k + 1."""
    pairs: Tensor = x.unflatten(0, (-1, 2))
    return pairs.flip(1).flatten(0, 1)


def beta_quantiles(alpha: float) -> Tensor:
    """Quantiles of Beta(alpha, alpha) on an even grid of [0, 1]; all 1 for alpha 0.

    A table turns a uniform draw into a Beta draw on any device; torch's own sampler cannot be
    given the uniform.
    """
    if alpha == 0:
        return torch.ones(QUANTILES)
    from scipy.stats import beta

    grid = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
    return torch.from_numpy(beta.ppf(grid.numpy(), alpha, alpha)).float()


def lookup(quantiles: Tensor, u: Tensor) -> Tensor:
    """Linear interpolation of a quantile table (P,) at u in [0, 1)."""
    position = u * (len(quantiles) - 1)
    low = position.long()
    return torch.lerp(quantiles[low], quantiles[low + 1], position - low)


def box(area: Tensor, key: Tensor, size: torch.Size) -> Tensor:
    """(B, H, W) bool: inside a random box of the given share of the image, clipped at its edge.

    Half its sides and its centre are whole pixels (Yun et al. 2019, as in their code).
    """
    centre = draws.uniform(key, _BOX, 2)
    inside = []
    for axis, length in enumerate(size):
        half = (area.sqrt() * length / 2).floor()
        middle = (centre[:, axis] * length).floor()
        start, stop = middle - half, middle + half
        pixel = torch.arange(length, device=key.device)
        inside.append((pixel >= start[:, None]) & (pixel < stop[:, None]))
    return inside[0][:, :, None] & inside[1][:, None, :]
