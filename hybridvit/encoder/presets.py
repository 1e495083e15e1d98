"""Encoder sizes by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hybridvit.encoder.vit import Encoder


def _preset(summary: str, **sizes: Any) -> Callable[..., Encoder]:
    preset = partial(Encoder, **sizes)
    preset.__doc__ = summary  # what `hybridvit list` shows
    return preset


# Ti and S: Touvron et al. 2021 (DeiT), Table 1; B, L, H: Dosovitskiy et al. 2021, Table 1;
# g: Zhai et al. 2022, Table 2 (MLP width 6144).
ENCODERS: dict[str, Callable[..., Encoder]] = {
    "vit": Encoder,
    "tiny": _preset("ViT-Ti, 5 M parameters.", dim=192, depth=12, heads=3),
    "small": _preset("ViT-S, 21 M parameters.", dim=384, depth=12, heads=6),
    "base": _preset("ViT-B, 85 M parameters.", dim=768, depth=12, heads=12),
    "large": _preset("ViT-L, 303 M parameters.", dim=1024, depth=24, heads=16),
    "huge": _preset("ViT-H, 630 M parameters.", dim=1280, depth=32, heads=16),
    "giant": _preset(
        "ViT-g, 1,010 M parameters.", dim=1408, depth=40, heads=16, mlp_ratio=6144 / 1408
    ),
}
