"""What a model's own head says of images, and how often it is right."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hybridvit.contracts import Batch
from hybridvit.encoder.model import HybridViT


@torch.no_grad()
def predictions(model: HybridViT, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """The class of the highest logit and the label of each image, (N,) int64 on the CPU; restores
    the training mode."""
    training = model.training
    model.eval()
    predicted, labels = [], []
    for batch in batches:
        predicted.append(model(batch.images).argmax(dim=1).cpu())
        labels.append(batch.labels.cpu())
    model.train(training)
    return torch.cat(predicted), torch.cat(labels)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of images (N,) whose predicted class is their label's."""
    return int((predicted == labels).sum()) / len(labels)
