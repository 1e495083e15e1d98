"""timm's `VisionTransformer` as a `HybridViT`, and back, with equal outputs.

Written against timm 1.0.31, `models/vision_transformer.py` and `vision_transformer_hybrid.py`. What
decides is the class and the attributes of each module, never a model's name, and every
parameter and buffer has to find its place: an option that is not known here is an error, not a
different output.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers.activations import GELUTanh
from timm.layers.activations import QuickGELU as TimmQuickGELU
from timm.layers.drop import DropPath
from timm.layers.hybrid_embed import HybridEmbed
from timm.layers.mlp import Mlp, SwiGLUPacked
from timm.layers.norm import LayerNorm
from timm.layers.norm_act import GroupNormAct
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pool2d_same import MaxPool2dSame
from timm.layers.std_conv import StdConv2dSame
from timm.models.resnetv2 import Bottleneck, ResNetStage, ResNetV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hybridvit.backbones import create_timm
from hybridvit.contracts import Stem
from hybridvit.encoder.mlp import Activation
from hybridvit.encoder.mlp import GatedMlp as OurGatedMlp
from hybridvit.encoder.model import HybridViT
from hybridvit.encoder.vit import Encoder
from hybridvit.interop.timm_options import (
    POOLS,
    activation_name,
    check_model,
    check_pool,
    class_name,
    common_block,
    is_identity,
    norm_eps,
    our_name,
    ratio,
    read_encoder,
    read_head,
    read_stem,
)
from hybridvit.stems.linear import LinearStem
from hybridvit.stems.resnet import ResNetStem
from hybridvit.stems.timm import FeatureMapStem

# Options of our encoder of which timm's has fewer.
_KNOWN = {
    "position": ("learned_1d", "none"),
    "position_at": ("input",),
    "position_combine": ("add",),
    "attention": ("full",),
}
_ACTIVATION_LAYERS: dict[Activation, type[nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": GELUTanh,
    "quick_gelu": TimmQuickGELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


def from_timm(model_or_name: nn.Module | str, pretrained: bool = False) -> HybridViT:
    """A timm `VisionTransformer` as a `HybridViT` with copies of its weights.

    The result takes images in [0, 1] and normalises them with the mean and std of the model's
    `pretrained_cfg` (by 0 and 1 where it has none), so that
    `from_timm(m)(images) == m((images - mean) / std)`. Data types, device and train or eval mode
    are the model's. Image sizes that the model refuses (`dynamic_img_size=False`) are accepted:
    the position embedding is interpolated. Dropout and stochastic depth keep their rates, except
    for the two that have no counterpart and act in training only, `drop_rate` (before the head)
    and `patch_drop_rate`.

    Args:
        model_or_name: a model whose class is `VisionTransformer`, with a linear patch embedding
            or a hybrid one (`HybridEmbed`, any backbone); or a name for `timm.create_model`.
        pretrained: with a name, load timm's weights (downloads them).

    Raises:
        ValueError: an unknown name, a failed download, or an option without counterpart.
    """
    if isinstance(model_or_name, str):
        model: Any = create_timm(model_or_name, pretrained)
    elif pretrained:
        raise ValueError("from_timm: pretrained=True needs a name, not a model")
    else:
        model = model_or_name
    check_model(model)
    spec = common_block(model)
    eps = norm_eps(model)
    if model.attn_pool is not None:
        check_pool(model.attn_pool, spec)
    stem = read_stem(model.patch_embed)
    with torch.device("meta"):  # no time for initial values that are replaced
        encoder = read_encoder(model, spec, eps)
        head = read_head(model.head)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    mean, std = cfg.get("mean", (0.0, 0.0, 0.0)), cfg.get("std", (1.0, 1.0, 1.0))
    ours = HybridViT(stem, encoder, mean=mean, std=std, head=head)
    state = {our_name(k, stem): v for k, v in _fused_gates(model.state_dict()).items()}
    if isinstance(stem, LinearStem):
        state["stem.proj.weight"] = state["stem.proj.weight"].flatten(1)
    like = next(model.parameters())
    state["mean"] = like.new_tensor(mean).view(1, -1, 1, 1)
    state["std"] = like.new_tensor(std).view(1, -1, 1, 1)
    _assign(ours, state)
    _copy_rates(model, encoder)
    ours.train(model.training)
    if isinstance(stem, FeatureMapStem):
        _copy_modes(model.patch_embed.backbone, stem.backbone)
    return ours


def to_timm(model: HybridViT) -> Any:
    """A `HybridViT` as a timm `VisionTransformer` with copies of its weights.

    It takes normalised images of any size that the stride divides (`dynamic_img_size=True`); mean,
    std and image size are in its `pretrained_cfg`. `from_timm` of the result has the state dict of
    `model`, bit by bit.

    Raises:
        ValueError: a head that is no linear layer, or a stem or an encoder that timm has not.
    """
    encoder, head = model.encoder, model.head
    if head is not None and type(head) is not nn.Linear:
        raise ValueError(f"to_timm: the head must be nn.Linear or None, not {class_name(head)}")
    if encoder.depth == 0:
        raise ValueError("to_timm: an encoder with depth=0 has no timm counterpart")
    for option, known in _KNOWN.items():
        if (value := getattr(encoder, option)) not in known:
            raise ValueError(f"to_timm: an encoder with {option}={value!r} has no timm counterpart")
    (height, width), stem = model.image_size, model.stem
    embed_layer, patch = _timm_embed(stem)
    vit: Any = VisionTransformer(
        img_size=(height, width),
        patch_size=patch,
        embed_layer=embed_layer,
        num_classes=0 if head is None else head.out_features,
        **_timm_options(encoder),
    )
    if head is not None:
        vit.head = copy.deepcopy(head)  # it may have no bias
    ours, names = model.state_dict(), vit.state_dict()
    state = {key: ours[our_name(key, stem)] for key in names if our_name(key, stem) in ours}
    if isinstance(stem, LinearStem):
        weight = state["patch_embed.proj.weight"]
        state["patch_embed.proj.weight"] = weight.reshape(len(weight), 3, patch, patch)
    _assign(vit, state)
    _write_rates(encoder, vit)
    vit.train(model.training)
    if isinstance(stem, FeatureMapStem):
        _copy_modes(stem.backbone, vit.patch_embed.backbone)
    vit.pretrained_cfg = vit.default_cfg = {
        "input_size": (3, height, width),
        "fixed_input_size": False,
        "num_classes": vit.num_classes,
        "mean": tuple(model.mean.flatten().tolist()),
        "std": tuple(model.std.flatten().tolist()),
    }
    return vit


def _fused_gates(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which the two gate matrices of timm's `SwiGLU` are one, as in `GluMlp`."""
    fused = {}
    for key, value in state.items():
        if re.match(r"blocks\.\d+\.mlp\.fc1_g\.", key):
            value = torch.cat([value, state[key.replace("fc1_g", "fc1_x")]])
            fused[key.replace("fc1_g", "fc1")] = value
        elif not re.match(r"blocks\.\d+\.mlp\.fc1_x\.", key):
            fused[key] = value
    return fused


def _assign(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a module copies of tensors, with their type and device; each must have its place."""
    own = module.state_dict()
    for key in sorted(own.keys() | state.keys()):
        if key not in own or key not in state or own[key].shape != state[key].shape:
            raise ValueError(f"timm conversion: {key} of {class_name(module)} has no counterpart")
    module.load_state_dict({k: v.detach().clone() for k, v in state.items()}, assign=True)


def _copy_modes(source: nn.Module, target: nn.Module) -> None:
    """Train or eval of each part: a frozen BatchNorm stays frozen."""
    for old, new in zip(source.modules(), target.modules(), strict=True):
        new.training = old.training


def _copy_rates(model: Any, encoder: Encoder) -> None:
    encoder.dropout.p = model.pos_drop.p
    ours: Any
    for block, ours in zip(model.blocks, encoder.blocks, strict=True):
        ours.attn.dropout = block.attn.attn_drop.p
        ours.dropout.p = block.attn.proj_drop.p
        ours.mlp.dropout.p = block.mlp.drop1.p
        ours.drop_path = getattr(block.drop_path1, "drop_prob", 0.0)


def _write_rates(encoder: Encoder, model: Any) -> None:
    model.pos_drop.p = encoder.dropout.p
    ours: Any
    for block, ours in zip(model.blocks, encoder.blocks, strict=True):
        block.attn.attn_drop.p = ours.attn.dropout
        block.attn.proj_drop.p = ours.dropout.p
        block.mlp.drop1.p = block.mlp.drop2.p = ours.mlp.dropout.p
        for name in ("drop_path1", "drop_path2") if ours.drop_path else ():
            setattr(block, name, DropPath(ours.drop_path))


# --- to timm ---


def _timm_options(encoder: Encoder) -> dict[str, Any]:
    """Arguments of `VisionTransformer`, read from the encoder's modules."""
    block: Any = encoder.blocks[0]
    gated = isinstance(block.mlp, OurGatedMlp)
    layer_scale, fc_norm = not is_identity(block.ls1), not is_identity(encoder.fc_norm)
    return {
        "global_pool": {ours: theirs for theirs, ours in POOLS.items()}[encoder.pool_kind],
        "embed_dim": encoder.dim,
        "depth": encoder.depth,
        "num_heads": block.attn.heads,
        "mlp_ratio": ratio(block.mlp.fc1.out_features, encoder.dim),
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not is_identity(block.attn.q_norm),
        "init_values": 1.0 if layer_scale else None,
        "class_token": encoder.cls_token is not None,
        "reg_tokens": 0 if encoder.reg_token is None else encoder.reg_token.shape[1],
        "pos_embed": "none" if encoder.pos_embed is None else "learn",
        "no_embed_class": not encoder.position_on_prefix,
        "pre_norm": not is_identity(encoder.norm_pre),
        "final_norm": fc_norm or not is_identity(encoder.norm),
        "fc_norm": fc_norm,
        "dynamic_img_size": True,
        "norm_layer": partial(LayerNorm, eps=block.norm1.eps),
        "act_layer": _ACTIVATION_LAYERS[activation_name(block.mlp.act)],
        "mlp_layer": SwiGLUPacked if gated else Mlp,
    }


def _timm_embed(stem: Stem) -> tuple[Callable[..., nn.Module], int]:
    """timm's patch embedding of a stem, to be called by `VisionTransformer`, and its patch size."""
    proj: Any = getattr(stem, "proj", None)
    if isinstance(stem, LinearStem):
        return _with_bias(PatchEmbed, proj.bias is not None), stem.patch_px
    if isinstance(stem, ResNetStem):
        backbone: nn.Module = _timm_resnet(stem)
        options: dict[str, Any] = {}
    elif isinstance(stem, FeatureMapStem):
        # float32 on the CPU, because HybridEmbed tries the backbone; the copied tensors replace it
        backbone = copy.deepcopy(stem.backbone).float().cpu()
        options = {"proj": isinstance(proj, nn.Conv2d)}
    else:
        raise ValueError(f"to_timm: the stem {class_name(stem)} has no timm counterpart")
    embed = partial(HybridEmbed, backbone=backbone, **options)
    has_bias = getattr(proj, "bias", None) is not None
    return _with_bias(embed, has_bias), proj.stride[0] if isinstance(proj, nn.Conv2d) else 1


def _with_bias(layer: Callable[..., nn.Module], bias: bool) -> Callable[..., nn.Module]:
    # VisionTransformer ties the embedding's bias to pre_norm; ours is free.
    return lambda **options: layer(**(options | {"bias": bias}))


def _timm_resnet(stem: ResNetStem) -> nn.Module:
    """timm's backbone of a `ResNetStem`, its weights not yet copied."""
    if not isinstance(stem.root_norm, nn.GroupNorm):
        raise ValueError("to_timm: a ResNetStem with norm='batch' has no timm counterpart")
    groups = stem.root_norm.num_groups
    if groups % 4:  # timm rounds the inner channels, 2 * groups, to multiples of 8
        raise ValueError(f"to_timm: width={groups / 32} is no multiple of 1/8, as timm's must be")
    parts: dict[str, Any] = {
        "act_layer": nn.ReLU,
        "conv_layer": partial(StdConv2dSame, eps=1e-8),
        "norm_layer": partial(GroupNormAct, num_groups=groups),
    }
    root = nn.Sequential()
    kernel, stride = stem.root.kernel_size[0], stem.root.stride[0]
    root.add_module("conv", parts["conv_layer"](3, 2 * groups, kernel, stride=stride))
    root.add_module("norm", parts["norm_layer"](2 * groups))
    if stem.root_pool:
        root.add_module("pool", MaxPool2dSame(3, 2))
    if len(stem.stages) == 0:
        return root
    # Its own root and strides are fixed.
    backbone: Any = ResNetV2([], preact=False, num_classes=0, global_pool="")
    backbone.stem, channels = root, 2 * groups
    blocks: Any
    for i, blocks in enumerate(stem.stages):
        out = 8 * groups * 2**i
        stage = ResNetStage(channels, out, blocks[0].conv2.stride[0], 1, depth=len(blocks),
                            block_fn=Bottleneck, **parts)  # fmt: skip
        backbone.stages.add_module(str(i), stage)
        channels = out
    backbone.num_features = channels
    return backbone  # type: ignore[no-any-return]  # Any, to set its stem
