"""Accuracy of a model's own head."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hybridvit.contracts import Batch
from hybridvit.encoder.model import HybridViT


@torch.no_grad()
def accuracy(model: HybridViT, batches: Iterable[Batch]) -> float:
    """Share of images whose highest logit is their label's; restores the training mode."""
    training = model.training
    model.eval()
    hits, images = 0, 0
    for batch in batches:
        hits += int((model(batch.images).argmax(dim=1) == batch.labels).sum())
        images += len(batch.labels)
    model.train(training)
    return hits / images
