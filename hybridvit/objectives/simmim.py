"""SimMIM (Xie et al. 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hybridvit.contracts import Batch, DataSpec, Objective, Prediction, StepOutput, Tokens
from hybridvit.objectives.hiding import Fill, FillKind, picture_rows, score, show, with_mask_tokens
from hybridvit.objectives.masking import Mask, Masking
from hybridvit.targets.pixels import PixelTarget

if TYPE_CHECKING:
    from hybridvit.encoder.model import HybridViT


class SimMIM(Objective):
    """Predict hidden pixels from mask tokens in the encoder, with a linear head and L1.

    Args:
        ratio: share of hidden patches (section 4.1.2).
        unit: patches per side of what is hidden as a whole; 2 gives the paper's 32 px at a stride
            of 16 px.
        mask: single units, or blocks of them.
        fill: what hidden pixels become before the stem, see `Fill`.
    """

    def __init__(
        self,
        *,
        model: HybridViT,
        data: DataSpec,
        ratio: float = 0.6,
        unit: int = 2,
        mask: Mask = "random",
        fill: FillKind = "mean",
    ) -> None:
        super().__init__()
        self.model = model
        self.masking = Masking(model.encoder.grid, mask, ratio, unit)
        self.fill = Fill(fill, model.stem, data)
        self.target = PixelTarget(model=model, data=data, loss="l1", normalize="data")
        self.mask_token = nn.Parameter(torch.empty(1, 1, model.encoder.dim))
        self.decoder = nn.Linear(model.encoder.dim, self.target.outputs)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, batch: Batch) -> StepOutput:
        return score(self.target, self.predict(batch), batch.images)

    def predict(self, batch: Batch) -> Prediction:
        """Hide patches and predict them."""
        hidden, seen, tokens, where = show(self.model, batch, self.masking, self.fill)
        x = with_mask_tokens(tokens, self.mask_token)
        z = self.model.encoder(Tokens(x, tokens.grid), where + self.model.encoder.prefix)
        return Prediction(hidden, seen, x, self.decoder(z), where)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The images, what the model saw of them, and its predictions in place."""
        return picture_rows(self.target, self.predict(batch), batch)
