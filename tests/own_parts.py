"""A third party's stem and masked objective, registered by `own_parts:register`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hybridvit.contracts import Batch, DataSpec, Objective, Prediction, Stem, StepOutput, Tokens
from hybridvit.objectives.hiding import Fill, FillKind, score
from hybridvit.targets.pixels import PixelTarget

if TYPE_CHECKING:
    from hybridvit.encoder.model import HybridViT
    from hybridvit.registry import Parts


class BlurStem(Stem):
    """Convolutions that overlap, with a norm over the whole image."""

    patch_px = 4

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.blur = nn.Conv2d(3, 8, 9, padding=4)
        self.norm = nn.GroupNorm(1, 8)
        self.proj = nn.Conv2d(8, dim, 4, 4)

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
        x = self.proj(self.norm(self.blur(images)))
        return Tokens(x.flatten(2).mT, (x.shape[-2], x.shape[-1]))


class UpperHalf(Objective):
    """Predict the pixels of the upper half of each image from the lower one."""

    def __init__(self, *, model: HybridViT, data: DataSpec, fill: FillKind = "mean") -> None:
        super().__init__()
        self.model = model
        self.fill = Fill(fill, model.stem, data)
        self.target = PixelTarget(model=model, data=data)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, model.encoder.dim))
        self.decoder = nn.Linear(model.encoder.dim, self.target.outputs)

    def forward(self, batch: Batch) -> StepOutput:
        return score(self.target, self.predict(batch), batch.images)

    def predict(self, batch: Batch) -> Prediction:
        b, (h, w) = len(batch.images), self.model.encoder.grid
        hidden = torch.zeros(b, h, w, dtype=torch.bool, device=batch.images.device)
        hidden[:, : h // 2] = True
        seen = self.fill(batch.images, hidden, batch.key)
        x = self.model.tokens(seen, ~hidden if self.fill.protects else None).x
        x = torch.where(hidden.flatten(1)[:, :, None], self.mask_token.to(x.dtype), x)
        z = self.model.encoder(Tokens(x, (h, w)))[:, self.model.encoder.prefix :]
        above = torch.arange(h // 2 * w, device=x.device).expand(b, -1)
        return Prediction(hidden, seen, x, self.decoder(z[:, : h // 2 * w]), above)


def register(parts: Parts) -> None:
    """Called by hybridvit."""
    parts.stems.add("blur", BlurStem)
    parts.objectives.add("upper_half", UpperHalf)
