"""from_timm and to_timm against timm's own outputs, after every tensor has been redrawn."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import (
    StdConv2d,
    StdConv2dSame,
    SwiGLU,
    SwiGLUPacked,
)
from timm_models import (
    RELATIVE,
    assert_equal,
    bit,
    bn_backbone,
    draw,
    edited_bit,
    error,
    hybrid,
    images,
    redraw,
    statistics,
    vit,
)
from torch import Tensor, nn

import hybridvit
from hybridvit.contracts import Stem, Tokens
from hybridvit.encoder.model import Encoder, HybridViT
from hybridvit.encoder.presets import ENCODERS
from hybridvit.interop.timm_options import ratio
from hybridvit.stems.linear import LinearStem
from hybridvit.stems.resnet import ResNetStem
from hybridvit.stems.timm import FeatureMapStem, timm_stem

NAMES = {
    "vit_tiny_patch16_224": LinearStem,
    "vit_small_patch32_224": LinearStem,
    "vit_base_patch8_224": LinearStem,
    "vit_base_patch16_reg4_gap_256": LinearStem,
    "vit_small_patch14_dinov2": LinearStem,
    "vit_small_r26_s32_224": ResNetStem,
    "vit_base_r50_s16_224": ResNetStem,
    "vit_tiny_r_s16_p8_224": ResNetStem,
    "vit_base_resnet50d_224": FeatureMapStem,
}


@pytest.mark.parametrize("name", NAMES)
def test_named_models_have_equal_outputs_and_parameter_counts(name: str) -> None:
    theirs = timm.create_model(name).eval()
    redraw(theirs)
    for dtype in RELATIVE:
        theirs = theirs.to(dtype)
        ours = hybridvit.from_timm(theirs)
        assert type(ours.stem) is NAMES[name]
        assert ours.image_size == theirs.pretrained_cfg["input_size"][1:]
        assert not ours.training
        assert_equal(theirs, ours, ours.image_size)
    assert _count(ours) == _count(theirs)
    mean, std = statistics(theirs, ours.mean)
    torch.testing.assert_close(ours.mean, mean, rtol=0, atol=0)
    torch.testing.assert_close(ours.std, std, rtol=0, atol=0)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# --- small models, one of each structure ---

SMALL: dict[str, Callable[[], Any]] = {
    "plain": vit,
    "no_bias": partial(vit, qkv_bias=False),
    "no_head": partial(vit, num_classes=0),
    "pre_norm": partial(vit, pre_norm=True),
    "layer_scale": partial(vit, init_values=1e-5),
    "qk_norm": partial(vit, qk_norm=True),
    "gap": partial(vit, global_pool="avg"),
    "gap_without_class_token": partial(vit, global_pool="avg", class_token=False, fc_norm=False),
    "token_fc_norm": partial(vit, fc_norm=True),
    "no_final_norm": partial(vit, final_norm=False),
    "no_embed_class": partial(vit, no_embed_class=True, reg_tokens=3),
    "registers": partial(vit, reg_tokens=3, global_pool="avg"),
    "registers_alone": partial(vit, reg_tokens=2, global_pool="avg", class_token=False),
    "map": partial(vit, global_pool="map", class_token=False),
    "map_with_prefix": partial(vit, global_pool="map", reg_tokens=2, fc_norm=True),
    "no_position": partial(vit, pos_embed="none"),
    "eps": partial(vit, norm_layer=partial(nn.LayerNorm, eps=0.1), qk_norm=True, pre_norm=True),
    "relu": partial(vit, act_layer="relu"),
    "silu": partial(vit, act_layer="silu"),
    "quick_gelu": partial(vit, act_layer="quick_gelu", global_pool="map"),
    "gelu_tanh": partial(vit, act_layer="gelu_tanh"),
    "gelu_tanh_torch": partial(vit, act_layer=partial(nn.GELU, approximate="tanh")),
    "swiglu_packed": partial(vit, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU),
    "swiglu_packed_map": partial(
        vit, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, global_pool="map", mlp_ratio=3.0
    ),
    "swiglu": partial(vit, mlp_layer=SwiGLU, act_layer=nn.SiLU, mlp_ratio=2.66),
    "odd_mlp_ratio": partial(vit, mlp_ratio=2.7, global_pool="map"),
    "dynamic": partial(vit, dynamic_img_size=True),
    "non_square": partial(vit, img_size=(16, 40)),
    "non_square_dynamic": partial(vit, img_size=(24, 16), dynamic_img_size=True, reg_tokens=1),
    "resnet": lambda: hybrid(bit()),
    "resnet_patch": lambda: hybrid(bit((2,)), patch_size=2, img_size=(32, 48)),
    "resnet_dynamic": lambda: hybrid(bit(), dynamic_img_size=True),
    "resnet_root": lambda: hybrid(bit().stem, patch_size=4),
    "feature_map": lambda: hybrid(bn_backbone(), patch_size=2),
    "feature_map_no_proj": lambda: hybrid(bn_backbone(), embed={"proj": False}),
    "feature_map_dynamic": lambda: hybrid(bn_backbone(), dynamic_img_size=True),
    # Near misses of ResNetStem, which must not become one.
    "resnet_pre_norm": lambda: hybrid(bit(), pre_norm=True),
    "resnet_symmetric": lambda: hybrid(bit(conv_layer=partial(StdConv2d, eps=1e-8), stem_type="")),
    "resnet_eps": lambda: hybrid(bit(conv_layer=partial(StdConv2dSame, eps=0.1))),
    "resnet_padding": lambda: hybrid(
        bit(conv_layer=partial(StdConv2dSame, eps=1e-8, padding=""))
    ),
    "resnet_norm_eps": lambda: hybrid(
        bit(norm_layer=partial(timm.layers.GroupNormAct, num_groups=4, eps=0.1))
    ),
    "resnet_groups": lambda: hybrid(edited_bit("stages.1.blocks.0.norm2", "num_groups", 2)),
    "resnet_no_relu": lambda: hybrid(edited_bit("stages.0.blocks.0.norm1", "act", nn.Identity())),
    "resnet_dilated_conv": lambda: hybrid(
        edited_bit("stages.1.blocks.0.conv2", "dilation", (2, 2))
    ),
    "resnet_no_proj": lambda: hybrid(bit(), embed={"proj": False}, embed_dim=64),
    "resnet_silu": lambda: hybrid(bit(act_layer=nn.SiLU)),
    "resnet_wide": lambda: hybrid(bit(channels=(64, 128), stem_chs=16)),
    "resnet_deep_root": lambda: hybrid(bit(stem_type="deep_same")),
    "resnet_average": lambda: hybrid(bit(avg_down=True)),
    "resnet_dilated": lambda: hybrid(bit((1, 2), output_stride=4)),
    "resnet_preact": lambda: hybrid(bit(preact=True)),
}  # fmt: skip


def small(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    model = SMALL[name]().to(dtype).eval()
    redraw(model, seed)
    model.pretrained_cfg = {"mean": (0.3, 0.4, 0.5), "std": (0.2, 0.25, 0.3)}
    return model


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("name", SMALL)
def test_small_models_have_equal_outputs(name: str, dtype: torch.dtype) -> None:
    theirs = small(name, dtype)
    ours = hybridvit.from_timm(theirs)
    assert ours.image_size == tuple(theirs.patch_embed.img_size)
    assert_equal(theirs, ours, ours.image_size, batch=2)
    assert _count(ours) == _count(theirs)


@pytest.mark.parametrize("name", [name for name in SMALL if name.startswith("resnet_")])
def test_only_bit_backbones_become_resnet_stems(name: str) -> None:
    expected = name.removeprefix("resnet_") in ("patch", "dynamic", "root")
    assert isinstance(hybridvit.from_timm(small(name)).stem, ResNetStem) == expected


@pytest.mark.parametrize(
    "name", ["dynamic", "non_square_dynamic", "resnet_dynamic", "feature_map_dynamic"]
)
def test_dynamic_models_have_equal_outputs_at_other_sizes(name: str) -> None:
    theirs = small(name)
    ours = hybridvit.from_timm(theirs)
    for size in ((32, 64), (64, 32), (96, 96)):
        assert_equal(theirs, ours, size)


def test_fixed_size_models_are_interpolated_as_dynamic_ones_are() -> None:
    fixed, dynamic = small("plain"), small("dynamic")
    assert error(dynamic, hybridvit.from_timm(fixed), images(24, 32, torch.float64)) < 1e-10


# A constant added to all keys shifts each row of attention logits, which softmax does not see.
WITHOUT_EFFECT = ("attn.k_norm.bias",)


@pytest.mark.parametrize(
    "name",
    ["plain", "pre_norm", "layer_scale", "qk_norm", "gap", "token_fc_norm", "no_embed_class",
     "registers", "map", "map_with_prefix", "swiglu_packed", "swiglu", "resnet", "resnet_root",
     "feature_map", "feature_map_no_proj"],
)  # fmt: skip
def test_every_tensor_of_ours_matters(name: str) -> None:
    theirs = small(name)
    ours = hybridvit.from_timm(theirs)
    x = images(*ours.image_size, torch.float64)
    generator = torch.Generator().manual_seed(7)
    seen = 0
    for key, tensor in (*ours.named_parameters(), *ours.named_buffers()):
        if not tensor.is_floating_point():
            continue
        old = tensor.detach().clone()
        with torch.no_grad():
            tensor.copy_(draw(key, tensor, generator))
        if key.endswith(WITHOUT_EFFECT):
            assert error(theirs, ours, x) < 1e-10
            assert torch.equal(old, theirs.get_parameter(key.removeprefix("encoder.")))
        else:
            assert error(theirs, ours, x) > 1e-6, key
        with torch.no_grad():
            tensor.copy_(old)
        seen += 1
    assert error(theirs, ours, x) < 1e-10  # all of it put back
    assert seen >= len(list(theirs.parameters())) + 2 - (4 if name == "swiglu" else 0)


def test_mlp_ratio_gives_back_the_hidden_width() -> None:
    pairs = [(dim, hidden) for dim in range(1, 100) for hidden in range(1, 400)]
    assert any(int(dim * (hidden / dim)) != hidden for dim, hidden in pairs)
    assert all(int(dim * ratio(hidden, dim)) == hidden for dim, hidden in pairs)


# --- what is carried over beside the outputs ---


def test_weights_are_copied() -> None:
    for name in ("plain", "resnet", "feature_map"):
        theirs = small(name)
        ours = hybridvit.from_timm(theirs)
        back = hybridvit.to_timm(ours)
        before = copy.deepcopy(ours.state_dict())
        redraw(theirs, seed=5)
        redraw(back, seed=6)
        assert all(torch.equal(before[k], v) for k, v in ours.state_dict().items())


def test_mode_is_kept_also_of_frozen_parts() -> None:
    theirs = SMALL["feature_map"]().train()
    theirs.patch_embed.backbone[1].eval()
    ours: Any = hybridvit.from_timm(theirs)
    assert ours.training
    assert ours.encoder.blocks[0].training
    assert ours.stem.backbone.training
    assert not ours.stem.backbone[1].training
    back = hybridvit.to_timm(ours)
    assert back.training
    assert not back.patch_embed.backbone[1].training


def test_rates_are_kept_in_both_directions() -> None:
    theirs = vit(pos_drop_rate=0.1, proj_drop_rate=0.2, attn_drop_rate=0.3, drop_path_rate=0.4)
    ours: Any = hybridvit.from_timm(theirs)
    block = ours.encoder.blocks[1]
    assert ours.encoder.dropout.p == 0.1
    assert (block.dropout.p, block.mlp.dropout.p, block.attn.dropout) == (0.2, 0.2, 0.3)
    assert [b.drop_path for b in ours.encoder.blocks] == pytest.approx([0, 0.4])
    back = hybridvit.to_timm(ours)
    assert str(back.blocks) == str(theirs.blocks)
    assert back.pos_drop.p == 0.1


def test_training_with_dropout_draws_alike() -> None:
    # No dropout of attention weights: timm's fused kernel draws them in another order.
    theirs = vit(pos_drop_rate=0.1, proj_drop_rate=0.2).double()
    redraw(theirs)
    ours = hybridvit.from_timm(theirs)
    x = images(16, 16, torch.float64, batch=3)
    torch.manual_seed(3)
    expected = theirs(x)
    torch.manual_seed(3)
    torch.testing.assert_close(ours(x), expected, rtol=1e-10, atol=1e-12)


def test_gradients_are_equal() -> None:
    theirs = small("resnet")
    ours = hybridvit.from_timm(theirs)
    x = images(32, 32, torch.float64, batch=2)
    mean, std = statistics(theirs, x)
    theirs((x - mean) / std).square().sum().backward()
    ours(x).square().sum().backward()
    assert isinstance(ours.stem, ResNetStem)
    pairs = [
        (ours.stem.root.weight, theirs.patch_embed.backbone.stem.conv.weight),
        (ours.encoder.pos_embed, theirs.pos_embed),
        (ours.encoder.cls_token, theirs.cls_token),
    ]
    for mine, other in pairs:
        assert mine is not None
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-8, atol=1e-10)


def test_without_pretrained_cfg_images_are_not_normalised() -> None:
    theirs = vit().eval()
    redraw(theirs)
    ours = hybridvit.from_timm(theirs)
    x = images(16, 16, torch.float32)
    torch.testing.assert_close(ours(x), theirs(x))


def test_name_gives_the_model_of_that_name() -> None:
    ours = hybridvit.from_timm("vit_tiny_patch16_224.augreg_in21k")
    assert _count(ours) == _count(timm.create_model("vit_tiny_patch16_224.augreg_in21k"))
    assert ours.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert ours.image_size == (224, 224)


# --- back to timm ---


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("name", SMALL)
def test_round_trip_is_exact(name: str, dtype: torch.dtype) -> None:
    ours = hybridvit.from_timm(small(name, dtype))
    back = hybridvit.to_timm(ours)
    assert_round_trip(ours, back)
    for size in (ours.image_size, (96, 64)):
        assert_equal(back, ours, size)


def assert_round_trip(ours: HybridViT, back: Any) -> None:
    again = hybridvit.from_timm(back)
    state, expected = again.state_dict(), ours.state_dict()
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert state[key].dtype == value.dtype
        assert torch.equal(state[key], value), key
    assert again.image_size == ours.image_size
    x = images(*ours.image_size, ours.mean.dtype)
    with torch.no_grad():
        assert torch.equal(again(x), ours(x))


OUR_STEMS: dict[str, Callable[[], Stem]] = {
    "linear": lambda: LinearStem(dim=16, patch=8),
    "linear_no_bias": lambda: LinearStem(dim=16, patch=8, bias=False),
    "resnet": lambda: ResNetStem(dim=16, blocks=(1, 2), width=1 / 8),
    "resnet_cifar": lambda: ResNetStem(
        dim=16, blocks=(1, 1), strides=(2, 2), width=1 / 8, root_kernel=3, root_stride=1,
        root_pool=False, patch=2,
    ),
    "resnet_five_stages": lambda: ResNetStem(
        dim=16, blocks=(1, 1, 1, 1, 1), strides=(1, 2, 1, 1, 1), width=1 / 8
    ),
    "resnet_root": lambda: ResNetStem(dim=16, blocks=(), width=1 / 8, root_pool=False, patch=4),
    "feature_map": lambda: FeatureMapStem(bn_backbone(), nn.Conv2d(16, 16, 2, 2)),
    "timm": lambda: timm_stem(dim=16, backbone="resnet18", level=2),
}  # fmt: skip


@pytest.mark.parametrize("name", OUR_STEMS)
def test_to_timm_takes_every_stem(name: str) -> None:
    stem = OUR_STEMS[name]()
    encoder = Encoder(grid=(4, 3), dim=16, depth=2, heads=2, layer_scale=0.1, registers=1)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    ours = HybridViT(stem, encoder, mean=mean, std=std, head=nn.Linear(16, 3, bias=False)).eval()
    redraw(ours)
    back = hybridvit.to_timm(ours)
    assert back.num_classes == 3
    assert back.pretrained_cfg["input_size"] == (3, *ours.image_size)
    assert_round_trip(ours, back)
    for model in (ours, back):
        model.double()
    for size in (ours.image_size, (64, 96)):
        # The redrawn statistics pass through float32 once.
        assert error(back, ours, images(*size, torch.float64)) < 1e-10


def small_encoder(**options: Any) -> Encoder:
    return Encoder(grid=(2, 2), dim=16, depth=2, heads=2, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": nn.Sequential(nn.Linear(16, 3))}, "to_timm: the head must be nn.Linear or None"),
        ({"stem": ResNetStem(dim=16, blocks=(1,), width=1 / 32)}, "width=0.03125"),
        ({"encoder": Encoder(grid=(2, 2), dim=16, depth=0, heads=2, pool="mean")}, "depth=0"),
        ({"encoder": small_encoder(position="sincos_2d")}, "position='sincos_2d'"),
        ({"encoder": small_encoder(position="rope_2d")}, "position='rope_2d'"),
        ({"encoder": small_encoder(position_at="every_layer_shared")}, "position_at='every"),
        ({"encoder": small_encoder(position_combine="multiply")}, "position_combine='mul"),
        ({"encoder": small_encoder(attention="axial")}, "attention='axial'"),
    ],
)
def test_to_timm_refuses_what_timm_has_not(change: dict[str, Any], message: str) -> None:
    parts: dict[str, Any] = {
        "stem": LinearStem(dim=16, patch=8),
        "encoder": Encoder(grid=(2, 2), dim=16, depth=1, heads=2),
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "head": None,
    }
    with pytest.raises(ValueError, match=message) as caught:
        hybridvit.to_timm(HybridViT(**(parts | change)))
    assert "\n" not in str(caught.value)


def test_to_timm_refuses_a_foreign_stem() -> None:
    class Mine(Stem):
        patch_px = 8

        def forward(self, images: Tensor, visible: Tensor | None = None) -> Tokens:
            raise NotImplementedError

    encoder = Encoder(grid=(2, 2), dim=16, depth=1, heads=2)
    with pytest.raises(ValueError, match="stem Mine has no timm counterpart"):
        hybridvit.to_timm(HybridViT(Mine(), encoder, mean=(0.0,) * 3, std=(1.0,) * 3))


# --- the paper ---


@pytest.mark.parametrize(
    ("preset", "name", "millions"),
    [
        ("base", "vit_base_patch16_224", 86),
        ("large", "vit_large_patch16_224", 307),
        ("huge", "vit_huge_patch14_224", 632),
    ],
)
def test_presets_have_the_sizes_of_table_1(preset: str, name: str, millions: float) -> None:
    # Dosovitskiy et al. 2021, Table 1; the paper does not say with which patch and head it counts.
    patch = 14 if preset == "huge" else 16
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=1000)
        encoder = ENCODERS[preset](grid=(224 // patch,) * 2)
        stem = LinearStem(dim=encoder.dim, patch=patch)
        ours = HybridViT(
            stem, encoder, mean=(0.0,) * 3, std=(1.0,) * 3, head=nn.Linear(encoder.dim, 1000)
        )
    assert _count(ours) == _count(theirs) == _count(hybridvit.from_timm(theirs))
    assert _count(ours) == pytest.approx(millions * 1e6, rel=0.015)


def test_base_embeds_an_image_of_224_px_as_197_tokens_of_768() -> None:
    with torch.device("meta"):
        encoder = ENCODERS["base"](grid=(14, 14))
        stem = LinearStem(dim=768, patch=16)
        assert encoder.embed(stem(torch.empty(2, 3, 224, 224))).shape == (2, 197, 768)
