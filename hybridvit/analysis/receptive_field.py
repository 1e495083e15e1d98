"""How far a token sees, measured by following NaNs through the stem."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hybridvit.contracts import Stem

# Classes whose statistics see everything; timm's fuse norm and activation and derive from these.
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def receptive_field(stem: Stem, size: int) -> int | None:
    """Side in pixels of the square that the middle token's convolutions see, at most `size`.

    Normalisation layers are taken out, since their statistics see everything. A NaN in one row
    of pixels reaches exactly the tokens that depend on the row, so two binary searches find the
    first and the last row. None if tokens depend on no row.

    Args:
        size: image side in pixels, a multiple of the stem's stride.
    """
    bare = copy.deepcopy(stem).double().eval()
    for name, module in list(bare.named_modules()):
        if isinstance(module, _NORMS):
            parent, _, child = name.rpartition(".")
            setattr(bare.get_submodule(parent), child, _keep_activation(module))
    token = size // bare.patch_px // 2
    middle = token * bare.patch_px + bare.patch_px // 2
    if not _sees(bare, size, token, middle):
        return None
    first = _boundary(lambda row: _sees(bare, size, token, row), middle, -1)
    last = _boundary(lambda row: _sees(bare, size, token, row), middle, size)
    return last - first + 1


def mixes_globally(stem: Stem, size: int) -> bool:
    """Whether the first row of pixels changes the last token."""
    probe = copy.deepcopy(stem).double().train()
    return _sees(probe, size, size // probe.patch_px - 1, 0)


def _keep_activation(module: nn.Module) -> nn.Module:
    # timm fuses norm and activation in one module.
    activation = getattr(module, "act", None)
    return activation if isinstance(activation, nn.Module) else nn.Identity()


@torch.no_grad()
def _sees(stem: Stem, size: int, token: int, row: int) -> bool:
    images = torch.zeros(2, 3, size, size, dtype=torch.float64)
    images[:, :, row] = torch.nan
    tokens = stem(images)
    x: Tensor = tokens.x.unflatten(1, tokens.grid)
    return bool(x[0, token, token].isnan().any())


def _boundary(sees: Callable[[int], bool], inside: int, outside: int) -> int:
    while abs(outside - inside) > 1:
        middle = (inside + outside) // 2
        inside, outside = (middle, outside) if sees(middle) else (inside, middle)
    return inside
