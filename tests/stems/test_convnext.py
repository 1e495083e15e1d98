"""ConvNeXtStem against timm's ConvNeXt and a loop over visible positions."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from sparse_oracle import Sparse, check_tokens, convolve, sparse
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import Tensor, nn

from hybridvit.analysis.receptive_field import mixes_globally, receptive_field
from hybridvit.stems.convnext import Block, ConvNeXtStem


def redraw(module: nn.Module) -> None:
    """Lively weights: layer scales of 1e-6 would hide the blocks."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=0.1)


def test_block_equals_timms_with_the_same_weights() -> None:
    theirs = ConvNeXtBlock(6, norm_layer=timm.layers.LayerNorm).double()
    redraw(theirs)
    ours = Block(6).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_stages_equal_timms_with_the_same_weights() -> None:
    depths, channels = (1, 2, 1, 1), (4, 6, 8, 10)
    theirs = ConvNeXt(depths=depths, dims=channels, num_classes=0).double()
    redraw(theirs)
    stem = ConvNeXtStem(dim=5, depths=depths, channels=channels).double()
    stem.root.load_state_dict(theirs.stem[0].state_dict())
    stem.root_norm.load_state_dict(theirs.stem[1].state_dict())
    parts = [part for stage in theirs.stages for part in (stage.downsample, *stage.blocks)]
    for ours, part in zip(stem.layers, parts[1:], strict=True):  # the first stage has no downsample
        names = {"0.": "norm.", "1.": "conv."} if isinstance(part, nn.Sequential) else {}
        state = {names.get(k[:2], k[:2]) + k[2:]: v for k, v in part.state_dict().items()}
        ours.load_state_dict(state)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    expected = theirs.forward_features(images).movedim(1, -1)
    expected = F.layer_norm(expected, (10,), eps=1e-6) @ stem.proj.weight[:, :, 0, 0].T
    tokens = stem(images)
    assert tokens.grid == (2, 3)
    torch.testing.assert_close(tokens.x, expected.flatten(1, 2))


def test_default_is_convnext_tiny_without_its_last_stage() -> None:
    with torch.device("meta"):
        stem = ConvNeXtStem(dim=192)
        theirs = timm.create_model("convnext_tiny")
    assert stem.patch_px == 16
    kept = [theirs.stem, *theirs.stages[:3]]
    after = 2 * 384 + 384 * 192 + 192  # norm and projection
    count = sum(p.numel() for part in kept for p in part.parameters())
    assert sum(p.numel() for p in stem.parameters()) == count + after


def test_layer_scales_start_small() -> None:
    stem = ConvNeXtStem(dim=8, depths=(2,), channels=(6,))
    assert all((layer.gamma == 1e-6).all() for layer in stem.layers)


def test_masked_tokens_equal_a_loop_over_visible_positions() -> None:
    torch.manual_seed(0)
    stem = ConvNeXtStem(dim=5, depths=(1, 2), channels=(4, 6), strides=(2, 2), masked=True).double()
    redraw(stem)
    images = torch.randn(2, 3, 12, 16, dtype=torch.float64)
    visible = torch.rand(2, 3, 4) < 0.5

    def norm(layer: nn.Module) -> Any:
        return lambda v: layer(v).detach()

    def conv(x: Sparse, layer: nn.Conv2d) -> Sparse:
        return convolve(x, layer.weight, layer.bias, layer.stride[0], layer.padding[0],
                        layer.groups)  # fmt: skip

    x = conv(sparse(images, visible), stem.root).map(norm(stem.root_norm))
    for layer in stem.layers:
        if isinstance(layer, Block):
            y = conv(x, layer.conv_dw)
            x = Sparse({p: v + branch(layer, y.at[p]) for p, v in x.at.items()}, x.side, x.visible)
        else:
            x = conv(x.map(norm(layer.norm)), layer.conv)
    check_tokens(stem(images, visible).x, conv(x.map(norm(stem.norm)), stem.proj))


def branch(block: Block, v: Tensor) -> Tensor:
    """What one position gets after the depthwise convolution, from the weights alone."""
    fc1, fc2, norm = block.mlp.fc1, block.mlp.fc2, block.norm
    v = (v - v.mean()) / (v.var(correction=0) + 1e-6).sqrt() * norm.weight + norm.bias
    v = fc1.weight @ v + fc1.bias
    v = v * (1 + torch.erf(v / 2**0.5)) / 2
    return (block.gamma * (fc2.weight @ v + fc2.bias)).detach()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # r = 1 + sum of (kernel - 1) x product of the strides before.
        ({"depths": (1,)}, 4 + 6 * 4),
        ({"depths": (2,), "strides": (2,)}, 2 + 6 * 2 + 6 * 2),
        ({"depths": (1, 1), "strides": (2, 2)}, 2 + 6 * 2 + 2 + 6 * 4),
        ({"depths": (1, 1), "strides": (4, 1)}, 4 + 6 * 4 + 6 * 4),
    ],
)
def test_receptive_field_follows_the_recurrence(options: dict[str, Any], expected: int) -> None:
    stem = ConvNeXtStem(dim=8, channels=(4,) * len(options["depths"]), **options)
    assert receptive_field(stem, 128) == expected
    assert not mixes_globally(stem, 128)


def test_small_images_get_the_grid_of_4_pixel_patches() -> None:
    stem = ConvNeXtStem(dim=8, depths=(1, 1), channels=(4, 6), strides=(2, 2))
    assert stem(torch.randn(1, 3, 32, 36)).grid == (8, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1)}, "2 depths, 3 channels and 2 strides; give one each per stage"),
        ({"strides": (4,)}, "3 depths, 3 channels and 1 strides"),
        ({"depths": (), "channels": (), "strides": ()}, "need one stage"),
        ({"depths": (), "channels": ()}, "0 depths, 0 channels and 1 strides"),
        ({"depths": (3, 0, 9)}, r"depths=\[3, 0, 9\].*at least 1"),
        ({"strides": (4, 0, 2)}, r"strides=\[4, 0, 2\].*at least 1"),
    ],
)
def test_wrong_options_end_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ConvNeXtStem(dim=8, **options)
    assert str(caught.value).startswith("stem 'convnext': ")
    assert "\n" not in str(caught.value)
