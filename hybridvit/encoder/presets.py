"""Encoder sizes by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from hybridvit.encoder.model import Encoder

# Ti and S: Touvron et al. 2021 (DeiT), Table 1; B, L, H: Dosovitskiy et al. 2021, Table 1;
# g: Zhai et al. 2022, Table 2 (MLP width 6144).
ENCODERS: dict[str, Callable[..., Encoder]] = {
    "vit": Encoder,
    "tiny": partial(Encoder, dim=192, depth=12, heads=3),
    "small": partial(Encoder, dim=384, depth=12, heads=6),
    "base": partial(Encoder, dim=768, depth=12, heads=12),
    "large": partial(Encoder, dim=1024, depth=24, heads=16),
    "huge": partial(Encoder, dim=1280, depth=32, heads=16),
    "giant": partial(Encoder, dim=1408, depth=40, heads=16, mlp_ratio=6144 / 1408),
}
