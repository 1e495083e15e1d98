"""ConvStem against torchvision's convolutional stem and a loop over visible positions."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sparse_oracle import check_tokens, convolve, normalise, sparse
from torch import nn
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

from hybridvit.analysis.receptive_field import mixes_globally, receptive_field
from hybridvit.stems.conv import ConvStem


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("channels", "strides"), [((4, 6, 8, 10), (2, 2, 2, 2)), ((4, 6, 6, 8), (2, 1, 1, 2))]
)
def test_equals_torchvisions_stem_with_the_same_weights(
    channels: tuple[int, ...], strides: tuple[int, ...], training: bool
) -> None:
    configs = [ConvStemConfig(c, 3, s) for c, s in zip(channels, strides, strict=True)]
    stem = ConvStem(dim=12, channels=channels, strides=strides).double()
    theirs = VisionTransformer(64, stem.patch_px, 1, 1, 12, 12, conv_stem_configs=configs).conv_proj
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.running_var)
    nn.init.normal_(theirs.conv_last.weight)
    theirs = theirs.double().train(training)
    layers = list(theirs)
    for i, layer in enumerate(layers[:-1]):
        stem.convs[i].load_state_dict(layer[0].state_dict())
        stem.norms[i].load_state_dict(layer[1].state_dict())
    stem.proj.load_state_dict(layers[-1].state_dict())
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    tokens = stem.train(training)(images)
    torch.testing.assert_close(tokens.x, theirs(images).flatten(2).mT)
    for norm, layer in zip(stem.norms, layers[:-1], strict=True):
        torch.testing.assert_close(norm.running_var, layer[1].running_var)
    count = sum(p.numel() for p in stem.parameters())
    assert count == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_masked_tokens_equal_a_loop_over_visible_positions(norm: Any) -> None:
    torch.manual_seed(0)
    stem = ConvStem(dim=5, channels=(4, 6, 8), strides=(2, 1, 2), norm=norm, masked=True).double()
    for layer in stem.norms:
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.uniform_(layer.bias, 0.5, 1.5)
    images = torch.randn(2, 3, 12, 16, dtype=torch.float64)
    visible = torch.rand(2, 3, 4) < 0.5
    x = sparse(images, visible)
    for conv, layer in zip(stem.convs, stem.norms, strict=True):
        x = normalise(convolve(x, conv.weight, None, conv.stride[0], 1), layer).map(F.relu)
    x = convolve(x, stem.proj.weight, stem.proj.bias, 1, 0)
    check_tokens(stem(images, visible).x, x)


@pytest.mark.parametrize(
    ("strides", "expected"),
    [
        # r = 1 + sum of (kernel - 1) x product of the strides before.
        ((2,), 3),
        ((2, 2), 1 + 2 + 2 * 2),
        ((2, 2, 2, 2), 31),
        ((1, 2, 1, 2), 1 + 2 + 2 + 2 * 2 + 2 * 2),
    ],
)
def test_receptive_field_follows_the_recurrence(strides: tuple[int, ...], expected: int) -> None:
    stem = ConvStem(dim=8, channels=(4,) * len(strides), strides=strides)
    assert receptive_field(stem, 128) == expected


def test_default_is_the_papers_stem() -> None:
    with torch.device("meta"):
        stem = ConvStem(dim=384)
    assert stem.patch_px == 16
    assert stem.couples_batch
    widths = (3, 48, 96, 192, 384)
    convs = sum(9 * a * b + 2 * b for a, b in pairwise(widths))
    assert sum(p.numel() for p in stem.parameters()) == convs + 384 * 384 + 384


def test_small_images_get_the_grid_of_4_pixel_patches() -> None:
    stem = ConvStem(dim=8, channels=(6, 8), norm="group")
    assert not stem.couples_batch
    assert mixes_globally(stem, 32)
    assert stem(torch.randn(1, 3, 32, 36)).grid == (8, 9)


def test_first_weights_keep_the_variance() -> None:
    torch.manual_seed(0)
    stem = ConvStem(dim=200)
    x = stem(torch.randn(4, 3, 64, 64)).x
    assert 0.3 < x.var().item() < 1.5  # of ReLU(normal): 1/2, were the features independent
    assert stem.proj.bias.abs().max() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": ()}, r"channels=\[\] needs one layer"),
        ({"channels": (8, 0)}, r"channels=\[8, 0\] needs"),
        ({"channels": (8, 8), "strides": (2,)}, "1 strides for 2 convolutions; give one each"),
        ({"channels": (8, 8), "strides": (4, 2)}, r"strides=\[4, 2\] must be 1 or 2"),
        ({"channels": (8,), "strides": (0,)}, r"strides=\[0\] must be 1 or 2"),
    ],
)
def test_wrong_options_end_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ConvStem(dim=8, **options)
    assert str(caught.value).startswith("stem 'conv': ")
    assert "\n" not in str(caught.value)
