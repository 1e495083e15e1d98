"""Masked-patch prediction (Dosovitskiy et al. 2021, Appendix B.1.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hybridvit.contracts import Batch, DataSpec, Objective, StepOutput, Tokens
from hybridvit.objectives.masking import Corruption, bert_corruption
from hybridvit.objectives.targets import make_target
from hybridvit.patches import patchify, take, unpatchify

if TYPE_CHECKING:
    from hybridvit.encoder.model import HybridViT


class Prediction(NamedTuple):
    """One pass over a corrupted batch."""

    seen: Tensor  # (B, 3, H, W), the images that entered the stem
    corruption: Corruption
    outputs: Tensor  # (B, M, outputs), at the corrupted positions


class MaskedPatch(Objective):
    """Predict half of the patches, mostly hidden, as BERT does (the paper's self-supervision).

    The corruption happens on the pixels, before the stem: hidden patches are filled with the data
    set's mean colour or carry another patch, so that a convolutional stem cannot spread what they
    held. After the stem, masked tokens become the mask embedding.

    Args:
        target: mean colour of a patch (3 bits a channel), 4 x 4 such colours, or its pixels (L2).
        ratio: share of corrupted patches.
        masked, replaced: shares of the corrupted ones that are hidden, and that show another
            patch; the rest stays.
    """

    def __init__(
        self,
        *,
        model: HybridViT,
        data: DataSpec,
        target: Literal["mean_color", "downsampled", "pixels"] = "mean_color",
        ratio: float = 0.5,
        masked: float = 0.8,
        replaced: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0 < ratio < 1:
            raise ValueError(f"objective 'masked_patch': ratio={ratio} should be in (0, 1)")
        if masked < 0 or replaced < 0 or masked + replaced > 1:
            raise ValueError(
                f"objective 'masked_patch': masked={masked} and replaced={replaced} are shares; "
                "they should be at least 0 and at most 1 together"
            )
        count = model.encoder.grid[0] * model.encoder.grid[1]
        if int(count * ratio) < 1:
            raise ValueError(
                f"objective 'masked_patch': ratio={ratio} corrupts none of {count} patches; use a "
                "finer stem or a higher ratio"
            )
        self.model = model
        self.channels = data.channels
        self.ratio, self.masked, self.replaced = ratio, masked, replaced
        self.target = make_target(target, data.channels, model.stem.patch_px)
        self.mask_token = nn.Parameter(torch.empty(1, 1, model.encoder.dim))
        self.decoder = nn.Linear(model.encoder.dim, self.target.outputs)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, batch: Batch) -> StepOutput:
        prediction = self.predict(batch.images, batch.key)
        patches = take(self._patches(batch.images), prediction.corruption.corrupted)
        target = self.target.encode(self._as_images(patches))
        outputs = prediction.outputs.float()
        loss = self.target.loss(outputs, target)
        metrics = self.target.metrics(outputs.detach(), target)
        return StepOutput(loss, {"loss": loss.detach(), **metrics})

    def predict(self, images: Tensor, key: Tensor) -> Prediction:
        """Corrupt images (B, 3, H, W) and predict the corrupted patches."""
        p = self.model.stem.patch_px
        patches = patchify(images, p)
        grid = (images.shape[-2] // p, images.shape[-1] // p)
        corruption = bert_corruption(
            key, patches.shape[1], ratio=self.ratio, masked=self.masked, replaced=self.replaced
        )
        fill = patchify(self.model.mean.expand(1, -1, p, p), p)  # (1, 1, 3 P^2)
        seen = torch.where(corruption.masked[:, :, None], fill, take(patches, corruption.source))
        seen = unpatchify(seen, grid, p)
        tokens = self.model.tokens(seen, ~corruption.masked.unflatten(1, grid))
        x = torch.where(corruption.masked[:, :, None], self.mask_token.to(tokens.x.dtype), tokens.x)
        z = self.model.encoder(Tokens(x, tokens.grid))[:, self.model.encoder.prefix :]
        return Prediction(seen, corruption, self.decoder(take(z, corruption.corrupted)))

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The images, what the model saw of them, and its predictions in place."""
        prediction = self.predict(batch.images, batch.key)
        p = self.model.stem.patch_px
        decoded = self.target.decode(prediction.outputs.float())
        decoded = decoded.expand(-1, -1, 3, -1, -1).flatten(2)  # (B, M, 3 P^2), grey repeated
        patches = patchify(batch.images, p)
        where = prediction.corruption.corrupted[:, :, None].expand_as(decoded)
        grid = (batch.images.shape[-2] // p, batch.images.shape[-1] // p)
        return {
            "original": batch.images,
            "seen": prediction.seen,
            "prediction": unpatchify(patches.scatter(1, where, decoded), grid, p),
        }

    def _patches(self, images: Tensor) -> Tensor:
        """(B, N, C P^2) with the data set's own channels."""
        return patchify(images[:, : self.channels], self.model.stem.patch_px)

    def _as_images(self, patches: Tensor) -> Tensor:
        p = self.model.stem.patch_px
        images: Tensor = patches.unflatten(-1, (self.channels, p, p))
        return images
