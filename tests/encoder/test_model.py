"""Images to features and logits."""

from __future__ import annotations

import torch
from small_encoders import encoder
from torch import nn

from hybridvit.encoder.model import HybridViT
from hybridvit.stems.linear import LinearStem


def hybrid(head: nn.Module | None = None) -> HybridViT:
    stem = LinearStem(dim=8, patch=4).double()
    model = HybridViT(stem, encoder(), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), head=head)
    return model.double().eval()


def test_images_are_normalised_inside() -> None:
    model, images = hybrid(), torch.rand(2, 3, 8, 12, dtype=torch.float64)
    tokens = model.tokens(images)
    normalised = torch.stack(
        [(images[:, c] - m) / s for c, (m, s) in enumerate([(0.1, 0.4), (0.2, 0.5), (0.3, 0.6)])],
        dim=1,
    )
    torch.testing.assert_close(tokens.x, model.stem(normalised).x, rtol=1e-6, atol=1e-6)
    assert tokens.grid == (2, 3)
    assert model.image_size == (8, 12)


def test_head_reads_the_features() -> None:
    head = nn.Linear(8, 5).double()
    images = torch.rand(2, 3, 8, 12, dtype=torch.float64)
    model = hybrid()
    features = model(images)
    assert features.shape == (2, 8)
    torch.testing.assert_close(features, model.encoder(model.tokens(images))[:, 0])
    model.head = head
    torch.testing.assert_close(model(images), features @ head.weight.T + head.bias)
