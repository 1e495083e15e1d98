"""Masked autoencoders (He et al. 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridvit.contracts import Batch, DataSpec, Objective, Prediction, StepOutput, Tokens
from hybridvit.encoder.positions import sincos_2d
from hybridvit.encoder.vit import Encoder
from hybridvit.objectives.hiding import Fill, FillKind, picture_rows, score, show
from hybridvit.objectives.masking import Mask, Masking
from hybridvit.patches import put, take
from hybridvit.targets.pixels import PixelTarget

if TYPE_CHECKING:
    from hybridvit.encoder.model import HybridViT


class MAE(Objective):
    """Encode visible patches alone and reconstruct the hidden ones in a light decoder.

    The decoder is a ViT with fixed 2-D sine-cosine positions; class and register tokens pass
    through it too, without a position. The loss is the squared error of hidden pixels, normalised
    over windows.

    Args:
        ratio: share of hidden patches (section 3).
        unit: patches per side of what is hidden as a whole.
        mask: single units, or blocks of them.
        decoder_dim, decoder_depth, decoder_heads: width, blocks and heads of the decoder
            (Table 1; 512, 8 and 16 in the paper).
        target_patch: side in pixels of the windows over which target pixels are normalised; a
            patch of the stem by default. It tiles the image, and divides a patch or holds whole
            ones.
        fill: what hidden pixels become before the stem, see `Fill`.
    """

    decoder_pos: Tensor

    def __init__(
        self,
        *,
        model: HybridViT,
        data: DataSpec,
        ratio: float = 0.75,
        unit: int = 1,
        mask: Mask = "random",
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        target_patch: int | None = None,
        fill: FillKind = "mean",
    ) -> None:
        super().__init__()
        if decoder_dim % 4:
            raise ValueError(
                f"objective 'mae': decoder_dim={decoder_dim} should be a multiple of 4, for "
                "sine-cosine positions"
            )
        grid, dim = model.encoder.grid, model.encoder.dim
        self.model = model
        self.masking = Masking(grid, mask, ratio, unit)
        self.fill = Fill(fill, model.stem, data)
        self.target = PixelTarget(
            model=model, data=data, loss="l2", normalize="window", window=target_patch
        )
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        try:
            self.decoder = Encoder(
                grid=grid,
                dim=decoder_dim,
                depth=decoder_depth,
                heads=decoder_heads,
                class_token=False,
                position="none",
                pool="mean",
            )
        except ValueError as error:
            raise ValueError(f"objective 'mae', its decoder: {error}") from error
        # Class and register tokens have none.
        positions = F.pad(sincos_2d(grid, decoder_dim), (0, 0, model.encoder.prefix, 0))
        self.register_buffer("decoder_pos", positions, persistent=False)
        self.decoder_pred = nn.Linear(decoder_dim, self.target.outputs)
        nn.init.normal_(self.mask_token, std=0.02)
        for linear in (self.decoder_embed, self.decoder_pred):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, batch: Batch) -> StepOutput:
        return score(self.target, self.predict(batch), batch.images)

    def predict(self, batch: Batch) -> Prediction:
        """Hide patches and reconstruct them."""
        hidden, seen, tokens, where = show(self.model, batch, self.masking, self.fill)
        outputs = self.decoder_pred(self.decode(self.model.encoder(tokens), tokens, where))
        return Prediction(hidden, seen, tokens.x, outputs, where)

    def decode(self, z: Tensor, tokens: Tokens, where: Tensor) -> Tensor:
        """Encoded tokens (B, P + K, D) at the places of `tokens` to the patches `where` (B, M),
        (B, M, decoder width)."""
        z, first = self.decoder_embed(z), self.model.encoder.prefix
        places = _places(tokens, first)
        # All tokens are written once: their positions are added before.
        positions, others = self.decoder_pos, self.decoder_pos + self.mask_token
        z = z + take(positions.expand(len(z), -1, -1), places)
        x = put(others.expand(len(z), -1, -1), places, z)
        # Without positions of its own the decoder takes the class token for one more patch.
        decoded: Tensor = self.decoder(Tokens(x, tokens.grid), where + first)
        return decoded

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The images, what the model saw of them, and its predictions in place."""
        return picture_rows(self.target, self.predict(batch), batch)


def _places(tokens: Tokens, first: int) -> Tensor:
    """(B, P + K) int64, where P = `first` class and register tokens, and then K patches, are among
    all tokens."""
    index = tokens.index
    assert index is not None
    return torch.cat([torch.arange(first, device=index.device).expand(len(index), -1),
                      index + first], dim=1)  # fmt: skip
