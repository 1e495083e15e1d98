"""Channels last where it was measured to be faster, with the same values."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from hybridvit.contracts import Stem
from hybridvit.encoder import layout
from hybridvit.encoder.layout import prefers_channels_last
from hybridvit.encoder.model import Encoder, HybridViT
from hybridvit.stems.cct import CCTStem
from hybridvit.stems.conv import ConvStem
from hybridvit.stems.convnext import ConvNeXtStem
from hybridvit.stems.linear import LinearStem
from hybridvit.stems.overlap import OverlapStem
from hybridvit.stems.resnet import ResNetStem
from hybridvit.stems.timm import timm_stem

SMALL = {"blocks": (1, 1), "width": 0.125}
LAST = {
    "conv": lambda: ConvStem(dim=8, channels=(8, 16, 8), masked=True),
    "cct": lambda: CCTStem(dim=8, layers=1, masked=True),
    "resnet": lambda: ResNetStem(dim=8, **SMALL, norm="batch", masked=True),
    "timm": lambda: timm_stem(dim=8, backbone="resnet10t", level=2),
}
FIRST = {
    "conv, group": lambda: ConvStem(dim=8, channels=(8, 16, 8), norm="group"),
    "resnet, group": lambda: ResNetStem(dim=8, **SMALL),
    "overlap": lambda: OverlapStem(dim=8, patch=8),
    "linear": lambda: LinearStem(dim=8, patch=8),
    "convnext": lambda: ConvNeXtStem(dim=8, depths=(1, 1), channels=(8, 8)),
}


def test_chosen_where_it_is_faster() -> None:
    for kind, make in LAST.items():
        assert prefers_channels_last(make(), torch.device("cpu")), kind
        assert not prefers_channels_last(make(), torch.device("meta")), kind
    for kind, make in FIRST.items():
        assert not prefers_channels_last(make(), torch.device("cpu")), kind


def gradients(model: HybridViT, images: Tensor, visible: Tensor | None) -> list[Tensor]:
    """Tokens, features and every parameter's gradient."""
    tokens = model.tokens(images, visible).x
    y = model.encoder.features(model.tokens(images, visible))
    (y.square().mean() + tokens.square().mean()).backward()
    return [tokens, y, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("kind", LAST)
def test_values_and_gradients_stay(kind: str, hides: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    stem: Stem = LAST[kind]()
    grid = (32 // stem.patch_px,) * 2
    encoder = Encoder(grid=grid, dim=8, depth=1, heads=2)
    last = HybridViT(stem, encoder, mean=(0.5,) * 3, std=(0.2,) * 3).double()
    first = copy.deepcopy(last)
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    visible = torch.rand(3, *grid) < 0.5 if hides else None
    seen = []
    stem.register_forward_pre_hook(lambda _, given: seen.append(given[0].stride()))
    ours = gradients(last, images, visible)
    monkeypatch.setattr(layout, "prefers_channels_last", lambda *_: False)
    theirs = gradients(first, images, visible)
    assert seen[0] == (3072, 1, 96, 3)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
