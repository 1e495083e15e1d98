"""Feature maps of timm backbones as tokens."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from hybridvit.backbones import create_timm
from hybridvit.stems.timm import FeatureMapStem, timm_stem


@pytest.mark.parametrize(
    ("name", "level", "patch", "stride"),
    [
        ("resnet18", 2, 1, 8),
        ("resnet26d", 4, 1, 32),
        ("convnext_atto", 1, 2, 16),
        ("mobilenetv3_small_050", 2, 1, 8),
        ("resnet18", 4, 3, 96),  # 256 px are no multiple, and 8 // 3 is 2
    ],
)
def test_backbones_give_grids_of_their_stride(
    name: str, level: int, patch: int, stride: int
) -> None:
    stem = timm_stem(dim=6, backbone=name, level=level, patch=patch).eval()
    assert stem.patch_px == stride
    tokens = stem(torch.randn(1, 3, 2 * stride, 3 * stride))
    assert tokens.grid == (2, 3)
    assert tokens.x.shape == (1, 6, 6)


def test_tokens_are_the_projected_feature_map() -> None:
    stem = timm_stem(dim=6, backbone="resnet18", level=2).eval()
    oracle = timm.create_model("resnet18", features_only=True, out_indices=(0, 1, 2)).eval()
    oracle.load_state_dict(stem.backbone.state_dict())
    x = torch.randn(2, 3, 32, 48)
    feature_map = oracle(x)[2]
    weight, bias = stem.proj.weight, stem.proj.bias
    assert isinstance(weight, torch.Tensor)
    expected = torch.einsum("bchw,dc->bhwd", feature_map, weight[:, :, 0, 0]) + bias
    torch.testing.assert_close(stem(x).x, expected.flatten(1, 2), rtol=1e-4, atol=1e-5)


def test_measuring_the_stride_changes_nothing() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4))
    backbone[1].eval()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    stem = FeatureMapStem(backbone, nn.Identity())
    assert stem.patch_px == 4
    assert backbone[0].training
    assert not backbone[1].training
    assert all(torch.equal(before[k], v) for k, v in backbone.state_dict().items())


def test_lists_of_feature_maps_give_the_last() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 5, 2, 2), nn.Conv2d(5, 7, 2, 2)

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            y = self.first(x)
            return [y, self.second(y)]

    stem = FeatureMapStem(Two(), nn.Identity())
    assert stem.patch_px == 4
    assert stem(torch.randn(1, 3, 8, 8)).x.shape == (1, 4, 7)


def test_batch_coupling_is_declared_for_batch_norm_alone() -> None:
    assert timm_stem(dim=4, backbone="resnet18", level=1).couples_batch
    assert not timm_stem(dim=4, backbone="convnext_atto", level=1).couples_batch


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet26dd"}, "no model 'resnet26dd'; did you mean .*resnet26d"),
        ({"backbone": "zzzz"}, "no model 'zzzz'"),
        ({"level": 9}, "timm could not make 'resnet26d'.*level=9"),
        ({"backbone": "mixer_s32_224"}, "mixer_s32_224"),
        ({"backbone": "swin_tiny_patch4_window7_224", "level": 3}, "refuses 256 x 256 px"),
        ({"patch": 0}, "patch=0 must be at least 1"),
    ],
)
def test_wrong_options_end_in_one_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        timm_stem(dim=8, **options)
    assert str(caught.value).startswith("stem 'timm': ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "backbone",
    [
        nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.AdaptiveAvgPool2d(3)),  # no stride at all
        nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(2)),  # a sequence
        nn.Sequential(nn.Conv2d(3, 4, 3)),  # 254 px
        nn.Sequential(nn.Conv2d(3, 4, (4, 2), (4, 2))),  # oblong
    ],
)
def test_backbones_without_a_grid_are_refused(backbone: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"the backbone maps 256 x 256 px to \(1, 4, "):
        FeatureMapStem(backbone, nn.Identity())


def test_channels_last_maps_are_refused() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.conv(x).permute(0, 2, 3, 1)
            return out[:, :, :, :4]

    with pytest.raises(ValueError, match=r"\(1, 8, 8, 4\)"):
        FeatureMapStem(Last(), nn.Conv2d(4, 6, 1))


def test_a_failed_download_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ValueError, match="could not load the pretrained weights of 'resnet18'"):
        create_timm("resnet18", pretrained=True)
    with pytest.raises(
        ValueError, match=r"could not make 'resnet18' \(OSError: no route to host\)$"
    ):
        create_timm("resnet18", pretrained=False)
