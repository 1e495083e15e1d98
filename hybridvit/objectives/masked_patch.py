"""Masked-patch prediction (Dosovitskiy et al. 2021, Appendix B.1.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hybridvit.contracts import Batch, DataSpec, Objective, Prediction, StepOutput, Tokens
from hybridvit.objectives.hiding import Fill, FillKind, picture_rows, score
from hybridvit.objectives.masking import bert_corruption, corrupted_count
from hybridvit.patches import grid_of, patchify, take, unpatchify

if TYPE_CHECKING:
    from hybridvit.encoder.model import HybridViT
    from hybridvit.registry import Registry


class MaskedPatch(Objective):
    """Predict half of the patches, mostly hidden, as BERT does (the paper's self-supervision).

    The corruption happens on the pixels, before the stem: hidden patches are filled or carry
    another patch, so that a convolutional stem cannot spread what they held. After the stem,
    masked tokens become the mask embedding.

    Args:
        target: what is predicted of a patch; `hybridvit list targets` shows them.
        target_args: arguments of the target.
        ratio: share of corrupted patches.
        masked, replaced: shares of the corrupted ones that are hidden, and that show another
            patch; the rest stays.
        fill: what hidden pixels become before the stem, see `Fill`; with `none` patches are
            masked and replaced after the stem alone.
    """

    def __init__(
        self,
        *,
        model: HybridViT,
        data: DataSpec,
        targets: Registry[Any],
        target: str = "mean_color",
        target_args: dict[str, Any] | None = None,
        ratio: float = 0.5,
        masked: float = 0.8,
        replaced: float = 0.1,
        fill: FillKind = "mean",
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
        if corrupted_count(count, ratio) < 1:
            raise ValueError(
                f"objective 'masked_patch': ratio={ratio} corrupts none of {count} patches; use a "
                "finer stem or a higher ratio"
            )
        self.model = model
        self.ratio, self.masked, self.replaced = ratio, masked, replaced
        self.fill = Fill(fill, model.stem, data)
        self.target = targets.build(target, target_args or {}, model=model, data=data)
        self.mask_token = nn.Parameter(torch.empty(1, 1, model.encoder.dim))
        self.decoder = nn.Linear(model.encoder.dim, self.target.outputs)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, batch: Batch) -> StepOutput:
        return score(self.target, self.predict(batch), batch.images)

    def predict(self, batch: Batch) -> Prediction:
        """Corrupt the images and predict the corrupted patches."""
        images, p = batch.images, self.model.stem.patch_px
        grid = grid_of(images.shape[-2:], p)
        corrupted, masked, source = bert_corruption(
            batch.key,
            grid[0] * grid[1],
            ratio=self.ratio,
            masked=self.masked,
            replaced=self.replaced,
        )
        own = torch.arange(source.shape[1], device=source.device)
        hidden = (masked | (source != own)).unflatten(1, grid)
        seen, visible = images, None
        if self.fill.protects:
            seen = unpatchify(take(patchify(images, p), source), grid, p)
            seen, visible = self.fill(seen, masked.unflatten(1, grid), batch.key), ~masked
            visible = visible.unflatten(1, grid)
        x = self.model.tokens(seen, visible).x
        if not self.fill.protects:
            x = take(x, source)
        x = torch.where(masked[:, :, None], self.mask_token.to(x.dtype), x)
        z = self.model.encoder(Tokens(x, grid), corrupted + self.model.encoder.prefix)
        return Prediction(hidden, seen, x, self.decoder(z), corrupted)

    def after_step(self, step: int) -> None:
        self.target.after_step(self.model)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The images, what the model saw of them, and its predictions in place."""
        return picture_rows(self.target, self.predict(batch), batch)
