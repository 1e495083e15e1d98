"""The pixels of a patch, as they are or normalised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridvit.contracts import DataSpec, Target
from hybridvit.patches import patchify, take

if TYPE_CHECKING:
    from hybridvit.encoder.model import HybridViT

EPS = 1e-6  # added to a window's variance, He et al. 2022 (their code)


class PixelTarget(Target):
    """The pixels of a patch: L2 as in the ViT paper, L1 in SimMIM, normalised in MAE.

    Grey data sets are predicted from one channel.

    Args:
        loss: mean squared (`l2`) or absolute (`l1`) error.
        normalize: pixels in [0, 1] (`none`), by the data set's mean and std (`data`), or then by
            mean and std over each window of pixels and channels as well (`window`, He et al.
            2022, section 3).
        window: side in pixels of those windows; a patch's by default. It must tile the image.

    Raises:
        ValueError: windows that do not tile the image or cut patches.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        model: HybridViT,
        data: DataSpec,
        loss: Literal["l2", "l1"] = "l2",
        normalize: Literal["none", "data", "window"] = "none",
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.patch_px, self.channels = model.stem.patch_px, data.channels
        self.loss_kind, self.normalize = loss, normalize
        if window is not None and normalize != "window":
            raise ValueError(
                f"target 'pixels': window={window} has no effect with normalize={normalize!r}; "
                "use normalize='window'"
            )
        self.window = self.patch_px if window is None else window
        valid = valid_windows(data.image_size, self.patch_px)
        if normalize == "window" and self.window not in valid:
            raise ValueError(
                f"target 'pixels': windows of {self.window} px do not fit patches of "
                f"{self.patch_px} px on images of {data.image_size[0]} x {data.image_size[1]} px; "
                f"choose from {', '.join(map(str, valid))}"
            )
        self.outputs = self.channels * self.patch_px**2
        scaled = normalize != "none"
        c = self.channels
        mean = torch.tensor(data.mean[:c] if scaled else (0.0,) * c)
        std = torch.tensor(data.std[:c] if scaled else (1.0,) * c)
        self.register_buffer("mean", mean.view(-1, 1, 1), persistent=False)
        self.register_buffer("std", std.view(-1, 1, 1), persistent=False)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to values (B, N, C P^2)."""
        pixels = (images[:, : self.channels] - self.mean) / self.std
        if self.normalize == "window":
            mean, std = window_statistics(pixels, self.window)
            pixels = (pixels - mean) / std
        return patchify(pixels, self.patch_px)

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Mean error of outputs (B, M, outputs) over all values."""
        if self.loss_kind == "l1":
            return F.l1_loss(outputs, target)
        return F.mse_loss(outputs, target)

    def metrics(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The loss of the constant guess: the batch's mean (l2) or median (l1) patch."""
        if self.loss_kind == "l2":  # image by image, whose patches fit a CPU's cache
            guess = target.mean(dim=1).mean(dim=0)
        else:  # Medians of rows: of columns, a GPU would read one value of each row at a time.
            guess = target.flatten(0, 1).mT.contiguous().median(dim=1).values
        return {"constant_guess_loss": self.loss(guess.expand_as(target), target)}

    def decode(self, outputs: Tensor, images: Tensor, index: Tensor) -> Tensor:
        """Outputs as patches (B, M, C, P, P) in [0, 1], with the true windows' mean and std."""
        p, c = self.patch_px, self.channels
        if self.normalize == "window":
            scaled = (images[:, :c] - self.mean) / self.std
            mean, std = window_statistics(scaled, self.window)
            outputs = outputs * take(patchify(std.expand_as(scaled), p), index)
            outputs = outputs + take(patchify(mean.expand_as(scaled), p), index)
        pixels: Tensor = outputs.unflatten(-1, (c, p, p)) * self.std + self.mean
        return pixels.clamp(0, 1)


def window_statistics(pixels: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Mean and std over channels and pixels of each window of images (B, C, H, W).

    Both come as (B, 1, H, W), a window's value at each of its pixels. The variance is the unbiased
    one, with EPS added, as in the code of He et al. 2022.
    """
    height, width = pixels.shape[2:]
    rows, columns = (height // side, side), (width // side, side)
    windows = pixels.unflatten(3, columns).unflatten(2, rows)  # (B, C, h, side, w, side)
    over = (1, 3, 5)
    mean = windows.mean(over, keepdim=True)
    std = (windows.var(over, keepdim=True) + EPS).sqrt()

    def spread(x: Tensor) -> Tensor:
        return x.expand(-1, -1, *rows, *columns).reshape(-1, 1, height, width)

    return spread(mean), spread(std)


def valid_windows(size: tuple[int, int], patch_px: int) -> list[int]:
    """Sides that tile images (H, W) and either divide a patch or hold whole ones, above 1 px."""
    return [
        side
        for side in range(2, min(size) + 1)
        if not (size[0] % side or size[1] % side or (patch_px % side and side % patch_px))
    ]
