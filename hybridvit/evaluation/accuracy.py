"""What a model's own head says of images, and how often it is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hybridvit.contracts import Batch
from hybridvit.encoder.model import HybridViT


@torch.no_grad()
def predictions(model: HybridViT, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """The class of the highest logit and the label of each image, (N,) int64 on the CPU."""
    return over(model, batches, lambda images: _logits(model, images).argmax(dim=1))


def _logits(model: HybridViT, images: Tensor) -> Tensor:
    """In float32, under autocast, too: of a hundred classes 1 % of the images would have two of the
    same logit in bf16, of which argmax takes the lower."""
    features = model.features(images)
    if model.head is None:
        return features
    with torch.autocast(images.device.type, enabled=False):
        logits: Tensor = model.head(features.float())
    return logits


def over(
    model: HybridViT, batches: Iterable[Batch], of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """What a function of the model in eval mode gives of all images, and their labels, on the CPU;
    restores the training mode."""
    training = model.training
    model.eval()
    given, labels = [], []
    for batch in batches:
        given.append(of(batch.images).cpu())
        labels.append(batch.labels.cpu())
    model.train(training)
    return torch.cat(given), torch.cat(labels)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of images (N,) whose predicted class is their label's."""
    return int((predicted == labels).sum()) / len(labels)
