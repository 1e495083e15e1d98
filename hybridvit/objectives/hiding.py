"""Hidden means hidden: what every masked objective does with the pixels it withholds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hybridvit import draws
from hybridvit.contracts import Batch, DataSpec, Prediction, Stem, StepOutput, Target, Tokens
from hybridvit.objectives.masking import Masking, kept
from hybridvit.patches import as_pixels, grid_of, patchify, put, take, unpatchify

if TYPE_CHECKING:
    from hybridvit.encoder.model import HybridViT

FillKind = Literal["mean", "visible_mean", "noise", "learned", "none"]
_NOISE = draws.stream("hiding.noise")


class Fill(nn.Module):
    """What stands in place of hidden pixels when the images enter the stem.

    Args:
        kind: the data set's mean colour; the mean of the image's own visible pixels; uniform
            noise with the data set's mean and std; a learned colour; or none, which leaves hidden
            pixels where they are. With none, a stem that mixes patches shows the encoder what it
            has to predict: the usual way of masking embeddings, here as a control.

    Raises:
        ValueError: a learned colour that nothing would see.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, kind: FillKind, stem: Stem, data: DataSpec) -> None:
        super().__init__()
        self.kind, self.channels = kind, data.channels
        self.register_buffer("mean", torch.tensor(data.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(data.std).view(-1, 1, 1), persistent=False)
        if kind != "learned":
            return
        if stem.is_patch_local or getattr(stem, "masked", False):
            raise ValueError(
                "fill='learned' would never be trained: this stem keeps hidden patches out of the "
                "others; use fill='mean'"
            )
        self.color = nn.Parameter(self.mean.clone())

    @property
    def protects(self) -> bool:
        """Whether hidden pixels are withheld from the stem."""
        return self.kind != "none"

    def forward(self, images: Tensor, hidden: Tensor, key: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] without what `hidden` (B, h, w) says, of keys (B,)."""
        if not self.protects:
            return images
        where = as_pixels(hidden, images)
        return torch.where(where, self._content(images, where, key).to(images.dtype), images)

    def _content(self, images: Tensor, where: Tensor, key: Tensor) -> Tensor:
        if self.kind == "learned":
            return self.color
        if self.kind == "visible_mean":
            # `where` and not a product: 0 times a hidden NaN would be NaN.
            total = torch.where(where, 0.0, images).sum(dim=(2, 3), keepdim=True)
            return total / (~where).sum(dim=(2, 3), keepdim=True).clamp(min=1)
        if self.kind == "noise":
            shape = (len(images), self.channels, *images.shape[2:])  # grey images stay grey
            u = draws.uniform(key, _NOISE, math.prod(shape[1:])).view(shape)
            return (self.mean + self.std * (u - 0.5) * 12**0.5).clamp(0, 1)
        return self.mean


class Shown(NamedTuple):
    """What is left of a batch once patches are hidden."""

    hidden: Tensor  # (B, h, w) bool
    seen: Tensor  # (B, 3, H, W), the images that entered the stem
    tokens: Tokens  # of the K visible patches, (B, K, D)
    where: Tensor  # (B, M) int64, positions of the hidden patches


def show(model: HybridViT, batch: Batch, masking: Masking, fill: Fill) -> Shown:
    """Hide patches of each image before the stem; tokens of those that are left."""
    hidden = masking.draw(batch.key)
    keep = kept(hidden, hidden[0].numel() - masking.hidden)
    seen = fill(batch.images, hidden, batch.key)
    tokens = model.tokens(seen, ~hidden if fill.protects else None, keep)
    return Shown(hidden, seen, tokens, kept(~hidden, masking.hidden))


def with_mask_tokens(tokens: Tokens, mask_token: Tensor) -> Tensor:
    """(B, h * w, D): the given tokens at their places, the mask token (1, 1, D) at all others."""
    x, index = tokens.x, tokens.index
    assert index is not None
    full = mask_token.to(x.dtype).expand(len(x), tokens.grid[0] * tokens.grid[1], -1)
    return put(full, index, x)


def score(target: Target, prediction: Prediction, images: Tensor) -> StepOutput:
    """The target's loss and metrics, at least in float32, at the predicted positions."""
    wanted = take(target.encode(images), prediction.where)
    outputs = prediction.outputs
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    loss = target.loss(outputs, wanted)
    metrics = target.metrics(outputs.detach(), wanted)
    return StepOutput(loss, {"loss": loss.detach(), **metrics})


def picture_rows(target: Target, prediction: Prediction, batch: Batch) -> dict[str, Tensor]:
    """The images, what the model saw of them, and its predictions in place.

    Before the predictions comes what should have been predicted, where that is not the image.
    """
    images, where = batch.images, prediction.where
    rows = {"original": images, "seen": prediction.seen}
    decoded = target.decode(prediction.outputs.float(), images, where)
    if decoded is None:
        return rows
    wanted = take(target.encode(images), where)
    if wanted.shape == prediction.outputs.shape:
        right = target.decode(wanted, images, where)
        assert right is not None
        picture = paste(images, right, where)
        if not torch.allclose(picture, images, atol=1e-2):
            rows["target"] = picture
    return {**rows, "prediction": paste(images, decoded, where)}


def paste(images: Tensor, patches: Tensor, where: Tensor) -> Tensor:
    """Images (B, 3, H, W) with patches (B, M, C, P, P) at positions (B, M), grey ones repeated."""
    p = patches.shape[-1]
    grid = grid_of(images.shape[-2:], p)
    flat = patches.expand(-1, -1, 3, -1, -1).flatten(2).to(images.dtype)
    return unpatchify(put(patchify(images, p), where, flat), grid, p)
