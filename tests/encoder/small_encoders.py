"""Small encoders with every kind of position, and tokens for them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from hybridvit.contracts import Tokens
from hybridvit.encoder.vit import Encoder

GRID = (2, 3)
ON_TOKENS = ("learned_1d", "learned_2d", "sincos_2d")
IN_ATTENTION = ("relative", "relative_bias", "rope_2d")
AT = ("input", "every_layer", "every_layer_shared")
COMBINE = ("add", "multiply", "concat")
# Every way to tell the encoder where patches are.
POSITIONS: dict[str, dict[str, Any]] = (
    {
        f"{kind}-{at}-{how}": {
            "position": kind,
            "position_at": at,
            "position_combine": how,
            "position_dim": 4 if how == "concat" else None,
        }
        for kind, at, how in itertools.product(ON_TOKENS, AT, COMBINE)
    }
    | {kind: {"position": kind} for kind in IN_ATTENTION}
    | {
        f"axial-{kind}": {"position": kind, "attention": "axial"}
        for kind in ("none", *ON_TOKENS, *IN_ATTENTION)
    }
    | {"spared-prefix": {"position_on_prefix": False}}
)


def encoder(**options: Any) -> Encoder:
    """A small float64 encoder in eval mode, every parameter drawn anew."""
    torch.manual_seed(0)
    module = Encoder(**({"grid": GRID, "dim": 8, "depth": 2, "heads": 2} | options)).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.5)
    return module.eval()


def patches(batch: int = 2, grid: tuple[int, int] = GRID) -> Tokens:
    generator = torch.Generator().manual_seed(1)
    count = grid[0] * grid[1]
    return Tokens(torch.randn(batch, count, 8, generator=generator, dtype=torch.float64), grid)
