"""ResNetStem against brute force, timm's backbones and the paper's strides."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from sparse_oracle import Sparse, check_tokens, convolve, max_pool, normalise, sparse
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck as TorchvisionBottleneck

from hybridvit.stems.resnet import Bottleneck, ResNetStem, StdConv, pad_same


def same_convolution(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """SAME convolution of (C, H, W) pixel by pixel, as TensorFlow defines it."""
    kernel, outputs = weight.shape[-1], [math.ceil(side / stride) for side in x.shape[1:]]
    offsets = [
        max((n - 1) * stride + kernel - side, 0) // 2
        for n, side in zip(outputs, x.shape[1:], strict=True)
    ]
    out = torch.zeros(len(weight), *outputs, dtype=x.dtype)
    for i in range(outputs[0]):
        for j in range(outputs[1]):
            for a in range(kernel):
                for b in range(kernel):
                    row, column = i * stride + a - offsets[0], j * stride + b - offsets[1]
                    if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
                        out[:, i, j] += weight[:, :, a, b] @ x[:, row, column]
    return out


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [(8, 9), (5, 7)])
def test_same_padding_is_tensorflows(kernel: int, stride: int, size: tuple[int, int]) -> None:
    x = torch.randn(2, *size, dtype=torch.float64)
    weight = torch.randn(4, 2, kernel, kernel, dtype=torch.float64)
    got = F.conv2d(pad_same(x[None], kernel, stride), weight, stride=stride)[0]
    torch.testing.assert_close(got, same_convolution(x, weight, stride))


def test_standardised_filters_have_mean_0_and_variance_1() -> None:
    conv = StdConv(3, 5, 3).double()
    nn.init.normal_(conv.weight, mean=2.0, std=3.0)
    # The response to an image with a single pixel set reads the filters.
    x = torch.zeros(3, 3, 5, 5, dtype=torch.float64)
    for channel in range(3):
        x[channel, channel, 2, 2] = 1
    filters = conv(x)[:, :, 1:4, 1:4].transpose(0, 1).flatten(1)  # (5, 27), mirrored
    torch.testing.assert_close(filters.mean(1), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(filters.var(1, correction=0), torch.ones(5, dtype=torch.float64))
    expected = [(w - w.mean()) / w.std(correction=0) for w in conv.weight.flatten(1)]
    mirrored = filters.view(5, 3, 3, 3).flip(2, 3).flatten(1)
    torch.testing.assert_close(mirrored, torch.stack(expected))


def test_outputs_do_not_see_scale_and_shift_of_filters() -> None:
    conv, x = StdConv(3, 4, 3, 2), torch.randn(1, 3, 8, 8)
    before = conv(x)
    with torch.no_grad():
        conv.weight.mul_(3).add_(0.5)
    torch.testing.assert_close(conv(x), before, rtol=1e-4, atol=1e-4)


BACKBONES = {
    "vit_small_r26_s32_224": ((2, 2, 2, 2), 32),
    "vit_base_r50_s16_224": ((3, 4, 9), 16),
    "vit_large_r50_s32_224": ((3, 4, 6, 3), 32),
    "vit_tiny_r_s16_p8_224": ((), 4),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_strides_and_parameters_are_those_of_the_papers_backbones(name: str) -> None:
    blocks, stride = BACKBONES[name]
    with torch.device("meta"):
        theirs = timm.create_model(name).patch_embed.backbone
        stem = ResNetStem(dim=8, blocks=blocks)
        x = torch.empty(1, 3, 64, 96)
        assert stem.patch_px == stride
        assert stem(x).grid == tuple(theirs(x).shape[-2:]) == (64 // stride, 96 // stride)
    count = sum(p.numel() for p in stem.parameters()) - sum(
        p.numel() for p in stem.proj.parameters()
    )
    assert count == sum(p.numel() for p in theirs.parameters())


def test_default_is_the_papers_r50_with_stage_4_moved_to_stage_3() -> None:
    with torch.device("meta"):
        stem = ResNetStem(dim=768)
    assert [len(stage) for stage in stem.stages] == [3, 4, 9]
    assert stem.patch_px == 16
    assert stem.proj.weight.shape == (768, 1024, 1, 1)


def test_small_images_get_the_grid_of_4_pixel_patches() -> None:
    stem = ResNetStem(
        dim=8, blocks=(1, 1), strides=(2, 2), width=1 / 16, root_kernel=3, root_stride=1,
        root_pool=False,
    )  # fmt: skip
    assert stem.patch_px == 4
    assert stem(torch.randn(1, 3, 32, 32)).grid == (8, 8)


def test_blocks_start_as_their_shortcuts() -> None:
    block = Bottleneck(32, 32, 1, groups=4)
    x = torch.randn(2, 32, 6, 6).relu()
    torch.testing.assert_close(block(x), x)


def test_width_scales_channels_and_groups() -> None:
    stem = ResNetStem(dim=8, blocks=(1,), width=0.25)
    assert stem.root.weight.shape[0] == 16
    groups = {m.num_groups for m in stem.modules() if isinstance(m, nn.GroupNorm)}
    assert groups == {8}
    assert stem.proj.in_channels == 64


def test_batch_norm_blocks_are_torchvisions() -> None:
    theirs = TorchvisionBottleneck(32, 8).double()  # stride 1: with 2, SAME pads elsewhere
    ours = Bottleneck(32, 32, 1, groups=4, norm="batch").double()
    state = {key.replace("bn", "norm"): value for key, value in theirs.state_dict().items()}
    ours.load_state_dict(state)
    x = torch.randn(3, 32, 6, 7, dtype=torch.float64).relu()
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))


def test_batch_norm_comes_with_plain_convolutions_at_any_grid() -> None:
    stem = ResNetStem(dim=8, blocks=(1, 1), strides=(2, 2), width=1 / 8, root_stride=1,
                      root_pool=False, norm="batch")  # fmt: skip
    assert stem.couples_batch
    assert not any(isinstance(m, nn.GroupNorm) for m in stem.modules())
    assert stem(torch.randn(2, 3, 32, 36)).grid == (8, 9)
    x = torch.randn(1, 3, 8, 8)
    expected = F.conv2d(F.pad(x, (3, 3, 3, 3)), stem.root.weight)
    torch.testing.assert_close(stem.root(x), expected)
    names = {name for name, _ in stem.named_parameters()}
    assert names == {name for name, _ in ResNetStem(dim=8, blocks=(1, 1)).named_parameters()}


def oracle(stem: ResNetStem, images: Tensor, visible: Tensor) -> Sparse:
    """The stem on visible positions alone, its SAME padding written out."""

    def conv(x: Sparse, layer: StdConv) -> Sparse:
        w = layer.weight
        if not stem.couples_batch:
            mean, var = w.mean((1, 2, 3), True), w.var((1, 2, 3), correction=0, keepdim=True)
            w = (w - mean) / (var + 1e-8).sqrt()
        kernel, stride = layer.kernel_size[0], layer.stride[0]
        return convolve(x, w, None, stride, max(kernel - stride, 0) // 2)

    def add(x: Sparse, y: Sparse) -> Sparse:
        return Sparse({p: x.at[p] + y.at[p] for p in x.at}, x.side, x.visible)

    x = normalise(conv(sparse(images, visible), stem.root), stem.root_norm).map(F.relu)
    if stem.root_pool:
        x = max_pool(x, 3, 2, 0)
    for stage in stem.stages:
        for block in stage:
            y = normalise(conv(x, block.conv1), block.norm1).map(F.relu)
            y = normalise(conv(y, block.conv2), block.norm2).map(F.relu)
            y = normalise(conv(y, block.conv3), block.norm3)
            if isinstance(block.downsample, nn.Sequential):
                x = normalise(conv(x, block.downsample[0]), block.downsample[1])
            x = add(x, y).map(F.relu)
    proj = stem.proj
    return convolve(x, proj.weight, proj.bias, proj.stride[0], 0)


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_masked_tokens_equal_a_loop_over_visible_positions(norm: Any, pool: bool) -> None:
    torch.manual_seed(0)
    stem = ResNetStem(dim=5, blocks=(2, 1), strides=(1, 2), width=1 / 16, root_pool=pool,
                      patch=1 if pool else 2, norm=norm, masked=True).double()  # fmt: skip
    for parameter in stem.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    visible = torch.tensor([[[1, 0, 1], [0, 0, 1]], [[0, 1, 0], [1, 0, 0]]], dtype=torch.bool)
    check_tokens(stem(images, visible).x, oracle(stem, images, visible))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0.3}, "width=0.3 must be a multiple of 1/32"),
        ({"width": 0.0}, "width=0.0 must be a multiple of 1/32"),
        ({"blocks": (1, 1), "strides": (1,)}, "1 strides for 2 stages"),
        ({"blocks": (0, 1)}, "must be at least 1"),
        ({"blocks": (1,), "strides": (0,)}, "must be at least 1"),
        ({"root_stride": 0}, "must be at least 1"),
        ({"patch": 0}, "must be at least 1"),
    ],
)
def test_wrong_options_end_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ResNetStem(dim=8, **options)
    assert "\n" not in str(caught.value)
