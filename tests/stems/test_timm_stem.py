"""Feature maps of timm backbones as tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from conftest import make_batch, make_objective
from safetensors.torch import save_file
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


@pytest.fixture
def weights_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], dict[str, torch.Tensor]]:
    """Makes weights of a backbone, and has timm's own loader read them instead of the network."""
    create = timm.create_model

    def save(name: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        weights = create(name).state_dict()
        file = tmp_path / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in weights.items()}, file)

        def local(backbone: str, pretrained: bool = False, **args: object) -> nn.Module:
            assert backbone == name
            overlay = {"file": str(file), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
            return create(backbone, pretrained, pretrained_cfg_overlay=overlay, **args)

        monkeypatch.setattr(timm, "create_model", local)
        return dict(weights)

    return save


def test_pretrained_weights_arrive(
    weights_on_disk: Callable[[str], dict[str, torch.Tensor]],
) -> None:
    weights = weights_on_disk("resnet10t")
    loaded = timm_stem(dim=6, backbone="resnet10t", level=2, pretrained=True).backbone.state_dict()
    assert {"conv1.0.weight", "layer2.0.conv1.weight"} <= loaded.keys()
    assert all(torch.equal(value, weights[key]) for key, value in loaded.items())
    fresh = timm_stem(dim=6, backbone="resnet10t", level=2).backbone.state_dict()
    assert not torch.equal(fresh["conv1.0.weight"], weights["conv1.0.weight"])


def test_pretrained_weights_see_images_as_they_were_trained(
    weights_on_disk: Callable[[str], dict[str, torch.Tensor]],
) -> None:
    weights_on_disk("resnet10t")
    args = {"backbone": "resnet10t", "level": 1, "pretrained": True}
    model = make_objective(stem="timm", stem_args=args).model.eval()
    images = make_batch(2).images
    seen: list[torch.Tensor] = []
    model.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.features(images)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    torch.testing.assert_close(seen[0], (images - mean) / std)


@pytest.mark.parametrize("stem", ["linear", "timm"])
def test_all_other_stems_see_the_data_sets_normalisation(stem: str) -> None:
    args = {"backbone": "resnet10t", "level": 1} if stem == "timm" else {}
    model = make_objective(stem=stem, stem_args=args).model
    torch.testing.assert_close(model.mean.flatten(), torch.tensor([0.4, 0.5, 0.6]))
    torch.testing.assert_close(model.std.flatten(), torch.tensor([0.2, 0.3, 0.25]))


def test_pretrained_statistics_are_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **a: create(name, **a))
    for backbone, mean, std in (  # as the model cards on the hub say
        ("resnet10t", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("mobilenetv4_conv_small_050", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ):
        stem = timm_stem(dim=6, backbone=backbone, level=0, pretrained=True)
        assert stem.normalisation == (mean, std)
    assert timm_stem(dim=6, backbone="resnet10t", level=0).normalisation is None


def test_weights_that_timm_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match=r"stem 'timm': .*pretrained weights of 'convnext_atto_r"):
        timm_stem(dim=6, backbone="convnext_atto_rms", level=1, pretrained=True)
