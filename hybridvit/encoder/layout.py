"""The order of images in memory, as a stem is fastest with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybridvit.contracts import Stem


def laid_out(images: Tensor, stem: Stem) -> Tensor:
    """Images (B, C, H, W), the same values, for a stem; its features follow their order."""
    if prefers_channels_last(stem, images.device):
        return images.contiguous(memory_format=torch.channels_last)
    return images


def prefers_channels_last(stem: Stem, device: torch.device) -> bool:
    """Whether the values of a pixel should lie side by side, forward and backward together, as
    `benchmarks/channels_last.py` measures it.

    On CPUs they should for BatchNorm and max pooling, in float32 and in bf16, but not for
    GroupNorm, which takes up to 2.5 times as long in bf16. Elsewhere nothing is gained. GPUs were
    not measured.
    """
    if device.type != "cpu":
        return False
    parts = list(stem.modules())
    gains = any(isinstance(part, nn.BatchNorm2d | nn.MaxPool2d) for part in parts)
    return gains and not any(isinstance(part, nn.GroupNorm) for part in parts)
