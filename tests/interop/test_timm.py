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
    AttentionRope,
    GluMlp,
    HybridEmbed,
    RmsNorm,
    StdConv2d,
    StdConv2dSame,
    SwiGLU,
    SwiGLUPacked,
)
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import (
    DiffAttention,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
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

RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-10}


def draw(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """A random value for a tensor of either library, such that outputs stay finite and lively."""
    factor = like.ndim == 1 and name.endswith(("weight", "gamma", "running_var"))
    if factor or name in ("mean", "std"):
        return torch.rand(like.shape, generator=generator).to(like.dtype) * 0.6 + 0.7
    if like.ndim == 1:
        scale = 0.3
    elif like.shape[0] == 1:  # class token, registers, positions, latent query
        scale = 0.5
    else:
        scale = (like.numel() / like.shape[0]) ** -0.5
    return torch.randn(like.shape, generator=generator).to(like.dtype) * scale


def redraw(model: nn.Module, seed: int = 0) -> None:
    """Every parameter and floating buffer anew."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                tensor.copy_(draw(name, tensor, generator))


def images(height: int, width: int, dtype: torch.dtype, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, height, width, generator=generator, dtype=torch.float64).to(dtype)


def statistics(model: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    cfg = getattr(model, "pretrained_cfg", None) or {"mean": (0, 0, 0), "std": (1, 1, 1)}
    mean, std = like.new_tensor(cfg["mean"]), like.new_tensor(cfg["std"])
    return mean.view(1, 3, 1, 1), std.view(1, 3, 1, 1)


@torch.no_grad()
def error(theirs: Any, ours: nn.Module, x: Tensor) -> float:
    """Largest difference of the outputs relative to the largest output."""
    mean, std = statistics(theirs, x)
    expected, got = theirs((x - mean) / std), ours(x)
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype == x.dtype
    assert expected.abs().max() > 0.1
    return ((got - expected).abs().max() / expected.abs().max()).item()


def assert_equal(theirs: Any, ours: nn.Module, size: tuple[int, int], batch: int = 1) -> None:
    for dtype, bound in RELATIVE.items():
        if dtype == next(theirs.parameters()).dtype:
            assert error(theirs, ours, images(*size, dtype, batch)) < bound


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

TINY: dict[str, Any] = {
    "img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5,
}  # fmt: skip


def vit(**options: Any) -> Any:
    torch.manual_seed(0)
    return VisionTransformer(**(TINY | options))


def bit(layers: tuple[int, ...] = (1, 1), **options: Any) -> nn.Module:
    standard: dict[str, Any] = {
        "preact": False, "stem_type": "same", "num_classes": 0, "global_pool": "",
        "channels": (32, 64), "stem_chs": 8, "conv_layer": partial(StdConv2dSame, eps=1e-8),
        "norm_layer": partial(timm.layers.GroupNormAct, num_groups=4),
    }  # fmt: skip
    return ResNetV2(list(layers), **(standard | options))


def hybrid(backbone: nn.Module, embed: dict[str, Any] | None = None, **options: Any) -> Any:
    layer = partial(HybridEmbed, backbone=backbone, **(embed or {}))
    return vit(**({"embed_layer": layer, "patch_size": 1, "img_size": 32} | options))


def bn_backbone() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1)
    )


def edited_bit(part: str, name: str, value: Any) -> nn.Module:
    backbone = bit()
    setattr(backbone.get_submodule(part), name, value)
    return backbone


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": nn.Sequential(nn.Linear(16, 3))}, "to_timm: the head must be nn.Linear or None"),
        ({"stem": ResNetStem(dim=16, blocks=(1,), width=1 / 32)}, "width=0.03125"),
        ({"encoder": Encoder(grid=(2, 2), dim=16, depth=0, heads=2, pool="mean")}, "depth=0"),
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


# --- what is refused ---

GEGLU = {"mlp_layer": SwiGLUPacked, "act_layer": nn.GELU}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "parallel": (partial(vit, block_fn=ParallelScalingBlock), "block_fn=ParallelScalingBlock"),
    "parallel_things": (partial(vit, block_fn=ParallelThingsBlock), "block_fn=ParallelThings"),
    "post_norm": (partial(vit, block_fn=ResPostBlock), "block_fn=ResPostBlock"),
    "diff": (partial(vit, attn_layer=DiffAttention), "attn_layer=DiffAttention"),
    "rope": (partial(vit, attn_layer=AttentionRope), "attn_layer=AttentionRope"),
    "scale_attn_norm": (partial(vit, scale_attn_norm=True), "scale_attn_norm"),
    "scale_mlp_norm": (partial(vit, scale_mlp_norm=True), "scale_mlp_norm"),
    "proj_bias": (partial(vit, proj_bias=False), "proj_bias=False"),
    "no_pool": (partial(vit, global_pool=""), "global_pool=''"),
    "max": (partial(vit, global_pool="max"), "global_pool='max'"),
    "avgmax": (partial(vit, global_pool="avgmax"), "global_pool='avgmax'"),
    "prr": (partial(vit, global_pool="prr"), "global_pool='prr'"),
    "prefix": (partial(vit, global_pool="avg", pool_include_prefix=True), "pool_include_prefix"),
    "prefix_map": (partial(vit, global_pool="map", pool_include_prefix=True), "pool_include_"),
    "pad": (partial(vit, dynamic_img_size=True, dynamic_img_pad=True), "dynamic_img_pad"),
    "embed_norm": (partial(vit, embed_norm_layer=nn.LayerNorm), "embed_norm_layer"),
    "rms": (partial(vit, norm_layer=RmsNorm), "norm_layer=RmsNorm"),
    "no_affine": (
        partial(vit, norm_layer=partial(nn.LayerNorm, elementwise_affine=False)),
        "norm_layer=LayerNorm",
    ),
    "mish": (partial(vit, act_layer=nn.Mish), "act_layer=Mish"),
    "glu": (partial(vit, mlp_layer=GluMlp, act_layer=nn.SiLU), "gate_last=True"),
    "geglu": (partial(vit, **GEGLU), "mlp_layer=GluMlp with act_layer=GELU"),
    "patch": (partial(vit, patch_size=(8, 4)), r"patch_size=\(8, 4\)"),
    "rest": (partial(vit, img_size=20), r"img_size=\(20, 20\)"),
    "grey": (partial(vit, in_chans=1), "in_chans=1"),
    "pooled": (
        lambda: hybrid(nn.Sequential(bn_backbone(), nn.AdaptiveAvgPool2d(4))),
        "stride depends on the image",
    ),
    "depth": (partial(vit, depth=0, global_pool="avg"), "depth=0"),
    "distilled": (partial(timm.create_model, "deit_tiny_distilled_patch16_224"), "distillation"),
    "relpos": (partial(timm.create_model, "vit_relpos_small_patch16_224", depth=1), "relative"),
    "relpos_mlp": (partial(timm.create_model, "vit_srelpos_small_patch16_224", depth=1), "relativ"),
    "eva": (partial(timm.create_model, "eva02_tiny_patch14_224", depth=1), "rope"),
    "not_a_vit": (partial(timm.create_model, "resnet18"), "ResNet instead of VisionTransformer"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_options_are_refused_in_one_line_that_names_them(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as caught:
        hybridvit.from_timm(make())
    assert "\n" not in str(caught.value)


def _edit(**changes: Any) -> Any:
    model = vit(global_pool="map", class_token=False, qk_norm=True, init_values=1.0)
    for path, value in changes.items():
        owner, _, name = path.replace("__", ".").rpartition(".")
        setattr(model.get_submodule(owner), name, value)
    return model


EDITED: dict[str, tuple[dict[str, Any], str]] = {
    "gate": ({"blocks__1__attn__gate": nn.Linear(16, 16)}, "gated attention"),
    "scale": ({"blocks__0__attn__scale": 1.0}, "attention scale"),
    "eps": ({"norm": nn.LayerNorm(16, eps=1.0)}, "norm_layer with several eps"),
    "block": ({"blocks__1__mlp__act": nn.ReLU()}, "a block 1 that differs"),
    "pool_act": ({"attn_pool__mlp__act": nn.ReLU()}, "attn_pool with other"),
    "pool_latents": ({"attn_pool__latent_len": 2}, "attn_pool with other"),
    "pool_q_norm": ({"attn_pool__q_norm": nn.LayerNorm(8)}, "attn_pool with other"),
    "pool_mlp": ({"attn_pool__mlp": None}, "attn_pool with other"),
    "new_part": ({"blocks__0__extra": nn.ReLU()}, "extra=ReLU of Block"),
    "new_parameter": ({"temperature": nn.Parameter(torch.ones(1))}, "temperature"),
    "new_buffer": ({"blocks__0__extra": nn.BatchNorm1d(3)}, "extra=BatchNorm1d"),
    "ls": ({"blocks__0__ls2": nn.Tanh()}, "layer scale=Tanh"),
    "missing_norm": ({"blocks__0__norm1": nn.Identity()}, "norm1"),
    "both_norms": ({"fc_norm": nn.LayerNorm(16, 1e-6)}, "encoder.norm"),
    "head": ({"head": nn.Sequential(nn.Linear(16, 2))}, "head=Sequential"),
    "positions": ({"pos_embed": nn.Parameter(torch.ones(1, 7, 16))}, "pos_embed"),
    "wrong_pool": ({"global_pool": "avg"}, "attn_pool with global_pool"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITED)
def test_edited_models_are_refused(name: str) -> None:
    changes, message = EDITED[name]
    with pytest.raises(ValueError, match=message) as caught:
        hybridvit.from_timm(_edit(**changes))
    assert "\n" not in str(caught.value)


def test_wrong_calls_end_in_one_line() -> None:
    with pytest.raises(ValueError, match="no model 'vit_tinny_patch16_224'; did you mean vit_tiny"):
        hybridvit.from_timm("vit_tinny_patch16_224")
    with pytest.raises(ValueError, match="pretrained=True needs a name"):
        hybridvit.from_timm(vit(), pretrained=True)


def test_a_failed_download_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ValueError, match="pretrained weights of 'vit_tiny_patch16_224'") as caught:
        hybridvit.from_timm("vit_tiny_patch16_224", pretrained=True)
    assert "no route to host" in str(caught.value)
    assert "\n" not in str(caught.value)


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
