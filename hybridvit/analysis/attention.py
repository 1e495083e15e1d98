"""Where tokens look: the attention of every block, without slowing what trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridvit.encoder.model import HybridViT


@torch.no_grad()
def attention_maps(model: HybridViT, images: Tensor) -> list[Tensor]:
    """The weights of each block's attention, (B, heads, T, T), for images (B, 3, H, W) in [0, 1].

    The T = P + N tokens are class and register tokens first, then patches in row-major order;
    rows are queries and add up to 1. Dosovitskiy et al. 2021, Appendix D.7 and D.8, look at them.
    Training keeps nothing for this; the weights are computed anew.
    """
    maps: list[Tensor] = []

    def keep(attention: Any, given: tuple[Any, ...]) -> None:
        maps.append(attention.weights(*given))

    blocks: Any = model.encoder.blocks
    hooks = [block.attn.register_forward_pre_hook(keep) for block in blocks]
    try:
        model.encoder(model.tokens(images))
    finally:
        for hook in hooks:
            hook.remove()
    return maps
