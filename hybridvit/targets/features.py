"""Tokens of a teacher that sees the whole image."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hybridvit.backbones import create_timm
from hybridvit.contracts import Target
from hybridvit.data.files import one_line

if TYPE_CHECKING:
    from hybridvit.encoder.model import HybridViT

EMA = "ema"


class FeatureTarget(Target):
    """A teacher's tokens: of the model's moving average, or of a frozen timm network; smooth L1.

    The teacher sees the whole image, in eval mode. Its patch tokens are normalised one by one to
    mean 0 and variance 1, as in data2vec (Baevski et al. 2022, section 3.3).

    Args:
        teacher: `ema`, the moving average of the trained model; or a name that
            `timm.list_models()` shows, whose grid of tokens is then made ours by resizing the
            images.
        pretrained: load the timm teacher's weights (downloads them).
        momentum: of the moving average, per step.

    Raises:
        ValueError: an unknown teacher, one without a map of tokens or that refuses the resized
            images, or a momentum outside [0, 1].
    """

    def __init__(
        self,
        *,
        model: HybridViT,
        teacher: str = EMA,
        pretrained: bool = True,
        momentum: float = 0.999,
    ) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"target 'features': momentum={momentum} should be in [0, 1]")
        self.momentum, self.follows = momentum, teacher == EMA
        self.teacher: nn.Module
        if self.follows:
            self.teacher = copy.deepcopy(model)
            self.outputs: int = model.encoder.dim
        else:
            try:
                self.teacher = TimmTokens(teacher, pretrained, model.encoder.grid)
            except ValueError as error:
                raise ValueError(f"target 'features': {error} (teacher={teacher!r})") from error
            self.outputs = self.teacher.dim
        self.patch_px = model.stem.patch_px
        self.teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FeatureTarget:
        """The teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to normalised tokens (B, N, D)."""
        if self.follows:
            teacher: Any = self.teacher
            tokens = teacher.encoder(teacher.tokens(images))[:, teacher.encoder.prefix :]
        else:
            tokens = self.teacher(images)
        return F.layer_norm(tokens.float(), tokens.shape[-1:])

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Smooth L1 (beta 1) of outputs (B, M, D)."""
        return F.smooth_l1_loss(outputs, target)

    def metrics(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The constant guess's loss; the target's std over patches, which falls to 0 with a
        teacher that collapses."""
        guess = target.mean(dim=(0, 1), keepdim=True)
        return {
            "constant_guess_loss": self.loss(guess.expand_as(target), target),
            "target_std": target.flatten(0, 1).std(dim=0).mean(),
        }

    def decode(self, outputs: Tensor, images: Tensor, index: Tensor) -> Tensor:
        """Each token as one colour, by its three strongest directions: (B, M, 3, P, P).

        The directions are those of the true tokens of the batch, so equal tokens have equal
        colours in the target's picture and in the prediction's.
        """
        tokens = self.encode(images)
        flat = tokens.flatten(0, 1)
        mean = flat.mean(dim=0)
        axes = torch.linalg.svd(flat - mean, full_matrices=False).Vh[:3].mT  # (D, 3)
        spread = ((flat - mean) @ axes).std(dim=0) * 2
        colors: Tensor = (((outputs - mean) @ axes) / spread / 2 + 0.5).clamp(0, 1)
        p = self.patch_px
        return colors[..., None, None].expand(-1, -1, -1, p, p)

    @torch.no_grad()
    def after_step(self, model: HybridViT) -> None:
        """Move the teacher towards the model; buffers (BatchNorm's) are copied."""
        if not self.follows:
            return
        average = get_ema_multi_avg_fn(self.momentum)
        average(list(self.teacher.parameters()), list(model.parameters()), 1)
        for mine, theirs in zip(self.teacher.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)


class TimmTokens(nn.Module):
    """Patch tokens (B, N, dim) of a timm network for images (B, 3, H, W) in [0, 1].

    Images are normalised as the network's weights expect and resized so that its grid is `grid`.

    Raises:
        ValueError: a network whose features are no map of tokens.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, pretrained: bool, grid: tuple[int, int]) -> None:
        super().__init__()
        try:  # only transformers know the argument
            network = create_timm(name, pretrained, num_classes=0, dynamic_img_size=True)
        except ValueError:
            network = create_timm(name, pretrained, num_classes=0)
        self.network = network.eval()
        self.grid = grid
        config = network.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config["mean"]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(-1, 1, 1), persistent=False)
        side = config["input_size"][-1]
        tokens = self._try(side, side)
        count = round(tokens.shape[1] ** 0.5)
        if tokens.shape[1] != count**2 or side % count:
            raise ValueError(
                f"the network gives {tokens.shape[1]} tokens for {side} x {side} px, no square map"
            )
        self.stride = side // count
        self.dim: int = tokens.shape[-1]
        h, w = self._size()
        if (count := self._try(h, w).shape[1]) != grid[0] * grid[1]:
            raise ValueError(f"the network gives {count} tokens for {h} x {w} px, not {grid}")

    def forward(self, images: Tensor) -> Tensor:
        resized = F.interpolate(images, self._size(), mode="bilinear", antialias=True)
        return self._tokens((resized - self.mean) / self.std)

    def _size(self) -> tuple[int, int]:
        return self.grid[0] * self.stride, self.grid[1] * self.stride

    @torch.no_grad()
    def _try(self, height: int, width: int) -> Tensor:
        try:
            return self._tokens(torch.zeros(1, 3, height, width))
        except (AssertionError, AttributeError, IndexError, RuntimeError) as error:
            raise ValueError(
                f"the network refuses images of {height} x {width} px ({one_line(error)}); choose "
                "one that takes any size"
            ) from error

    def _tokens(self, images: Tensor) -> Tensor:
        x = self.network.forward_features(images)
        if not isinstance(x, Tensor) or x.ndim not in (3, 4):
            what = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"the network's features ({what}) are no map of tokens")
        if x.ndim == 4:  # (B, C, h, w), or as Swin (B, h, w, C)
            last = x.shape[3] == self.network.num_features != x.shape[1]
            return x.flatten(1, 2) if last else x.flatten(2).mT
        prefix: int = getattr(self.network, "num_prefix_tokens", 0)
        kept: Tensor = x[:, prefix:]
        return kept
