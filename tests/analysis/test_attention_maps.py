"""Attention maps against what attention does with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybridvit.analysis.attention import attention_maps
from hybridvit.encoder.attention import Attention
from hybridvit.encoder.model import Encoder, HybridViT
from hybridvit.stems.linear import LinearStem

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no prefix": {"class_token": False, "pool": "mean"},
    "registers": {"registers": 2, "qk_norm": True},
    "relative": {"position": "relative"},
    "relative bias": {"position": "relative_bias"},
    "rotary": {"position": "rope_2d"},
    "axial": {"attention": "axial"},
    "axial, relative": {"attention": "axial", "position": "relative_bias"},
}


def model(**kind: Any) -> HybridViT:
    torch.manual_seed(0)
    stem = LinearStem(dim=16, patch=4)
    encoder = Encoder(grid=(3, 2), dim=16, depth=2, heads=2, **kind)
    made = HybridViT(stem, encoder, mean=(0.5,) * 3, std=(0.5,) * 3, head=nn.Linear(16, 3))
    made = made.double().eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_maps_give_what_attention_gave(kind: dict[str, Any]) -> None:
    """The weights times the values, by hand, are the output of every block's attention."""
    vit, images = model(**kind), torch.rand(3, 3, 12, 8, dtype=torch.float64)
    seen: list[tuple[Attention, Tensor, Tensor]] = []

    def look(module: Any, given: tuple[Any, ...], output: Tensor) -> None:
        seen.append((module, given[0], output))

    hooks = [block.attn.register_forward_hook(look) for block in vit.encoder.blocks]
    maps = attention_maps(vit, images)
    for hook in hooks:
        hook.remove()
    assert len(maps) == len(seen) == 2
    for weights, (attention, x, output) in zip(maps, seen, strict=True):
        tokens = x.shape[1]
        assert weights.shape == (3, 2, tokens, tokens)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, tokens, dtype=torch.float64))
        assert (weights >= 0).all()
        values = attention.qkv(x)[..., 32:].unflatten(2, (2, 8))  # (B, N, heads, d)
        mixed = torch.einsum("bhqk,bkhd->bqhd", weights, values).flatten(2)
        torch.testing.assert_close(attention.proj(mixed), output)


def test_maps_are_those_of_torchs_own_attention() -> None:
    vit, images = model(), torch.rand(2, 3, 12, 8, dtype=torch.float64)
    first = vit.encoder.blocks[0]
    theirs = nn.MultiheadAttention(16, 2, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(first.attn.qkv.weight)
        theirs.in_proj_bias.copy_(first.attn.qkv.bias)
        x = first.norm1(vit.encoder.embed(vit.tokens(images)))
        expected = theirs(x, x, x, average_attn_weights=False)[1]
    torch.testing.assert_close(attention_maps(vit, images)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_attention_has_maps_too(dtype: torch.dtype) -> None:
    """300 tokens, for which a CPU prefers the fused kernel in float32."""
    torch.manual_seed(0)
    attention = Attention(16, 2, bias=True, qk_norm=False, norm_eps=1e-6, dropout=0.0)
    x = torch.randn(1, 300, 16)
    q, k, _ = attention.qkv(x).chunk(3, dim=-1)
    q, k = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in (q, k))
    expected = (q @ k.mT / 8**0.5).softmax(-1)
    found = attention.to(dtype).weights(x.to(dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


def test_a_model_is_left_as_it_was() -> None:
    vit, images = model(), torch.rand(2, 3, 12, 8, dtype=torch.float64)
    before = vit(images)
    attention_maps(vit, images)
    assert torch.equal(vit(images), before)
    assert not any(block.attn._forward_pre_hooks for block in vit.encoder.blocks)
